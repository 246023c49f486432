"""Trains a small student with KdrlTrainer on a CPU, in under a minute and without a network.

    python -m kdrl_kernels.integrations.trl.example

The task is the sum of two digits. A teacher learns it from worked answers, and a smaller student
learns them only partly. The student is then trained on its own completions, by the reward and the
teacher together. A line shows, over three steps, its share of right answers and its exact KL to
the teacher, in nats per token.
"""

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from kdrl_kernels.integrations.trl import KdrlConfig, KdrlTrainer
from kdrl_train.tools.toy.models import ArchitectureConfig, make_model, train_tokenizer

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(10) for b in range(10)]
"""Prompts and their answers."""


def right(completions: Sequence[str], answer: Sequence[str], **_columns: Any) -> list[float]:
    """Reward 1 for the right answer, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text == one) for text, one in pairs]


def taught(tokenizer: Any, *, hidden: int, steps: int, seed: int) -> Any:
    """Make a model and train it on all answers, for so many steps of AdamW."""
    shape = ArchitectureConfig(
        family="qwen3", hidden=hidden, layers=2, intermediate=2 * hidden, rope_theta=100.0
    )
    model = make_model(shape, tokenizer, seed)
    texts = [prompt + answer + tokenizer.eos_token for prompt, answer in SUMS]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-3] = -100  # the answer and its end are at most three tokens
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class Lines(TrainerCallback):
    """Writes a line of each record that has a KL, and keeps it."""

    def __init__(self) -> None:
        self.records: list[dict[str, float]] = []

    def on_log(self, _args: Any, state: Any, _control: Any, **options: Any) -> None:
        """Write reward and KL; what is logged at the end of a run has neither."""
        record = options["logs"]
        if "kdrl/kl" in record:
            self.records.append(record)
            sys.stdout.write(
                f"step {state.global_step:2d}/{state.max_steps}  right {record['reward']:.1%}  "
                f"KL to the teacher {record['kdrl/kl']:.4f}  kd_coef {record['kdrl/kd_coef']:.2f}\n"
            )
            sys.stdout.flush()


def run(steps: int = 30, *, teacher_steps: int = 100, student_steps: int = 80) -> list[Any]:
    """Train the student, and return what was logged, means over three steps each.

    Args:
        steps: of KdrlTrainer.
        teacher_steps, student_steps: of their training on worked answers.
    """
    tokenizer = train_tokenizer((prompt for prompt, _ in SUMS), 259)
    teacher = taught(tokenizer, hidden=64, steps=teacher_steps, seed=1)
    student = taught(tokenizer, hidden=48, steps=student_steps, seed=0)
    rows = Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in SUMS])
    lines = Lines()
    with tempfile.TemporaryDirectory() as folder:
        args = KdrlConfig(
            output_dir=folder,
            kd="rkl",
            kd_coef=1.0,
            num_generations=8,
            per_device_train_batch_size=256,
            max_completion_length=4,
            max_steps=steps,
            learning_rate=1.5e-3,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=5,
            logging_steps=3,
            use_cpu=True,
            bf16=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = KdrlTrainer(
            student,
            right,
            args,
            train_dataset=rows,
            processing_class=tokenizer,
            teacher_model=teacher,
            callbacks=[lines],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return lines.records


if __name__ == "__main__":
    torch.set_num_threads(1)  # products this small are slower on several, far slower on busy cores
    run()

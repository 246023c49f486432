"""Measures tokens/s of a whole GRPO step, ours and TRL's: python -m bench.trainer --out DIR

Both train the same random model on the same prompts with the same reward, as many completions a
step, drawn by transformers' `generate` at temperature 1, with AdamW. Each run is a process of its
own; the two take turns. A step is timed from end to end: rollout, reward, loss, update. Its tokens
are those sampled. The first steps of a run, which warm up, do not count.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default will change

import torch

from bench.machine import machine_info, one_line

WORDS, PROMPT_WORDS = 4094, 12
PROMPTS, GROUP, LONGEST = 8, 8, 64
"""Prompts a step, completions each, tokens at most."""
WARM_UP = 2
"""Steps of each run that do not count."""
RATE = 1e-4


def long_words(completions: list[str], **_: Any) -> list[float]:
    """Reward each completion by the share of its words that are long."""
    return [sum(len(word) > 4 for word in c.split()) / (len(c.split()) or 1) for c in completions]


def long_enough(completion: str, _answer: str) -> float:
    """Reward one completion like long_words, as kdrl_train calls a reward."""
    return long_words([completion])[0]


def make_task(folder: Path, hidden: int, layers: int) -> None:
    """Write model/ (a random Llama and a tokenizer of words) and prompts.jsonl."""
    import tokenizers  # noqa: PLC0415  a part of transformers' installation
    import transformers  # noqa: PLC0415

    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i + 2 for i in range(WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        "llama",
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    draw = torch.Generator().manual_seed(1)
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(256):
            length = int(torch.randint(4, PROMPT_WORDS + 1, (1,), generator=draw))
            ids = torch.randint(WORDS, (length,), generator=draw).tolist()
            row = {"question": " ".join(f"w{i}" for i in ids), "answer": "none"}
            file.write(json.dumps(row) + "\n")


def run_ours(folder: Path, steps: int) -> list[dict[str, float]]:
    """Train with kdrl_train; return {"seconds", "tokens"} of each step."""
    from rich.console import Console  # noqa: PLC0415

    from kdrl_train import config, train  # noqa: PLC0415
    from kdrl_train.method.presets import PRESETS  # noqa: PLC0415
    from kdrl_train.runfolder.log import read_records  # noqa: PLC0415

    out = train.main(
        config.TrainConfig(
            out=folder / f"ours-{time.time_ns()}",
            steps=steps,
            save_every=steps,
            model=config.ModelConfig(policy=str(folder / "model"), device="cpu"),
            data=config.DataConfig(path=str(folder / "prompts.jsonl")),
            sampling=config.SamplingConfig(
                prompts_per_step=PROMPTS, group_size=GROUP, max_new_tokens=LONGEST
            ),
            reward=config.RewardConfig(function="bench.trainer:long_enough"),
            method=PRESETS["grpo"],
            optim=config.OptimConfig(learning_rate=RATE, micro_batch_tokens=2048),
        ),
        Console(file=io.StringIO()),
    )
    return [
        {"seconds": row["seconds"], "tokens": row["response_length"] * PROMPTS * GROUP}
        for row in read_records(out)
    ]


def run_trl(folder: Path, steps: int) -> list[dict[str, float]]:
    """Train with TRL; return {"seconds", "tokens"} of each step."""
    import datasets  # noqa: PLC0415
    import transformers  # noqa: PLC0415
    import trl  # noqa: PLC0415

    class StepEnds(transformers.TrainerCallback):
        """A callback that records the time of the start and of the end of each step."""

        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    rows = [json.loads(line) for line in (folder / "prompts.jsonl").open(encoding="utf-8")]
    settings = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=LONGEST,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        beta=0.0,
        temperature=1.0,
        top_k=0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    step_ends = StepEnds()
    trainer = trl.GRPOTrainer(
        model=str(folder / "model"),
        reward_funcs=long_words,
        args=settings,
        train_dataset=datasets.Dataset.from_list([{"prompt": row["question"]} for row in rows]),
        callbacks=[step_ends],
    )
    trainer.train()
    lengths = [
        row["completions/mean_length"]
        for row in trainer.state.log_history
        if "completions/mean_length" in row
    ]
    seconds = [end - start for start, end in zip(step_ends.ends, step_ends.ends[1:], strict=False)]
    return [
        {"seconds": s, "tokens": length * PROMPTS * GROUP}
        for s, length in zip(seconds, lengths, strict=True)
    ]


RUNS = {"kdrl_train": run_ours, "TRL GRPOTrainer": run_trl}


def main() -> int:
    """Run both trainers in turns, and write trainer.json and trainer.md."""
    parser = argparse.ArgumentParser(prog="python -m bench.trainer", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run (default: 8)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--one", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    task = args.out / "task"
    if args.one:
        steps = RUNS[args.one](task, args.steps)
        print("RESULT " + json.dumps(steps[WARM_UP:]))
        return 0
    task.mkdir(parents=True, exist_ok=True)
    make_task(task, args.hidden, args.layers)
    steps_by_trainer: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for number in range(args.rounds):
        for name in sorted(RUNS, reverse=bool(number % 2)):
            steps_by_trainer[name] += _in_process(name, args)
            print(
                f"round {number + 1}: {name} {_rate(steps_by_trainer[name]):,.0f} tokens/s",
                flush=True,
            )
    command = f"python -m bench.trainer --rounds {args.rounds} --steps {args.steps} "
    command += f"--hidden {args.hidden} --layers {args.layers} --out DIR"
    result = {"machine": machine_info(), "command": command, "steps": steps_by_trainer}
    (args.out / "trainer.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "trainer.md").write_text(_table(result), encoding="utf-8")
    print(_table(result))
    return 0


def _in_process(name: str, args: argparse.Namespace) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "bench.trainer", "--one", name, "--out", str(args.out)]
    command += ["--steps", str(args.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-3000:]}")
    steps: list[dict[str, float]] = json.loads(lines[-1].removeprefix("RESULT "))
    return steps


def _rate(steps: list[dict[str, float]]) -> float:
    return statistics.median(step["tokens"] / step["seconds"] for step in steps)


def _table(result: dict[str, Any]) -> str:
    """Write the markdown table of medians and quartiles over steps."""
    steps_by_trainer = result["steps"]
    base = _rate(steps_by_trainer["TRL GRPOTrainer"])
    lines = [
        f"`{result['command']}`: {one_line(result['machine'])}",
        "",
        "| trainer | tokens/s of a step (quartiles) | steps | tokens a step | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, steps in steps_by_trainer.items():
        rates = [step["tokens"] / step["seconds"] for step in steps]
        low, middle, high = statistics.quantiles(rates, n=4)
        tokens = statistics.median(step["tokens"] for step in steps)
        lines.append(
            f"| {name} | {middle:,.0f} ({low:,.0f}-{high:,.0f}) | {len(steps)} | {tokens:,.0f} | "
            f"{middle / base:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

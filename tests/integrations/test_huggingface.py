"""The examples for the Hugging Face Trainer and Accelerate give the losses of full logits."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import kdrl_kernels
from tests.train.ranks import on_processes

README = (Path(kdrl_kernels.__file__).parent / "integrations" / "README.md").read_text("utf-8")
VOCAB, ROWS = 31, 18
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = [
    # the Trainer's loader of data pins memory by default, which a machine without a GPU cannot
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # peft 0.21 reads an attribute that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def blocks(section: str) -> list[str]:
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def lean() -> Callable[..., Any]:
    names: dict[str, Any] = {}
    exec(blocks("Hugging Face Trainer")[0], names)
    return names["lean"]


def llama(seed: int, hidden: int = 16) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.3,
            pad_token_id=0,
        )
        return AutoModelForCausalLM.from_config(config).float()


def dataset(rows: int = ROWS) -> list[dict[str, torch.Tensor]]:
    """Rows of 9 tokens, of which a prompt has no label and 0 to 4 at the left are padding."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for row in range(rows):
        ids = torch.randint(1, VOCAB, (9,), generator=rng)
        padding = row % 5
        ids[:padding] = 0
        labels = ids.clone()
        labels[: padding + 1 + row % 3] = -100
        mask = (torch.arange(9) >= padding).long()
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


class FullLogits(Trainer):
    """Distils with full logits: the definition of what `lean` computes."""

    teacher: Any
    kl = "fkl"
    share = 0.5

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")[:, 1:]
        kept = labels != -100
        p = model(**inputs).logits[:, :-1][kept].log_softmax(-1)
        with torch.no_grad():
            q = self.teacher(**inputs).logits[:, :-1][kept].log_softmax(-1)
        forward, reverse = (q.exp() * (q - p)).sum(), (p.exp() * (p - q)).sum()
        nll = -p.gather(1, labels[kept][:, None]).sum()
        divergence = forward if self.kl == "fkl" else reverse
        loss = (self.share * divergence + (1 - self.share) * nll) / num_items_in_batch
        return (loss, {}) if return_outputs else loss


def arguments(folder: Path, accumulation: int, *, bf16: bool = False) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=ROWS // 3 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1.0,
        optim="sgd",
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=bf16,
        disable_tqdm=True,
    )


def figures(trainer: Trainer) -> torch.Tensor:
    """Return the loss and the norm of the gradient of each step of a run, and what evaluates."""
    log = [record for record in trainer.state.log_history if "grad_norm" in record]
    assert len(log) == 3
    evaluated = trainer.evaluate()["eval_loss"]
    values = [float(record[key]) for record in log for key in ("loss", "grad_norm")]
    return torch.tensor([*values, evaluated], dtype=torch.float64)


def assert_same_parameters(model: Any, expected: Any) -> None:
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_fine_tuning_is_the_trainers_own(accumulation: int, tmp_path: Path) -> None:
    args, start = arguments(tmp_path, accumulation), llama(0)
    data = {"train_dataset": dataset(), "eval_dataset": dataset(4)}
    names: dict[str, Any] = {"model": llama(0), "args": args, **data}
    for block in blocks("Hugging Face Trainer"):
        exec(block, names)
    ours = figures(names["trainer"])
    theirs = Trainer(llama(0), args, **data)
    theirs.train()
    torch.testing.assert_close(ours, figures(theirs), **CLOSE)
    assert_same_parameters(names["model"], theirs.model)
    moved = (names["model"].lm_head.weight - start.lm_head.weight).abs().max()
    assert moved > 1e-2


def test_a_lora_is_trained_as_by_the_trainer(tmp_path: Path) -> None:
    def adapted(model: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            config = peft.LoraConfig(
                r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
            )
            return peft.get_peft_model(model, config)

    args = arguments(tmp_path, 3)
    ours, theirs = (
        Trainer(adapted(model), args, train_dataset=dataset(), eval_dataset=dataset(4))
        for model in (lean()(llama(0)), llama(0))
    )
    for trainer in (ours, theirs):
        torch.manual_seed(0)  # of the order of the data
        trainer.train()
    torch.testing.assert_close(figures(ours), figures(theirs), **CLOSE)
    assert_same_parameters(ours.model, theirs.model)


@pytest.mark.parametrize(("kl", "share"), [("fkl", 0.5), ("rkl", 1.0)])
def test_distillation_is_that_of_full_logits(kl: str, share: float, tmp_path: Path) -> None:
    args, teacher = arguments(tmp_path, 3), llama(1, hidden=24).eval()
    data = {"train_dataset": dataset(), "eval_dataset": dataset(4)}
    ours = Trainer(lean()(llama(0), teacher=teacher, kl=kl, share=share), args, **data)
    ours.train()
    theirs = FullLogits(llama(0), args, **data)
    theirs.teacher, theirs.kl, theirs.share = teacher, kl, share
    theirs.train()
    torch.testing.assert_close(figures(ours), figures(theirs), **CLOSE)
    assert_same_parameters(ours.model, theirs.model)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_autocast_differs_by_its_rounding_alone(tmp_path: Path) -> None:
    args, data = arguments(tmp_path, 1, bf16=True), {"train_dataset": dataset()}
    ours = Trainer(lean()(llama(0)), args, **data, eval_dataset=dataset(4))
    theirs = Trainer(llama(0), args, **data, eval_dataset=dataset(4))
    for trainer in (ours, theirs):
        torch.manual_seed(0)  # of the order of the data
        trainer.train()
    torch.testing.assert_close(figures(ours), figures(theirs), rtol=2**-7, atol=0)
    assert ours.model.lm_head.weight.dtype == torch.float32


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "soft cap": ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    "scale": ("granite", {"logits_scaling": 4.0}),
    "bias": ("phi", {}),
    "adapter": ("llama", {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_counts(name: str) -> None:
    """A model's own loss, and one of a teacher of the same kind by full logits."""
    family, values = HEADS[name]
    values |= {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0}
    values |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    values |= {"initializer_range": 0.3}
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **values)
        models.append(AutoModelForCausalLM.from_config(config).eval())
    if name == "adapter":
        lora = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        for model in models[:2]:
            torch.manual_seed(0)
            peft.inject_adapter_in_model(lora, model)
    ours, theirs, teacher = models
    rows = {key: torch.stack([row[key] for row in dataset(3)]) for key in dataset(1)[0]}
    labels = rows["labels"][:, 1:]
    logp, logq = (
        model(**rows).logits[:, :-1][labels != -100].log_softmax(-1) for model in (theirs, teacher)
    )
    kl = (logq.exp() * (logq - logp)).sum(-1)
    expected = kl.mean() / 2 - logp.gather(1, labels[labels != -100][:, None]).mean() / 2
    loss = lean()(ours, teacher=teacher)(**rows).loss
    torch.testing.assert_close(loss, expected, **CLOSE)
    (loss + expected).backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, **CLOSE)


def test_generation_is_unchanged() -> None:
    ids = dataset(1)[0]["input_ids"][None]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = llama(0).generate(ids, **options)
    assert lean()(llama(0)).generate(ids, **options).tolist() == expected.tolist()


def together(rows: int, sharded: bool, _rank: int) -> dict[str, list[Any]]:
    """Run the loop of the page on one of two processes (DDP or FSDP2); return the parameters."""
    torch.set_num_threads(1)
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = lean()(llama(0))
    if sharded:  # accelerate's own FSDP plugin does nothing on a CPU
        mesh = init_device_mesh("cpu", (2,))
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = accelerator.prepare(DataLoader(dataset(rows), batch_size=rows // 6))
    if not sharded:
        model, optimizer = accelerator.prepare(model, optimizer)
    (loop,) = blocks("Accelerate")
    exec(
        loop,
        {"accelerator": accelerator, "model": model, "optimizer": optimizer, "batches": batches},
    )
    state = accelerator.unwrap_model(model).state_dict()
    assert all(isinstance(value, DTensor) == sharded for value in state.values())
    whole = (value.full_tensor() if sharded else value for value in state.values())
    return {name: value.tolist() for name, value in zip(state, whole, strict=True)}


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_of_accelerate_do_what_one_with_full_logits_does(sharded: bool) -> None:
    ranks = on_processes(2, partial(together, ROWS, sharded))
    model = llama(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = dataset()
    for step in range(3):
        batch = {
            key: torch.stack([row[key] for row in rows[6 * step : 6 * step + 6]]) for key in rows[0]
        }
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for state in ranks:
        for name, value in model.state_dict().items():
            torch.testing.assert_close(torch.tensor(state[name]), value, **CLOSE)

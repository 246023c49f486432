"""KdrlDistillationTrainer: TRL's numbers where it has the divergence, else full logits'."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from trl import DistillationConfig, DistillationTrainer

import kdrl_kernels as kk
from kdrl_kernels.integrations.trl import (
    KdrlDistillationConfig,
    KdrlDistillationTrainer,
    distillation,
    head,
)
from tests.integrations.trl_micro_batches import kd_term
from tests.integrations.trl_runs import (
    FAMILIES,
    OLD_NAMES,
    arguments,
    family,
    logs,
    parameters,
    prompts,
    small_model,
    tokenizer,
)

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)

TEMPERATURE = 0.8
OURS = KdrlDistillationConfig, KdrlDistillationTrainer
TRL = DistillationConfig, DistillationTrainer


def trainer(folder: Path, kind: Any = OURS, model: Any = None, **changes: Any) -> Any:
    """Return a trainer whose completions end at different places."""
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 100.0, "temperature": TEMPERATURE}
    peft_config, teacher = changes.pop("peft_config", None), changes.pop("teacher", None)
    config, maker = kind
    return maker(
        small_model(1) if model is None else model,
        small_model(2) if teacher is None else teacher,
        arguments(config, folder, **options | changes),
        train_dataset=prompts(12),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def host_logs(one: Any) -> list[dict[str, float]]:
    """Return what TRL logged at each step."""
    return [
        {name: value for name, value in record.items() if not name.startswith("kdrl/")}
        for record in logs(one)
    ]


def batch(one: Any) -> dict[str, Tensor]:
    """Return a micro-batch of generated completions, some of whose tokens a tool wrote."""
    one.model.train()
    inputs = one._prepare_inputs(next(iter(one.get_train_dataloader())))
    mask = torch.ones_like(inputs["completion_mask"])
    mask[1, :2] = 0
    assert (inputs["completion_mask"].sum(1) < mask.shape[1]).any()
    return inputs | {"tool_mask": mask}


KINDS: dict[str, dict[str, Any]] = {
    "k2": {"kd": "k2"},
    "k2, baseline": {"kd": "k2", "kd_baseline": "kl"},
    "k3": {"kd": "k3"},
    "rkl": {"kd": "rkl"},
    "fkl": {"kd": "fkl"},
    "jsd": {"kd": "jsd", "jsd_alpha": 0.3},
    "rkl+fkl": {"kd": "rkl+fkl", "fkl_share": 0.25},
    "topk_rkl": {"kd": "topk_rkl", "kd_topk": 4},
}


@pytest.mark.parametrize("kd", KINDS)
def test_loss_and_gradients_are_those_of_full_logits(kd: str, tmp_path: Path) -> None:
    one = trainer(tmp_path, **KINDS[kd])
    inputs = batch(one)
    loss = one.compute_loss(one.model, inputs)
    loss.backward()

    student, teacher = small_model(1).double(), small_model(2).double()
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    tokens = inputs["completion_ids"]
    C = tokens.shape[1]

    def log_softmax(model: Any) -> Tensor:
        logits = model(input_ids=ids, attention_mask=attention).logits[:, -C - 1 : -1]
        return (logits / TEMPERATURE).log_softmax(-1)

    logp, logq = log_softmax(student), log_softmax(teacher).detach()
    mask = inputs["completion_mask"] * inputs["tool_mask"]

    def total(kind: str) -> Tensor:
        terms = kd_term(kind, logp, logq, tokens, jsd_alpha=0.3, fkl_share=0.25, topk=4)
        return (terms * mask).sum()

    exact = total(kd) / inputs["num_items_in_batch"]
    exact.backward()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        gradient = one.model.get_parameter(name).grad
        torch.testing.assert_close(gradient.double(), parameter.grad, rtol=1e-4, atol=1e-6)

    log = {name: values[-1] for name, values in one._metrics["train"].items()}
    entropy = -(logp.exp() * logp).sum(-1)
    assert log["entropy"] == pytest.approx((entropy * mask).sum().item() / mask.sum().item(), 1e-5)
    k2 = total("k2") / mask.sum()
    if not kd.startswith("topk"):
        assert log["kdrl/k2"] == pytest.approx(k2.item(), 1e-4)
    name = {"rkl": "kl", "rkl+fkl": "kl", "fkl": "forward_kl", "jsd": "jsd", "k2, baseline": "kl"}
    if kd in name:
        kind = "rkl" if name[kd] == "kl" else kd
        mean = total(kind) / mask.sum()
        assert log[f"kdrl/{name[kd]}"] == pytest.approx(mean.item(), 1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0], ids="beta={}".format)
def test_without_kd_it_learns_as_trl_does(beta: float, tmp_path: Path) -> None:
    results = []
    for kind in (TRL, OURS):
        one = trainer(tmp_path, kind, beta=beta)
        one.train()
        results.append([parameters(one), host_logs(one)])
    assert len(results[0][1]) == 3
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)
    moved = results[0][0]["lm_head.weight"] - small_model(1).lm_head.weight
    assert moved.abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("made", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("student", [True, False])
def test_every_head_learns_as_in_trl(
    made: tuple[str, dict[str, Any]], student: bool, tmp_path: Path
) -> None:
    results = []
    for kind in (TRL, OURS):
        special = family(made[0], **made[1])
        models = {"model": special} if student else {"teacher": special}
        one = trainer(tmp_path, kind, **models, beta=0.5, max_steps=2)
        one.train()
        results.append([parameters(one), host_logs(one)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_lora_learns_as_in_trl(tmp_path: Path) -> None:
    results = []
    for kind in (TRL, OURS):
        lora = peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4, lora_dropout=0.0)
        one = trainer(tmp_path, kind, peft_config=lora)
        one.train()
        results.append([parameters(one), host_logs(one)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


def test_evaluation_takes_the_mean_over_the_batch_as_trl_does(tmp_path: Path) -> None:
    results = []
    for kind in (TRL, OURS):
        one = trainer(tmp_path, kind)
        one.eval_dataset = prompts()
        results.append(one.evaluate())
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-5)
    assert results[1]["eval_kdrl/kl"] == pytest.approx(results[0]["eval_loss"], rel=1e-5)


def test_another_teacher_has_another_gradient(tmp_path: Path) -> None:
    one = trainer(tmp_path, kd="k2")
    inputs, gradients = batch(one), []
    for seed in (2, 3, 2):
        one.teacher_model.load_state_dict(small_model(seed).state_dict())
        one.model.zero_grad()
        one.compute_loss(one.model, inputs).backward()
        gradients.append(one.model.lm_head.weight.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[2], rtol=0, atol=0)


@pytest.mark.parametrize("kd", ["k2", "rkl", "topk_fkl"])
def test_a_batch_without_a_token_to_distil_gives_zero(kd: str, tmp_path: Path) -> None:
    one = trainer(tmp_path, kd=kd)
    inputs = batch(one)
    loss = one.compute_loss(
        one.model, inputs | {"tool_mask": torch.zeros_like(inputs["tool_mask"])}
    )
    loss.backward()
    assert loss.item() == 0
    assert not any(parameter.grad.any() for parameter in one.model.parameters())


def test_each_micro_batch_has_its_sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, drawn, items = distillation.one_pass, [], []

    def spy(terms: Any, *arguments: Any) -> kk.LossOutput:
        drawn.append(terms.sketch)
        items.append(terms.token_weights.max().item())
        return original(terms, *arguments)

    monkeypatch.setattr(distillation, "one_pass", spy)
    one = trainer(tmp_path, kd="rkl", head_backward="sketch", sketch_threshold=2**-6, max_steps=2)
    one.train()
    assert [(sketch.threshold, sketch.rows) for sketch in drawn] == [(2**-6, 0)] * 4
    assert [sketch.seed - drawn[0].seed for sketch in drawn] == [0, 1, 1 << 16, (1 << 16) + 1]
    assert [sketch.scale for sketch in drawn] == items  # the largest coefficient of a row's KL
    assert "kdrl/sketch_noise" in one.state.log_history[0]


def test_the_sketch_has_the_loss_of_the_exact_gradient(tmp_path: Path) -> None:
    one = trainer(tmp_path, kd="rkl")
    inputs = batch(one)
    exact = one.compute_loss(one.model, inputs)
    one.args.head_backward = "sketch"
    torch.testing.assert_close(one.compute_loss(one.model, inputs), exact, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kd": "k1"}, "kd must not be 'k1'"),
        ({"kd": "kl"}, "kd must be one of"),
        ({"kd": "rkl", "beta": 0.5}, "beta must be left at 1.0 with kd='rkl', got 0.5"),
        ({"jsd_alpha": 0.3}, "kd must be set with jsd_alpha=0.3, got None"),
        ({"kd": "rkl", "jsd_alpha": 0.3}, "jsd_alpha must be 0.5 for kd='rkl', got 0.3"),
        ({"kd": "jsd", "jsd_alpha": 1.0}, "jsd_alpha must be in (0, 1), got 1.0"),
        ({"kd": "rkl", "fkl_share": 0.3}, "fkl_share must be 0.5 for kd='rkl', got 0.3"),
        ({"kd": "k2", "k3_bound": 5.0}, "k3_bound must be 20.0 for kd='k2', got 5.0"),
        ({"kd": "rkl", "kd_baseline": "kl"}, "kd_baseline must be None for kd='rkl'"),
        ({"kd": "rkl", "tail": False}, "tail must be True for kd='rkl', got False"),
        ({"kd": "topk_rkl", "kd_topk": 0}, "kd_topk must be in 1 to 512, got 0"),
        ({"head_backward": "no"}, "head_backward must be one of"),
        ({"sketch_threshold": 0.1}, "head_backward must be 'sketch' with sketch_threshold=0.1"),
        ({"head_backward": "sketch", "sketch_threshold": 2.0}, "threshold must be in"),
    ],
    ids=str,
)
def test_options_that_cannot_be_right_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        arguments(KdrlDistillationConfig, tmp_path, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_trainer_without_a_teacher_or_with_anothers_arguments_is_refused(tmp_path: Path) -> None:
    args = arguments(KdrlDistillationConfig, tmp_path)
    with pytest.raises(ValueError, match="teacher_model must be a model, its folder or its id"):
        KdrlDistillationTrainer(small_model(1), None, args)
    with pytest.raises(ValueError, match="KdrlTrainer takes the URL of a teacher"):
        KdrlDistillationTrainer(small_model(1), "http://teacher:8000", args)
    with pytest.raises(TypeError, match="args must be a KdrlDistillationConfig"):
        KdrlDistillationTrainer(
            small_model(1), small_model(2), arguments(DistillationConfig, tmp_path)
        )


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    small_model(2).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    student, args = small_model(1), arguments(KdrlDistillationConfig, tmp_path)
    more = {"train_dataset": prompts(), "processing_class": tokenizer()}
    KdrlDistillationTrainer(student, str(folder), args, **more)
    file = folder / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"a":', '"aa":'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must have the student's tokenizer, got another: token"):
        KdrlDistillationTrainer(student, str(folder), args, **more)


def test_a_sketch_under_zero3_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"'exact', .* ZeRO-3, got 'sketch' and no adapter"):
        trainer(tmp_path, head_backward="sketch")

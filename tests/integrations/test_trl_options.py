"""KdrlTrainer's options: what a teacher, a sketch, masks and metrics do; what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("trl")

from trl import GRPOConfig

import kdrl_kernels as kk
from kdrl_kernels.integrations.trl import KdrlTrainer
from tests.integrations.trl_micro_batches import (
    BETA,
    LENGTHS,
    B,
    C,
    V,
    assert_same_gradient,
    distance,
    gradient_of,
    logits_of,
    loss_and_gradient,
    micro_batch,
    trainer_in_a_step,
)
from tests.integrations.trl_runs import OLD_NAMES, arguments, small_model, trainer_of

pytestmark = pytest.mark.filterwarnings(OLD_NAMES)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
@pytest.mark.parametrize("kd", ["k2", "rkl"])
def test_only_the_teacher_changes_the_gradient(tmp_path: Path, loss_type: str, kd: str) -> None:
    def gradient(teacher: Any, **options: Any) -> dict[str, Tensor]:
        trainer = trainer_in_a_step(tmp_path, teacher, loss_type=loss_type, **options)
        return loss_and_gradient(trainer, on_policy=True)[1]

    alone = gradient(None, kd=None)
    itself = gradient(small_model(1).double(), kd=kd)
    first, second = (gradient(small_model(seed).double(), kd=kd) for seed in (2, 3))
    size = max(x.abs().max().item() for x in alone.values())
    assert distance(itself, alone) < 1e-9 * size  # log p = log q
    assert distance(first, alone) > 1e-2 * size
    assert distance(first, second) > 1e-2 * size
    off = gradient(small_model(2).double(), kd=kd, kd_coef=0.0)
    assert distance(off, alone) < 1e-12 * size


@pytest.mark.parametrize(("topk", "exact"), [("topk_rkl", "rkl"), ("topk_fkl", "fkl")])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_all_tokens_make_a_topk_divergence_exact(
    tmp_path: Path, topk: str, exact: str, loss_type: str
) -> None:
    def run(kd: str, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        teacher = small_model(2).double()
        return loss_and_gradient(
            trainer_in_a_step(tmp_path, teacher, loss_type=loss_type, kd=kd, **options)
        )

    loss, gradient = run(topk, kd_topk=V)
    expected, full = run(exact)
    assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    assert_same_gradient(gradient, full)
    fewer, _ = run(topk, kd_topk=4)
    assert abs(fewer - expected) > 1e-3 * abs(expected)


@pytest.mark.parametrize("delta", [1.3, 4.0])
def test_two_sided_clipping_takes_one_pass(tmp_path: Path, delta: float) -> None:
    trainer = trainer_in_a_step(tmp_path, None, kd=None, loss_type="grpo", delta=delta)
    assert trainer.one_pass
    loss, gradient = loss_and_gradient(trainer)
    trainer.__class__ = type("Slow", (KdrlTrainer,), {"one_pass": False})
    expected, full = loss_and_gradient(trainer)
    assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    assert_same_gradient(gradient, full)


def test_a_bound_inside_the_clip_range_does_not(tmp_path: Path) -> None:
    assert not trainer_in_a_step(tmp_path, None, kd=None, loss_type="grpo", delta=1.1).one_pass


@pytest.mark.parametrize(
    ("bound", "finite"), [({"epsilon_high": math.inf}, 1e9), ({"delta": math.inf}, None)]
)
def test_an_infinite_bound_is_none(
    tmp_path: Path, bound: dict[str, float], finite: float | None
) -> None:
    options = {"loss_type": "grpo", "kd": None}
    loss, gradient = loss_and_gradient(trainer_in_a_step(tmp_path, None, **options | bound))
    same = dict.fromkeys(bound, finite)
    expected, full = loss_and_gradient(trainer_in_a_step(tmp_path, None, **options | same))
    assert_close(loss, expected, rtol=1e-6, atol=1e-9)
    assert_same_gradient(gradient, full)


def test_padding_and_tool_tokens_cost_nothing(tmp_path: Path) -> None:
    trainer = trainer_in_a_step(tmp_path, small_model(2).double(), kd="rkl")
    inputs = micro_batch(trainer.model)
    trainer._compute_loss(trainer.model, inputs)
    used = (inputs["completion_mask"] * inputs["tool_mask"]).sum()
    assert 0 < used < sum(c for _, c in LENGTHS)
    assert trainer._student_head.metrics["tokens"] == used
    assert trainer._student_head.metrics["kd_tokens"] == used


def test_metrics_are_means_over_the_distilled_tokens(tmp_path: Path) -> None:
    teacher = small_model(2).double()
    trainer = trainer_in_a_step(tmp_path, teacher, kd="rkl", loss_type="dapo")
    inputs = micro_batch(trainer.model)
    trainer._compute_loss(trainer.model, inputs)
    with torch.no_grad():
        p, q = (logits_of(m, inputs).log_softmax(-1) for m in (trainer.model, teacher))
    used = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    log_ratio = (p - q).gather(-1, inputs["completion_ids"][..., None])[..., 0][used]
    kl = (p.exp() * (p - q)).sum(-1)[used]
    advantages = inputs["advantages"][:, None].expand(B, C)[used]
    flipped = (advantages * (advantages - BETA * log_ratio) < 0).double()
    expected = {
        "teacher_log_ratio": log_ratio,
        "k2": log_ratio.square() / 2,
        "kl": kl,
        "kd_flipped": flipped,
    }
    logged = {k.removeprefix("kdrl/"): v for k, v in trainer._metrics["train"].items()}
    for name, values in expected.items():
        assert logged[name] == [pytest.approx(values.mean().item(), rel=1e-6)], name
    assert logged["kd_coef"] == [BETA]
    host = {name for name in trainer._metrics["train"] if not name.startswith("kdrl/")}
    assert {"entropy", "clip_ratio/region_mean"} <= host


class RoundedModel:
    """Stands for FSDP2 with mixed precision, which rounds what a forward returns to bfloat16."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        for name in ("loss", "log_probs", "entropy"):
            if output.get(name) is not None:
                output[name] = output[name].bfloat16()
        return output


@pytest.mark.parametrize(("loss_type", "tolerance"), [("dapo", 1e-9), ("cispo", 1e-2)])
def test_a_wrapper_that_rounds_outputs(tmp_path: Path, loss_type: str, tolerance: float) -> None:
    trainer = trainer_in_a_step(tmp_path, small_model(2).double(), kd="k2", loss_type=loss_type)
    model, inputs = trainer.model, micro_batch(trainer.model)
    exact = trainer._compute_loss(model, inputs)
    metrics = dict(trainer._metrics["train"])
    trainer._metrics["train"].clear()
    loss = trainer._compute_loss(RoundedModel(model), inputs)
    assert_close(loss, exact, rtol=1e-9, atol=0)
    assert trainer._metrics["train"] == metrics
    ours, expected = gradient_of(model, loss), gradient_of(model, exact)
    for name, gradient in expected.items():
        close = {"rtol": tolerance, "atol": tolerance * gradient.abs().max().item()}
        assert_close(ours[name], gradient, **close)


def test_old_logprobs_are_not_rounded_either(tmp_path: Path) -> None:
    trainer = trainer_in_a_step(tmp_path, None, kd=None)
    inputs = micro_batch(trainer.model)
    trainer.model_wrapped = RoundedModel(trainer.model)
    columns = [
        torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], 1) for x in ("ids", "mask")
    ]
    with torch.no_grad():
        exact, rounded = (
            trainer._get_per_token_logps_and_entropies(model, *columns, C)[0]
            for model in (trainer.model, trainer.model_wrapped)
        )
    assert_close(rounded, exact, rtol=0, atol=0)


@pytest.mark.parametrize(("loss_type", "share"), [("dapo", 1), ("grpo", 1 / 2), ("sapo", 1 / 2)])
def test_evaluation_has_no_gradient_and_metrics_of_its_own(
    tmp_path: Path, loss_type: str, share: float
) -> None:
    trainer = trainer_in_a_step(tmp_path, small_model(2).double(), kd="k2", loss_type=loss_type)
    inputs = micro_batch(trainer.model)
    of_a_step = trainer._compute_loss(trainer.model, inputs)  # of two micro-batches
    trainer._metrics["train"].clear()
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer._compute_loss(trainer.model, inputs)
    assert not loss.requires_grad
    assert_close(loss * share, of_a_step.detach(), rtol=1e-6, atol=0)
    assert trainer._metrics["eval"]["kdrl/k2"]
    assert not trainer._metrics["train"]


def test_a_micro_batch_without_a_token(tmp_path: Path) -> None:
    for loss_type in ("dapo", "cispo"):
        trainer = trainer_in_a_step(
            tmp_path, small_model(2).double(), kd="rkl", loss_type=loss_type
        )
        inputs = micro_batch(trainer.model, tools=False)
        inputs["completion_mask"] = torch.zeros_like(inputs["completion_mask"])
        loss = trainer._compute_loss(trainer.model, inputs)
        gradient = gradient_of(trainer.model, loss)
        assert loss.item() == 0
        assert all(not x.any() for x in gradient.values())


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
def test_a_sketch_is_unbiased_and_keeps_the_loss(
    tmp_path: Path, loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = KdrlTrainer._sketch
    monkeypatch.setattr(  # with so few columns every row would be too flat to be sketched
        KdrlTrainer, "_sketch", lambda self, terms: replace(inner(self, terms), flat=math.inf)
    )
    teacher, draws = small_model(2).double(), 30
    expected, exact = loss_and_gradient(
        trainer_in_a_step(tmp_path, teacher, kd="k2", loss_type=loss_type)
    )
    sketch = {"head_backward": "sketch", "sketch_threshold": 0.25}
    trainer = trainer_in_a_step(tmp_path, teacher, kd="k2", loss_type=loss_type, **sketch)
    total = {name: torch.zeros_like(x) for name, x in exact.items()}
    distances = []
    for trainer.state.global_step in range(draws):
        loss, gradient = loss_and_gradient(trainer)
        assert_close(loss, expected, rtol=1e-9, atol=0)
        distances.append(distance(gradient, exact))
        total = {name: total[name] + gradient[name] / draws for name in exact}
    mean = sum(distances) / draws
    assert mean > 1e-2 * max(x.abs().max().item() for x in exact.values())
    assert distance(total, exact) < mean / 2.5
    if loss_type == "dapo":
        assert trainer._metrics["train"]["kdrl/sketch_noise"][-1] > 0


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
@pytest.mark.parametrize("kd_coef", [None, 0.0])
def test_a_sketch_without_a_teacher(tmp_path: Path, loss_type: str, kd_coef: float | None) -> None:
    sketch: dict[str, Any] = {"head_backward": "sketch", "loss_type": loss_type}
    more = {"kd": None} if kd_coef is None else {"kd": "k2", "kd_coef": kd_coef}
    teacher = None if kd_coef is None else small_model(2).double()
    loss, _ = loss_and_gradient(trainer_in_a_step(tmp_path, teacher, **sketch, **more))
    plain = trainer_in_a_step(tmp_path, None, kd=None, loss_type=loss_type)
    assert_close(loss, loss_and_gradient(plain)[0], rtol=1e-9, atol=0)


def test_no_other_micro_batch_has_the_same_sketch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = KdrlTrainer._sketch
    monkeypatch.setattr(
        KdrlTrainer, "_sketch", lambda self, terms: replace(inner(self, terms), flat=math.inf)
    )
    sketch = {"head_backward": "sketch", "sketch_threshold": 0.25}
    trainer = trainer_in_a_step(tmp_path, None, kd=None, **sketch)

    def gradient(micro_batches: int, steps: int) -> dict[str, Tensor]:
        trainer._step, trainer.state.global_step = micro_batches, steps
        return loss_and_gradient(trainer)[1]

    first = gradient(0, 0)
    size = 1e-3 * max(x.abs().max().item() for x in first.values())
    assert distance(gradient(0, 0), first) == 0
    assert distance(gradient(2, 0), first) == 0  # a resumed run counts micro-batches from 0
    assert distance(gradient(1, 0), first) > size
    assert distance(gradient(2, 1), first) > size
    assert distance(gradient(2, 1), gradient(1, 0)) > size


REFUSED: list[tuple[Callable[[Path], Any], str]] = [
    (
        lambda f: trainer_in_a_step(f, None, kd="k2"),
        "teacher_model must be set with kd='k2', got None",
    ),
    (
        lambda f: trainer_in_a_step(f, small_model(2), kd=None),
        "teacher_model must be None with kd=None",
    ),
    (
        lambda f: trainer_of(KdrlTrainer, arguments(GRPOConfig, f)),
        "args must be a KdrlConfig, got GRPOConfig: it takes all arguments of GRPOConfig",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


def test_objective_of_the_arguments(tmp_path: Path) -> None:
    trainer = trainer_in_a_step(
        tmp_path, small_model(2).double(), kd="fkl", loss_type="dapo", delta=3.0
    )
    assert trainer._objective(distil=True) == kk.Objective(
        clip_low=0.1, clip_high=0.15, dual_clip=3.0, kd="fkl", kd_coef=1.0
    )

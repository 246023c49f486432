"""method_loss: the gradient of every method against full logits in float64."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_train.batch import CompletionCoefficients, Rollouts
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.method.metrics import token_means
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.method_loss import LossOfRows, objective
from kdrl_train.model.packing import PackedBatch, pack
from kdrl_train.model.policy import Policy, Teacher, token_sums
from kdrl_train.step.gradient_split import gradient_split
from tests.tolerance import relative_error
from tests.train import own_losses
from tests.train.coefficients import uniform
from tests.train.model.test_policy import pair, some_rollouts, step_gradient

H, V = 5, 11
LENGTHS = (3, 1, 4)
KD = ScheduleConfig(initial=0.3, final=0.3)
HERE = own_losses.__name__
Values = dict[str, Tensor]


def rollouts_of(draw: torch.Generator) -> Rollouts:
    ids = [torch.randint(V, (n,), generator=draw) for n in LENGTHS]
    return Rollouts(
        prompt_ids=[torch.tensor([1, 2])] * len(ids),
        completion_ids=ids,
        logprobs=[torch.full((n,), -2.0) for n in LENGTHS],
        truncated=torch.zeros(len(ids), dtype=torch.bool),
        texts=[""] * len(ids),
    )


def problem(prefix: float = 1.0) -> tuple[PackedBatch, list[Tensor], kk.TeacherHead]:
    """A pack of three completions, off-policy; hidden states and a head; a teacher's."""
    draw = torch.Generator().manual_seed(7)
    rollouts = rollouts_of(draw)
    old = {r: -1.5 - torch.rand(n, generator=draw) for r, n in enumerate(LENGTHS)}
    coefficients = CompletionCoefficients(
        advantages=torch.tensor([1.5, -0.7, -1.2]),
        kd_weight=torch.tensor([0.3, 0.0, 0.5]),
        token_weights=torch.tensor([1 / 3, 1.0, 1 / 4]),
        old_logprobs=old,
        kd_prefix=prefix,
    )
    (batch,) = pack(rollouts, coefficients, 1000)
    batch.token_weights[5] = 0  # as the sampler's correction may; it stays in its completion's mean
    N = sum(LENGTHS)
    shapes = ((N, H), (V, H), (N, H), (V, H))
    hidden, weight, *others = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes
    )
    return batch, [hidden.requires_grad_(), weight.requires_grad_()], kk.TeacherHead(*others)


def by_logits(
    batch: PackedBatch, leaves: list[Tensor], teacher: kk.TeacherHead, loss: Callable[..., Tensor]
) -> list[Tensor]:
    """Value and gradients of a loss of each token, by autograd through all logits."""
    hidden, weight = leaves
    logp = (hidden @ weight.T).log_softmax(dim=1)
    logq = (teacher.hidden @ teacher.weight.T).log_softmax(dim=1)
    at = batch.tokens[:, None]
    lp, lq = (x.gather(1, at).squeeze(1) for x in (logp, logq))
    values = {
        "lp": lp,
        "ratio": (lp - batch.old_logprobs).exp(),
        "log_ratio": lp - batch.old_logprobs,
        "A": batch.advantages.double(),
        "old": batch.old_logprobs.double(),
        "l": lp - lq,
        "kd": batch.kd_weight.double(),
        "entropy": -(logp.exp() * logp).sum(dim=1),
        "kl": (logp.exp() * (logp - logq)).sum(dim=1),
        "s": (lp - batch.old_logprobs).exp().clamp(max=2).detach(),
    }
    total = (batch.token_weights.double() * loss(values)).sum() / 3
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def ours(
    method: MethodConfig, batch: PackedBatch, leaves: list[Tensor], teacher: kk.TeacherHead | None
) -> tuple[list[Tensor], kk.LossOutput]:
    distil = method.kd is not None and teacher is not None
    head: dict[str, Any] = {
        "token_weights": batch.token_weights,
        "teacher": teacher if distil else None,
        "normalizer": 3.0,
        "entropy": True,
    }
    goal = objective(method, distil=distil)
    loss = LossOfRows.of(method)
    assert loss is not None
    out = loss(*leaves, batch, goal, head)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)], out


def completions(values: Tensor) -> list[Tensor]:
    return list(values.split(LENGTHS))


def at_tokens(of_completion: list[Tensor]) -> Tensor:
    return torch.cat([x.expand(n) for x, n in zip(of_completion, LENGTHS, strict=True)])


def clip(v: Values, low: float = 0.2, high: float = 0.2) -> Tensor:
    return -torch.minimum(v["ratio"] * v["A"], v["ratio"].clamp(1 - low, 1 + high) * v["A"])


def cispo(v: Values) -> Tensor:
    value = v["ratio"].detach().clamp(0.5, 1.5) * v["A"]
    return -value * (1 + v["lp"] - v["lp"].detach())


def dppo(v: Values) -> Tensor:
    moved = (v["lp"].exp() - v["old"].exp()).detach()
    kept = torch.where(v["A"] > 0, moved <= 0.03, moved >= -0.03)
    return -v["ratio"] * v["A"] * kept


def gspo(v: Values) -> Tensor:
    """By the ratios of the completions themselves: 1 / T is in the weights of tokens."""
    s = at_tokens([x.mean().exp() for x in completions(v["log_ratio"])])
    return -torch.minimum(s * v["A"], s.clamp(0.6, 1.4) * v["A"])


def gmpo(v: Values) -> Tensor:
    sign, bounded = v["A"].sign(), v["log_ratio"].clamp(math.log(0.6), math.log(1.4))
    c = sign * torch.minimum(sign * v["log_ratio"], sign * bounded)
    return -v["A"] * at_tokens([x.mean().exp() for x in completions(c)])


def with_k2(kept: Callable[[Values], Tensor]) -> Callable[[Values], Tensor]:
    return lambda v: clip(v) + v["kd"] * v["s"] * kept(v) * v["l"].square() / 2


def tanh(v: Values) -> Tensor:
    pull = 0.7 * (v["l"].detach() / 0.7).tanh()
    k2 = pull.square() / 2 + pull * (v["lp"] - v["lp"].detach())
    return clip(v) + v["kd"] * v["s"] * k2


BY_COMPLETION: dict[str, Any] = {
    "clip_low": 0.4,
    "clip_high": 0.4,
    "token_weights": "sequence_mean",
}
METHODS: dict[str, tuple[MethodConfig, Callable[[Values], Tensor]]] = {
    "cispo": (MethodConfig(kd=None, policy="cispo", clip_low=0.5, clip_high=0.5), cispo),
    "dppo": (MethodConfig(kd=None, policy="dppo", clip_low=0.03, clip_high=0.03), dppo),
    "gspo": (MethodConfig(kd=None, policy="gspo", **BY_COMPLETION), gspo),
    "gmpo": (MethodConfig(kd=None, policy="gmpo", **BY_COMPLETION), gmpo),
    "tanh": (MethodConfig(kd_tanh=0.7), tanh),
    "sign gate": (MethodConfig(kd_sign_gate=True), with_k2(lambda v: v["A"] * v["l"] <= 0)),
    "entropy": (MethodConfig(kd_min_entropy=1.2), with_k2(lambda v: v["entropy"] >= 1.2)),
    "disagreement": (MethodConfig(kd_min_log_ratio=1.0), with_k2(lambda v: v["l"].abs() >= 1)),
    "gspo, exact kl, entropy": (
        MethodConfig(kd="rkl", policy="gspo", entropy_coef=0.1, kd_sign_gate=True, **BY_COMPLETION),
        lambda v: (
            gspo(v) + v["kd"] * v["s"] * (v["A"] * v["l"] <= 0) * v["kl"] - 0.1 * v["entropy"]
        ),
    ),
    "own": (MethodConfig(loss=f"{HERE}:kdrl"), with_k2(lambda v: torch.ones_like(v["l"]))),
}


@pytest.mark.parametrize("name", METHODS)
def test_gradient_is_that_of_all_logits(name: str) -> None:
    method, formula = METHODS[name]
    batch, leaves, teacher = problem()
    exact = by_logits(batch, leaves, teacher, formula)
    plain = by_logits(batch, leaves, teacher, clip)
    results, out = ours(method, batch, leaves, teacher)
    for value, expected in zip(results, exact, strict=True):
        assert relative_error(value, expected) <= 1e-6  # coefficients are float32 in a pack
    assert relative_error(exact[1], plain[1]) > 1e-2  # another gradient than without the setting
    metrics = token_means(token_sums(out, batch))
    assert metrics["entropy"] == pytest.approx(out.entropy.sum().item() / 7, rel=1e-6)
    assert (metrics["clip_fraction"] is None) == (name == "own")
    if method.selects_tokens:
        assert 0 < metrics["kd_selected"] <= 1
        assert (metrics["kd_selected"] < 1) == (name != "tanh")
    assert metrics["kd_share"] == (0 if method.kd is None else 6 / 7)


@pytest.mark.parametrize("name", METHODS)
def test_a_pack_without_tokens_has_no_gradient(name: str) -> None:
    """As a rank gets one whose turns end before those of the others, with a teacher or without."""
    method, _ = METHODS[name]
    batch, (hidden, weight), teacher = problem()
    none = {
        field.name: value[:0]
        for field in fields(batch)
        if isinstance(value := getattr(batch, field.name), Tensor) and len(value) == 8
    }
    empty = hidden.detach()[:0].requires_grad_()
    for head in (replace(teacher, hidden=teacher.hidden[:0]), None):
        results, out = ours(method, replace(batch, **none), [empty, weight], head)
        assert [len(out.logprobs), *(x.abs().sum().item() for x in results)] == [0, 0, 0, 0]


def test_another_teacher_is_another_gradient() -> None:
    method, _ = METHODS["own"]
    batch, leaves, teacher = problem()
    first, _ = ours(method, batch, leaves, teacher)
    second, _ = ours(method, batch, leaves, replace(teacher, hidden=teacher.hidden.flip(1)))
    assert relative_error(first[1], second[1]) > 1e-2


@pytest.mark.parametrize(
    ("prefix", "first"), [(0.5, (2, 0, 2)), (0.3, (1, 0, 2)), (1.0, (3, 0, 4))]
)
def test_the_first_tokens_of_a_completion_are_distilled(
    prefix: float, first: tuple[int, int, int]
) -> None:
    """Of the lengths 3, 1 and 4; the second completion has kd weight 0."""
    batch, _, _ = problem(prefix)
    used = [part != 0 for part in completions(batch.kd_weight)]
    assert [int(part.sum()) for part in used] == list(first)
    for part in used:
        assert part.tolist() == sorted(part.tolist(), reverse=True)


def test_a_share_that_rounding_moves_up_is_no_token_more() -> None:
    rollouts = rollouts_of(torch.Generator().manual_seed(0))
    hundred = torch.zeros(100, dtype=torch.int64)
    rollouts.completion_ids[0], rollouts.logprobs[0] = hundred, torch.zeros(100)
    ones = torch.ones(3)
    (batch,) = pack(rollouts, uniform(3, kd_weight=ones, kd_prefix=0.07), 1000)  # 7.000000000000001
    assert int(batch.kd_weight[:100].sum()) == 7


OLD = {r: torch.full((n,), -4.0) for r, n in enumerate((4, 9, 1, 5, 6, 2))}
SAME = {
    "kdrl": (MethodConfig(kd_coef=KD), MethodConfig(kd_coef=KD, loss=f"{HERE}:kdrl")),
    "mixture": (
        MethodConfig(kd="rkl+fkl", kd_coef=KD, entropy_coef=0.01, kd_mask="wrong"),
        MethodConfig(kd="rkl+fkl", kd_coef=KD, kd_mask="wrong", loss=f"{HERE}:mixture"),
    ),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "off-policy"])
def test_a_loss_of_ones_own_learns_what_the_built_in_one_learns(
    tiny: Callable[..., Any], name: str, old: dict[int, Tensor] | None
) -> None:
    """Also where some packs have no distilled token, so that the teacher does not run."""
    results = []
    for method in SAME[name]:
        policy, teacher = pair(tiny, method, torch.float64, "qwen2", initializer_range=0.05)
        results.append(step_gradient(policy, teacher, method, 12, old_logprobs=old))
    (loss, gradients, metrics), (users, users_gradients, users_metrics) = results
    torch.testing.assert_close(users, loss, rtol=1e-12, atol=1e-12)
    for theirs, expected in zip(users_gradients, gradients, strict=True):
        torch.testing.assert_close(theirs, expected, rtol=1e-8, atol=1e-12)
    without = {"clip_fraction": None, "kd_flip_share": None}
    assert users_metrics == {k: v and pytest.approx(v) for k, v in metrics.items()} | without


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_completions_may_be_packed_in_any_way(tiny: Callable[..., Any], name: str) -> None:
    method = PRESETS[name]
    policy, _ = pair(tiny, method, torch.float64, "qwen2", initializer_range=0.05)
    near = {r: x + 1e-3 * r - 1.56 for r, x in OLD.items()}  # about log 258
    packed = [step_gradient(policy, None, method, n, old_logprobs=near) for n in (1, 1000)]
    (loss, gradients, metrics), (whole, whole_gradients, whole_metrics) = packed
    torch.testing.assert_close(loss, whole)
    for part, expected in zip(gradients, whole_gradients, strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-8, atol=1e-12)
    assert metrics["clip_fraction"] == whole_metrics["clip_fraction"] > 0


def test_gradients_of_reward_and_distillation_are_split(tiny: Callable[..., Any]) -> None:
    """Their sum is the gradient of the whole; a loss of one's own has no parts."""
    method = MethodConfig(policy="cispo", kd_coef=KD, kd_min_log_ratio=0.5)
    rollouts, _ = some_rollouts()
    fields = {"advantages": torch.tensor([1.0, -1, 0, 1, 0, 2]), "kd_weight": torch.full((6,), 0.3)}
    (batch,) = pack(rollouts, uniform(6, old_logprobs=OLD, **fields), 1000)
    norms = {}
    for name, one in {
        "both": method,
        "rl": replace(method, kd=None, kd_min_log_ratio=0.0),
        "own": MethodConfig(loss=f"{HERE}:kdrl"),
    }.items():
        policy, _ = pair(tiny, one, torch.float64, "qwen2")
        teacher = Teacher(tiny("llama", seed=2, hidden=48).double(), compute_dtype=torch.float64)
        split = gradient_split(policy, batch, torch.tensor(27.0), teacher(batch))
        norms[name] = split
    assert norms["both"]["rl_grad_norm"] == pytest.approx(norms["rl"]["rl_grad_norm"])
    assert norms["both"]["kd_grad_norm"] > 0
    assert norms["both"]["rl_kd_cosine"] is not None
    assert set(norms["own"].values()) == {None}


def test_a_sketched_head_has_the_same_loss(tiny: Callable[..., Any]) -> None:
    """At a sketch that keeps every entry the gradient is that of the exact one, too."""
    method, losses = MethodConfig(policy="gspo", kd_coef=KD), []
    for sketch in (None, kk.Sketch(threshold=2.0**-24, flat=math.inf)):
        model = tiny("qwen2", seed=1, initializer_range=0.05)
        policy = Policy(model, method, sketch=sketch)
        teacher = Teacher(tiny("llama", seed=2, hidden=48))
        loss, gradients, _ = step_gradient(policy, teacher, method, 1000, old_logprobs=OLD)
        losses.append((loss, torch.cat([g.flatten() for g in gradients])))
    (exact, gradient), (sketched, other) = losses
    assert sketched == exact
    assert relative_error(other, gradient) < 1e-4

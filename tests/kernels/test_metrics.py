"""LossOutput.metrics holds sums and counts that match plain formulas; mean_metrics divides them."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels.metrics import sum_dtype
from kdrl_kernels.objective import kd_pull, sampled_kd
from kdrl_kernels.rows import load
from kdrl_kernels.token_rows import Rows
from tests.kernels.params import F32, F64, IMPLS, KDS, quick_or_slow
from tests.kernels.problem import Problem, make_problem

COUNTS = ("tokens", "gradient_rows", "bad_tokens", "clipped", "kd_tokens", "kd_flipped")
CASES: dict[str, dict[str, Any]] = {
    **{f"kd_{kd}": {"kd": kd, "objective": {"kd_coef": 3.0}} for kd in KDS},
    "baseline": {"kd": "k2", "objective": {"kd_baseline": "kl"}},
    "mixture": {"kd": "rkl+fkl", "objective": {"kd_coef": 3.0, "fkl_share": 0.2}},
    "server": {"kd": "k2", "server": True},
    "k3_server": {"kd": "k3", "server": True},
    "policy_none": {"kd": "rkl", "objective": {"policy": "none"}},
    "policy_off": {"kd": "rkl", "objective": {"policy": "off"}},
    "dual_clip": {"kd": "k2", "objective": {"dual_clip": 1.5}},
    "entropy": {"kd": None, "entropy": True},
    "entropy_bonus": {"kd": "fkl", "objective": {"entropy_coef": 0.1}},
    "on_policy": {"kd": "k2", "off_policy": False},
}


def _solve(problem: Problem, impl: str = "torch", **options: Any) -> kk.LossOutput:
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher)
    options = {**problem.options, "teacher": teacher, "impl": impl, **options}
    return kk.kdrl_loss(tokens=problem.tokens, **problem.student, **options)


def _clips(objective: kk.Objective, ratio: float, advantage: float) -> bool:
    """Say whether the ratio is outside the bound of its advantage's sign."""
    if advantage > 0:
        return ratio > 1 + objective.clip_high
    dual = math.inf if objective.dual_clip is None else objective.dual_clip
    return advantage < 0 and (ratio < 1 - objective.clip_low or ratio > dual)


def _pull(objective: kk.Objective, log_ratio: float, kl: float) -> float:
    """Return the derivative of the sampled KD term in log p."""
    if objective.kd == "rkl+fkl":
        share = objective.fkl_share
        return share * -math.expm1(-log_ratio) + (1 - share) * log_ratio
    if objective.kd in ("k3", "fkl"):
        return -math.expm1(-log_ratio)
    return log_ratio - (kl if objective.kd_baseline else 0.0)


def _plain_metrics(problem: Problem, result: kk.LossOutput) -> dict[str, float]:
    """Compute the metrics by their definition: a loop over rows in Python's float64."""
    objective, options, N = problem.options["objective"], problem.options, len(problem.tokens)

    def at(tensor: Tensor | None, n: int, missing: float = 0.0) -> float:
        return missing if tensor is None else tensor[n].item()

    def difference(other: Tensor | None, n: int) -> float:  # in the dtype of the log-probabilities
        return 0.0 if other is None else (result.logprobs[n] - other[n]).item()

    used = [n for n in range(N) if options["token_weights"][n] != 0]
    ratios = [math.exp(difference(options.get("old_logprobs"), n)) for n in used]
    sums: dict[str, float] = {"ratio_sum": math.fsum(ratios), "ratio_max": max(ratios)}
    if objective.policy == "clip":
        pairs = zip(used, ratios, strict=True)
        sums["clipped"] = sum(_clips(objective, r, at(options["advantages"], n)) for n, r in pairs)
    if result.entropy is not None:
        sums["entropy_sum"] = math.fsum(result.entropy[n].item() for n in used)
    if objective.kd is None:
        return sums
    weights = {n: at(options["kd_weight"], n) for n in used}
    distilled = [n for n in used if weights[n] > 0]
    log_ratios = {n: difference(result.teacher_logprobs, n) for n in distilled}
    sums["kd_tokens"] = len(distilled)
    sums["teacher_log_ratio_sum"] = math.fsum(log_ratios.values())
    sums["k2_sum"] = math.fsum(x * x / 2 for x in log_ratios.values())
    if objective.kd in ("rkl", "rkl+fkl") or objective.kd_baseline:
        sums["kl_sum"] = math.fsum(at(result.kl, n) for n in distilled)
    if objective.kd != "jsd" and objective.policy != "off":
        flips = 0
        for n, log_ratio in log_ratios.items():
            A = at(options["advantages"], n)
            pull = _pull(objective, log_ratio, at(result.kl, n))
            flips += A * (A - objective.kd_coef * weights[n] * pull) < 0
        sums["kd_flipped"] = flips
    return sums


def _masked(problem: Problem) -> Problem:
    """Mask two rows, one of them full of NaN, and give two used rows no distillation."""
    problem.options["token_weights"][[1, 5]] = 0
    for name in ("advantages", "old_logprobs", "teacher_logprobs"):
        if name in problem.options:
            problem.options[name][5] = math.nan
    if "kd_weight" in problem.options:
        problem.options["kd_weight"][[0, 7]] = 0
        problem.options["kd_weight"][5] = math.nan
    return problem


SLOW = {
    "kd_k3",
    "kd_k3_ratio",
    "kd_fkl",
    "kd_rkl+fkl",
    "k3_server",
    "policy_none",
    "policy_off",
    "on_policy",
}


@pytest.mark.parametrize(("impl", "name"), quick_or_slow(IMPLS, list(CASES), SLOW))
def test_sums_and_counts(impl: str, name: str, device: str) -> None:
    problem = _masked(make_problem(24, device=device, **CASES[name]))
    result = _solve(problem, impl)
    metrics = {key: value.item() for key, value in result.metrics.items()}
    counts = {key: metrics.pop(key) for key in ("tokens", "gradient_rows", "bad_tokens")}
    assert (counts["tokens"], counts["bad_tokens"]) == (22, 0)
    expected = _plain_metrics(problem, result)
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        # ratios are float32 where the loss is; sums of them, and all else, are float64
        bound = 1e-6 if key.startswith("ratio") else 1e-12
        assert metrics[key] == pytest.approx(value, rel=bound, abs=bound), key


@pytest.mark.parametrize("kd", ["k2", "k3", "rkl", "fkl"])
def test_what_is_counted_occurs(kd: str) -> None:
    """The test above compares numbers other than 0."""
    metrics = _solve(_masked(make_problem(24, **CASES[f"kd_{kd}"]))).metrics
    assert 0 < metrics["clipped"] < 22
    assert metrics["kd_tokens"] == 20
    assert 0 < metrics["kd_flipped"] < 20


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    metrics = _solve(make_problem(kd="rkl", dtype=dtype, entropy=True)).metrics
    for name, value in metrics.items():
        assert value.dtype == (torch.int64 if name in COUNTS else torch.float64), name
        assert value.ndim == 0
    assert sum_dtype(torch.device("mps")) == torch.float32


def test_micro_batches_add_up() -> None:
    problem = _masked(make_problem(24, kd="rkl", entropy=True))
    whole = _solve(problem).metrics
    parts = []
    for rows in (slice(0, 7), slice(7, 24)):
        student = {**problem.student, "hidden": problem.student["hidden"][rows]}
        teacher = {**problem.teacher, "hidden": problem.teacher["hidden"][rows]}
        options = {k: v[rows] if isinstance(v, Tensor) else v for k, v in problem.options.items()}
        part = Problem(student, problem.tokens[rows], teacher, options)
        parts.append(_solve(part, normalizer=9.0).metrics)
    for name, value in whole.items():
        pair = parts[0][name], parts[1][name]
        total = torch.maximum(*pair) if name == "ratio_max" else pair[0] + pair[1]
        torch.testing.assert_close(total, value, rtol=1e-6, atol=1e-6)


def test_means() -> None:
    problem = _masked(make_problem(24, kd="rkl", entropy=True))
    sums = _solve(problem).metrics
    means = kk.mean_metrics(sums)
    assert all(value.ndim == 0 for value in means.values())
    assert {k: v.item() for k, v in means.items()} == pytest.approx(
        {
            "ratio_mean": sums["ratio_sum"].item() / 22,
            "ratio_max": sums["ratio_max"].item(),
            "clip_fraction": sums["clipped"].item() / 22,
            "entropy_mean": sums["entropy_sum"].item() / 22,
            "teacher_log_ratio_mean": sums["teacher_log_ratio_sum"].item() / 20,
            "k2_mean": sums["k2_sum"].item() / 20,
            "kl_mean": sums["kl_sum"].item() / 20,
            "kd_flip_fraction": sums["kd_flipped"].item() / 22,
            "tokens": 22,
            "gradient_rows": sums["gradient_rows"].item(),
            "bad_tokens": 0,
        },
        rel=1e-12,
    )


def test_means_are_there_where_their_sums_are() -> None:
    problem = make_problem(kd=None)
    names = {"ratio_mean", "ratio_max", "clip_fraction", "tokens", "gradient_rows", "bad_tokens"}
    assert kk.mean_metrics(_solve(problem).metrics).keys() == names
    result = kk.linear_token_loss(
        tokens=problem.tokens, loss_fn=lambda rows: -rows.logprobs, **problem.student
    )
    counts = {"tokens", "gradient_rows", "bad_tokens"}
    assert kk.mean_metrics(result.metrics).keys() == counts


@pytest.mark.parametrize("rows", ["no rows", "no used rows"])
def test_means_of_nothing_are_0(rows: str) -> None:
    problem = make_problem(0 if rows == "no rows" else 5, kd="rkl", entropy=True)
    problem.options["token_weights"][:] = 0
    means = kk.mean_metrics(_solve(problem, normalizer=1.0).metrics)
    assert len(means) == 11
    assert {k: v.item() for k, v in means.items()} == dict.fromkeys(means, 0)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("kd", ["k2", "k3", "k3_ratio"])
def test_the_pull_is_the_derivative_that_the_row_work_takes(
    kd: Any, impl: str, device: str
) -> None:
    """Eager, Triton and autograd through the value give the pull of kd_pull."""
    log_ratio = torch.tensor([*range(-3, 4), -19.5, -25, -200, 200], device=device).float()
    log_ratio.requires_grad_()
    rows = Rows(log_ratio.detach(), teacher_logprobs=torch.zeros_like(log_ratio))
    objective = kk.Objective(policy="off", kd=kd, kd_coef=1.0)
    losses, coef = load(impl).coefficients(objective, rows, torch.ones_like(rows.logprobs))
    value, pull = sampled_kd(objective, log_ratio), kd_pull(objective, log_ratio).detach()
    torch.testing.assert_close(losses, value.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(coef.logprobs, pull, rtol=1e-5, atol=1e-6)
    (derivative,) = torch.autograd.grad(value.sum(), log_ratio)
    torch.testing.assert_close(derivative, pull, rtol=1e-5, atol=1e-6)
    exact: Any = kk.Objective(kd={"k2": "rkl", "k3": "fkl", "k3_ratio": "rkl"}[kd])
    assert torch.equal(kd_pull(exact, log_ratio), kd_pull(objective, log_ratio))


def test_hand_worked_rows() -> None:
    half = torch.tensor(0.5).log()
    result = kk.kdrl_loss(
        torch.zeros(3, 2),
        torch.eye(2),
        torch.tensor([0, 1, 0]),
        advantages=torch.tensor([1.0, -1.0, 1.0]),
        token_weights=torch.tensor([1.0, 1.0, 0.0]),
        old_logprobs=half - torch.tensor([0.5, 0.25, 1.0]).log(),
        teacher_logprobs=half + torch.tensor([-4.0, 2.0, 0.0]),
        objective=kk.Objective(kd="k2", kd_coef=0.5),
    )
    assert {name: value.item() for name, value in result.metrics.items()} == {
        "tokens": 2,
        "gradient_rows": 0,  # no input requires a gradient
        "bad_tokens": 0,
        "ratio_sum": pytest.approx(0.5 + 0.25),  # p / old, with old = 0.5 / ratio
        "ratio_max": pytest.approx(0.5),
        "clipped": 1,  # A < 0 and ratio below 1 - 0.2; A > 0 is not cut from below
        "kd_tokens": 2,
        "teacher_log_ratio_sum": pytest.approx(4 - 2),
        "k2_sum": pytest.approx(16 / 2 + 4 / 2),
        "kd_flipped": 1,  # 1 - 0.5·4 = -1 flips; -1 - 0.5·(-2) = 0 does not
    }


def test_flips_of_k3_use_its_own_coefficient() -> None:
    """l = 5 pulls by 1 - exp(-5) < 1 under k3, and by 5 under k2."""
    flips = {}
    for kd in ("k2", "k3"):
        result = kk.kdrl_loss(
            torch.zeros(1, 2),
            torch.eye(2),
            torch.tensor([0]),
            advantages=torch.tensor([1.5]),
            teacher_logprobs=torch.tensor([0.5]).log() - 5,
            objective=kk.Objective(kd=kd, kd_coef=1.0),
        )
        flips[kd] = result.metrics["kd_flipped"].item()
    assert flips == {"k2": 1, "k3": 0}


@pytest.mark.parametrize("impl", IMPLS)
def test_a_baseline_changes_the_flips_alone(impl: str, device: str) -> None:
    """p = 1/2 each, q = 1/4 and 3/4: l = log 2 and log 2/3, KL = (log 2 + log 2/3) / 2 = 0.144."""
    teacher = torch.tensor([[1 / 4, 3 / 4]], device=device).log().expand(2, 2)
    eye = torch.eye(2, device=device)
    result = kk.kdrl_loss(
        torch.zeros(2, 2, device=device),
        eye,
        torch.arange(2, device=device),
        advantages=torch.tensor([0.6, -0.3], device=device),
        teacher=kk.TeacherHead(teacher, eye),
        objective=kk.Objective(kd_baseline="kl", kd_coef=1.0),
        impl=impl,
    )
    log_ratios = [math.log(2), math.log(2 / 3)]
    kl = sum(log_ratios) / 2
    assert result.kl.tolist() == pytest.approx([kl, kl])
    assert result.teacher_logprobs.exp().tolist() == pytest.approx([1 / 4, 3 / 4])
    assert result.metrics["kl_sum"].item() == pytest.approx(2 * kl)
    assert result.metrics["teacher_log_ratio_sum"].item() == pytest.approx(2 * kl)
    squares = log_ratios[0] ** 2 + log_ratios[1] ** 2
    assert result.metrics["k2_sum"].item() == pytest.approx(squares / 2)
    # 0.6 - (0.69 - 0.14) does not turn, as it would by l alone; -0.3 - (-0.41 - 0.14) does
    assert result.metrics["kd_flipped"].item() == 1
    # r A = A on-policy, and (l - KL)² / 2 = 0.55² / 2 in both rows
    assert result.loss.item() == pytest.approx(-0.15 + (log_ratios[0] - kl) ** 2 / 2, abs=1e-6)


@pytest.mark.parametrize("compact", [None, False])
@pytest.mark.parametrize(
    ("impl", "kd"), [*product(["reference", "torch"], [None, "k2", "rkl"]), ("triton", "k2")]
)
def test_gradient_rows(impl: str, kd: str | None, compact: bool | None, device: str) -> None:
    """A row has a gradient unless it is clipped or has advantage 0, and has no KD term."""
    problem = make_problem(24, kd=kd, device=device)
    problem.options["advantages"][3:5] = 0
    problem.options["token_weights"][0] = 0
    distilled = torch.zeros(24, dtype=torch.bool, device=device)
    if kd:
        problem.options["kd_weight"][1::2] = 0
        distilled = problem.options["kd_weight"] > 0
    student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher)
    options = problem.options | {"compact": compact, "impl": impl}
    result = kk.kdrl_loss(tokens=problem.tokens, teacher=teacher, **student, **options)
    result.loss.backward()
    A, ratio = options["advantages"], (result.logprobs - options["old_logprobs"]).exp()
    inside = torch.where(A > 0, ratio < 1.2, ratio > 0.8) & (A != 0)
    rows = (inside | distilled) & (options["token_weights"] != 0)
    assert 0 < rows.sum() < 20
    assert result.metrics["gradient_rows"] == (rows.sum() if compact is None else 23)
    assert torch.equal(rows, (student["hidden"].grad != 0).any(dim=1))

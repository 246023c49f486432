"""linear_token_loss matches autograd through full logits in float64, for many losses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import gemm
from tests.kernels.params import F32, F64, IMPL_DTYPES, IMPLS
from tests.kernels.token_losses import (
    CASES,
    UNUSED,
    CallerTensors,
    Case,
    N,
    V,
    call,
    dapo,
    kl_and_entropy,
    make_setup,
    sft,
    smallest_budget,
    solve,
    solve_plainly,
    with_leaves,
)
from tests.tolerance import assert_matches, relative_error


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_matches_autograd_through_full_logits(
    impl: str, dtype: torch.dtype, case: Case, masked: bool, device: str
) -> None:
    setup = make_setup(case, dtype, device, masked=masked)
    ours = solve(setup, impl)
    assert_matches(
        ours,
        lambda dtype: solve_plainly(setup.map(lambda x: x.to(dtype)))[0],
        lambda _: {"loss": solve_plainly(setup.map(Tensor.double))[1]},
    )
    if masked:
        assert torch.equal(ours["dhidden"][UNUSED], torch.zeros_like(ours["dhidden"][UNUSED]))


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_autograd_in_float64(case: Case, masked: bool, impl: str, device: str) -> None:
    setup = make_setup(case, F64, device, masked=masked)
    ours, (exact, _) = solve(setup, impl), solve_plainly(setup)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        error = relative_error(value, exact[name])
        assert error <= 1e-10, f"{name}: {error:.1e}"


@pytest.mark.parametrize(("impl", "rows"), [("reference", N), ("torch", 3), ("triton", 3)])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_every_row_of_non_zero_weight_is_seen_once(
    impl: str, rows: int, masked: bool, grad: bool, device: str
) -> None:
    setup = with_leaves(make_setup(CASES["dapo"], F32, device, masked=masked))
    seen: list[Tensor] = []

    def loss_fn(rows: kk.Rows) -> Tensor:
        seen.append(rows.index)
        return dapo(rows, setup.inputs)

    with torch.set_grad_enabled(grad):
        result = call(setup, loss_fn, impl=impl, rows=rows)
    expected = [n for n in range(N) if not (masked and n in UNUSED)]
    assert torch.cat(seen).tolist() == expected
    chunks = -(-len(expected) // rows)
    assert len(seen) == chunks
    assert result.metrics["tokens"] == len(expected)
    assert result.metrics["bad_tokens"] == 0


@pytest.mark.parametrize(("compact", "kept"), [(None, 4), (True, 4), (False, 7)])
@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_rows_are_those_whose_loss_has_a_gradient(
    impl: str, compact: bool | None, kept: int, device: str
) -> None:
    setup = with_leaves(make_setup(CASES["sft"], F32, device, masked=True))
    dropped = torch.tensor([1, 4, 6, 7], device=device)  # 4 has weight 0 already

    def loss_fn(rows: kk.Rows) -> Tensor:
        return torch.where(torch.isin(rows.index, dropped), 0, -rows.logprobs)

    result = call(setup, loss_fn, impl=impl, compact=compact)
    result.loss.backward()
    assert (result.metrics["tokens"], result.metrics["gradient_rows"]) == (7, kept)
    zero = (setup.student["hidden"].grad == 0).all(dim=1).nonzero().squeeze(1)
    assert zero.tolist() == sorted({1, 6, 7, *UNUSED})


@pytest.mark.parametrize("depth", ["parameter", "output_of_a_layer", "no_rows"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("impl", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_parameter_of_the_loss_is_refused(
    impl: str, frozen: bool, depth: str, device: str
) -> None:
    """Its gradient would be dropped. Detached, or under no_grad, it is a number as any other."""
    setup = make_setup(CASES["dapo"], F32, device)
    scale = torch.full((3,), 0.5, device=device, requires_grad=True)

    def loss_fn(rows: kk.Rows) -> Tensor:
        factor = scale[0] if depth == "parameter" else torch.nn.functional.softplus(scale).sum()
        return factor * (setup.inputs["old"][rows.index] if depth == "no_rows" else rows.logprobs)

    setup = setup if frozen else with_leaves(setup)
    message = r"loss_fn must read no tensor that needs a gradient, .* got one of shape \[3\]"
    with pytest.raises(ValueError, match=message):
        call(setup, loss_fn, impl=impl)
    with torch.no_grad():
        expected = call(setup, loss_fn, impl=impl).loss
    scale.requires_grad_(False)
    if depth != "no_rows":
        assert torch.equal(call(setup, loss_fn, impl=impl).loss, expected)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_the_reference_gives_a_parameter_its_gradient(frozen: bool) -> None:
    setup = make_setup(CASES["sft"], F64, "cpu")
    setup = setup if frozen else with_leaves(setup)
    scale = torch.ones((), dtype=F64, requires_grad=True)
    result = call(setup, lambda rows: -scale * rows.logprobs, impl="reference")
    result.loss.backward()
    torch.testing.assert_close(scale.grad, -result.logprobs.mean())
    assert result.metrics["gradient_rows"] == (0 if frozen else N)


def test_rows_may_be_used_in_any_order_and_more_than_once() -> None:
    """What a loss builds out of rows is not taken for a parameter."""
    setup = make_setup(CASES["rkl_and_fkl"], F64, "cpu")

    def loss_fn(rows: kk.Rows) -> Tensor:
        doubled = rows.logprobs + rows.logprobs.clone()
        return torch.where(rows.kl > 4, doubled, rows.entropy) * rows.forward_kl

    gradients = []
    for impl in ("torch", "reference"):
        leaves = with_leaves(setup)
        call(leaves, loss_fn, impl=impl).loss.backward()
        gradients.append(leaves.student["weight"].grad)
    assert relative_error(*gradients) < 1e-10


@pytest.mark.parametrize("kl", [None, "rkl", "fkl", "jsd", "rkl+fkl"])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_teachers_entropy_is_a_constant_that_changes_nothing_else(
    impl: str, kl: str | None, device: str
) -> None:
    """It is the entropy of the teacher's own distribution, and rows.positions are the caller's."""
    case = replace(CASES["teacher_entropy"], kl=kl)
    setup = with_leaves(make_setup(case, F32, device, masked=True))
    positions = setup.options["positions"]

    def loss_fn(rows: kk.Rows) -> Tensor:
        assert torch.equal(rows.positions, positions[rows.index])
        assert rows.teacher_entropy is None or not rows.teacher_entropy.requires_grad
        return -rows.logprobs if rows.kl is None else rows.kl

    results = [call(setup, loss_fn, impl=impl, teacher_entropy=x) for x in (True, False)]
    (ours, gradient), (plain, plain_gradient) = (
        (x, torch.autograd.grad(x.loss, setup.student["weight"])[0]) for x in results
    )
    assert plain.teacher_entropy is None
    assert torch.equal(gradient, plain_gradient)
    for name in ("loss", "logprobs", "teacher_logprobs", "kl"):
        ours_of_name, plain_of_name = getattr(ours, name), getattr(plain, name)
        assert ours_of_name is plain_of_name or torch.equal(ours_of_name, plain_of_name), name
    head = setup.teacher | {"weight": setup.teacher["weight"][: V - 4]}
    mask = setup.options["token_weights"] != 0
    options = {"entropy": True, "mask": mask, "impl": "torch"}
    alone = kk.linear_logprobs(**head, tokens=setup.tokens, **options).entropy
    torch.testing.assert_close(ours.teacher_entropy, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_log_probabilities_of_a_teacher_on_a_server(impl: str, device: str) -> None:
    setup = make_setup(CASES["bounded_kd"], F32, device, masked=True)
    expected = with_leaves(setup)
    with_head = call(expected, impl=impl)
    with_head.loss.backward()
    server = replace(with_leaves(setup), teacher=None)
    options = {"vocab_size": V - 4, "teacher_logprobs": with_head.teacher_logprobs}
    result = call(server, impl=impl, **options)
    result.loss.backward()
    assert torch.equal(result.logprobs, with_head.logprobs)
    assert torch.equal(result.teacher_logprobs, with_head.teacher_logprobs)
    for name, tensor in server.student.items():
        assert relative_error(tensor.grad, expected.student[name].grad) <= 1e-6, name


def _by_hand(objective: kk.Objective, inputs: CallerTensors) -> Callable[[kk.Rows], Tensor]:
    """Return the formulas of Objective, written out on ratios."""

    def loss_fn(rows: kk.Rows) -> Tensor:
        A, kd_weight = inputs["advantages"][rows.index], inputs["kd_weight"][rows.index]
        ratio = (rows.logprobs - inputs["old"][rows.index]).exp()
        low, high = 1 - objective.clip_low, 1 + objective.clip_high
        bounded = torch.where(A > 0, ratio.clamp(max=high), ratio.clamp(low, objective.dual_clip))
        teacher_log_ratio = rows.logprobs - rows.teacher_logprobs
        kd = rows.kl
        if objective.kd == "k2":
            kd = teacher_log_ratio.square() / 2
        elif objective.kd == "rkl+fkl":
            share = objective.fkl_share
            kd = share * rows.forward_kl + (1 - share) * rows.kl
        elif objective.kd == "k3":
            kd = (-teacher_log_ratio).exp() - 1 + teacher_log_ratio
        weight = kd_weight * ratio.detach().clamp(max=objective.kd_ratio_cap)
        return (
            -A * bounded + objective.kd_coef * weight * kd - objective.entropy_coef * rows.entropy
        )

    return loss_fn


TERMS = ("k2", "k3", "rkl", "fkl", "jsd", "rkl+fkl")


@pytest.mark.parametrize(
    ("impl", "dtype", "bound", "kd"),
    [
        *(("torch", F64, 1e-12, kd) for kd in TERMS),
        *(("torch", F32, 3e-6, kd) for kd in TERMS),
        *(("triton", F32, 3e-6, kd) for kd in ("k2", "jsd")),
    ],
)
def test_kdrl_loss_is_one_of_these_losses(
    impl: str, dtype: torch.dtype, bound: float, kd: str, device: str
) -> None:
    exact_kd = kd if kd in ("rkl", "fkl", "jsd", "rkl+fkl") else None
    setup = make_setup(Case(sft, exact_kd, True, True), dtype, device, masked=True)
    options = {"fkl_share": 0.3} if kd == "rkl+fkl" else {}
    options |= {"clip_high": 0.28, "dual_clip": 1.5, "kd_coef": 0.5, "jsd_alpha": 0.3}
    objective = kk.Objective(kd=kd, entropy_coef=0.1, **options)
    callers, fused = with_leaves(setup), with_leaves(setup)
    options = {"workspace_bytes": smallest_budget(setup, impl, 3), "impl": impl}
    ours = call(callers, _by_hand(objective, setup.inputs), **options)
    not_of_kdrl_loss = ("kl", "jsd_alpha", "lse")
    options |= {k: v for k, v in setup.options.items() if k not in not_of_kdrl_loss}
    expected = kk.kdrl_loss(
        tokens=setup.tokens,
        **fused.student,
        advantages=setup.inputs["advantages"],
        old_logprobs=setup.inputs["old"],
        kd_weight=setup.inputs["kd_weight"],
        teacher=kk.TeacherHead(**setup.teacher),
        objective=objective,
        **options,
    )
    for name in ("logprobs", "teacher_logprobs", "entropy", *(["kl"] if exact_kd else [])):
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name
    ours.loss.backward()
    expected.loss.backward()
    assert relative_error(ours.loss, expected.loss) <= bound
    for name, tensor in callers.student.items():
        error = relative_error(tensor.grad, fused.student[name].grad)
        assert error <= bound, f"d{name}: {error:.1e}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("frozen", [False, True], ids=["no_grad", "frozen"])
def test_no_gradient_is_computed_that_nobody_wants(
    frozen: bool, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(CASES["rkl_and_entropy"], F32, device, masked=True)
    expected = call(with_leaves(setup), impl=impl).loss

    def refuse(*_: Any) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(gemm, "grad_hidden", refuse)
    monkeypatch.setattr(gemm, "add_grad_weight", refuse)
    wants: list[bool] = []

    def loss_fn(rows: kk.Rows) -> Tensor:
        wants.append(rows.logprobs.requires_grad or torch.is_grad_enabled() > frozen)
        return kl_and_entropy(rows, setup.inputs)

    with torch.set_grad_enabled(frozen):
        result = call(setup if frozen else with_leaves(setup), loss_fn, impl=impl)
    assert not any(wants)
    assert not result.loss.requires_grad
    assert result.metrics["gradient_rows"] == 0
    assert torch.equal(result.loss, expected)


def test_a_gradient_that_is_not_wanted_is_not_computed(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = with_leaves(make_setup(CASES["dapo"], F32, device))
    setup.student["weight"].requires_grad_(False)
    monkeypatch.delattr(gemm, "add_grad_weight")
    call(setup).loss.backward()
    assert setup.student["hidden"].grad.abs().max() > 0
    assert setup.student["weight"].grad is None


@pytest.mark.parametrize("square", [False, True], ids=["loss", "square"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_second_derivative_raises(impl: str, square: bool, device: str) -> None:
    """It raises also next to a loss that has one, where a missing graph would go unnoticed."""
    setup = with_leaves(make_setup(CASES["dapo"], F32, device))
    hidden = setup.student["hidden"]
    loss = call(setup, impl=impl).loss
    value = loss.square() if square else loss
    (gradient,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once|autograd"):
        (gradient.square().sum() + hidden.sum()).backward()


# ruff: noqa: E501 (two tables, one case a line)
RESULTS: list[tuple[Callable[[kk.Rows], Any], type[Exception], str]] = [
    (lambda rows: rows.logprobs.sum(), ValueError, r"loss_fn must return one loss a row, \[C\] with C = \d+, got \[\]"),
    (lambda rows: rows.logprobs[:, None], ValueError, r"with C = \d+, got \[\d+, 1\]"),
    (lambda rows: rows.logprobs[1:], ValueError, r"with C = \d+, got \[\d+\]"),
    (lambda _: 1.0, TypeError, "loss_fn must return a tensor, got float$"),
    (lambda _: None, TypeError, "got NoneType: a field of rows is None unless its option is passed"),
    (lambda rows: -rows.logprobs.detach(), ValueError, "with a gradient, got constants"),
    (lambda rows: -rows.teacher_logprobs, ValueError, "with a gradient, got constants"),
]  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("loss_fn", "error", "message"), RESULTS, ids=[message[:40] for _, _, message in RESULTS]
)
def test_what_a_loss_must_return(
    loss_fn: Callable[[kk.Rows], Any], error: type[Exception], message: str, impl: str, device: str
) -> None:
    setup = with_leaves(make_setup(CASES["bounded_kd"], F32, device))
    with pytest.raises(error, match=message):
        call(setup, loss_fn, impl=impl)


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"kl": "rkl", "teacher": None}, ValueError, "teacher must be a TeacherHead for kl='rkl', got None"),
    ({"kl": "k2"}, ValueError, r"kl must be one of \('rkl', 'fkl', 'jsd', 'rkl\+fkl'\) or None, got 'k2'"),
    ({"kl": "jsd", "jsd_alpha": 0.0}, ValueError, r"jsd_alpha must be in \(0, 1\), got 0.0"),
    ({"kl": "jsd", "jsd_alpha": 1}, ValueError, r"jsd_alpha must be in \(0, 1\), got 1"),
    ({"kl": "jsd", "jsd_alpha": float("nan")}, ValueError, r"jsd_alpha must be in \(0, 1\), got nan"),
    ({"teacher_entropy": True, "teacher": None}, ValueError, "teacher must be a TeacherHead for teacher_entropy=True, got None"),
    ({"teacher_entropy": 1, "teacher": None}, TypeError, "teacher_entropy must be True or False, got 1"),
    ({"positions": torch.arange(3)}, ValueError, r"positions must be \[N\] with N = 11, got \[3\]"),
    ({"positions": torch.zeros(N)}, TypeError, "positions must be int64, got torch.float32"),
    ({"positions": 3}, TypeError, "positions must be a tensor, got int"),
    ({"lse": 1}, TypeError, "lse must be True or False, got 1"),
    ({"loss_fn": "dapo"}, TypeError, "loss_fn must be callable, got str"),
    ({"teacher_logprobs": torch.zeros(N)}, ValueError, "teacher_logprobs must be None when teacher is passed"),
    ({"kl": "rkl", "teacher": None, "teacher_logprobs": torch.zeros(N)}, ValueError, "teacher must be a TeacherHead for kl='rkl'"),
    ({"token_weights": torch.ones(3)}, ValueError, r"token_weights must be \[N\] with N = 11, got \[3\]"),
    ({"normalizer": -1.0}, ValueError, "normalizer must be positive and finite, got -1.0"),
    ({"vocab_size": V}, ValueError, r"vocab_size must be in \[1, 33\], got 37"),
    ({"workspace_bytes": 7}, ValueError, r"workspace_bytes must be at least \d+ \(one row at V = 37\), got 7"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"), ARGUMENTS, ids=[message[:40] for _, _, message in ARGUMENTS]
)
def test_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    setup = make_setup(CASES["bounded_kd"], F32, "cpu")
    with pytest.raises(error, match=message):
        call(setup, **changes)


@pytest.mark.parametrize(("compact", "kept"), [(True, 3), (False, N)])
def test_a_loss_that_is_constant_in_some_chunks(compact: bool, kept: int, device: str) -> None:
    """Constant chunks give their rows no gradient, and do not make the whole loss constant."""
    setup = with_leaves(make_setup(CASES["sft"], F64, device))

    def early(rows: kk.Rows) -> Tensor:
        first = rows.index < 3
        return -rows.logprobs * first if first.any() else torch.zeros_like(rows.logprobs)

    budget = smallest_budget(setup, "torch", 3)
    result = call(setup, early, impl="torch", workspace_bytes=budget, compact=compact)
    result.loss.backward()
    other = with_leaves(make_setup(CASES["sft"], F64, device))
    expected = call(
        other, lambda rows: -rows.logprobs * (rows.index < 3), impl="reference", compact=compact
    )
    expected.loss.backward()
    assert result.metrics["gradient_rows"] == expected.metrics["gradient_rows"] == kept
    for name, tensor in setup.student.items():
        torch.testing.assert_close(tensor.grad, other.student[name].grad, msg=name)

"""kdrl_loss matches its definition in float64: every option, value and gradient."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdrl_kernels as kk
from kdrl_kernels import gradients
from kdrl_kernels.rows import load
from kdrl_kernels.token_rows import Rows
from tests.kernels.params import F32, F64, IMPL_DTYPES, KDS, quick_or_slow
from tests.kernels.problem import Problem, assert_matches_definition, loss_size, make_problem
from tests.tolerance import relative_error


@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize("kd", KDS)
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_every_kd_term(
    impl: str, dtype: torch.dtype, kd: str | None, off_policy: bool, device: str
) -> None:
    objective = {"entropy_coef": 0.05} | ({"fkl_share": 0.3} if kd == "rkl+fkl" else {})
    kind = {"kd": kd, "dtype": dtype, "device": device, "off_policy": off_policy}
    assert_matches_definition(impl, upstream=3.0, objective=objective, **kind)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_a_baseline(impl: str, dtype: torch.dtype, off_policy: bool, device: str) -> None:
    kind: dict[str, Any] = {"kd": "k2", "dtype": dtype, "device": device, "off_policy": off_policy}
    objective = {"entropy_coef": 0.05, "kd_baseline": "kl"}
    results = assert_matches_definition(impl, upstream=3.0, objective=objective, **kind)
    assert results["kl"].min() > 0


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_baseline_is_a_loss_of_the_centred_log_ratio(impl: str, device: str) -> None:
    """linear_token_loss gives the same, with the formula written out."""
    problem = make_problem(device=device, objective={"kd_baseline": "kl", "policy": "off"})
    ours, options = problem.solve(impl=impl), problem.options
    student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}

    def centred(rows: kk.Rows) -> torch.Tensor:
        ratio = (rows.logprobs.detach() - options["old_logprobs"]).exp().clamp(max=2.0)
        centred_log_ratio = rows.logprobs - rows.teacher_logprobs - rows.kl.detach()
        return 0.5 * options["kd_weight"] * ratio * centred_log_ratio.square() / 2

    teacher, weights = kk.TeacherHead(**problem.teacher), options["token_weights"]
    arguments = {"teacher": teacher, "token_weights": weights, "kl": "rkl", "impl": impl}
    kk.linear_token_loss(
        tokens=problem.tokens, loss_fn=centred, **student, **arguments
    ).loss.backward()
    for name, tensor in student.items():
        torch.testing.assert_close(ours[f"d{name}"], tensor.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_baseline_has_no_gradient_in_the_kl(impl: str, device: str) -> None:
    """So the gradient kernel does not read the teacher's logits again."""
    ones = torch.ones(3, device=device)
    rows = Rows(-ones, teacher_logprobs=-2 * ones, kl=0.25 * ones)
    objective = kk.Objective(policy="off", kd_baseline="kl", kd_coef=1.0)
    losses, coef = load(impl).coefficients(objective, rows, ones)
    assert losses.tolist() == [0.75**2 / 2] * 3
    assert coef.logprobs.tolist() == [0.75] * 3
    assert coef.kl is None


OPTIONS: dict[str, dict[str, Any]] = {
    "no_clip": {"objective": {"policy": "none"}},
    "distillation_only": {"objective": {"policy": "off"}},
    "dual_clip": {"objective": {"dual_clip": 1.5, "clip_low": 0.1, "clip_high": 0.3}},
    "tight_ratio_cap": {"objective": {"kd_ratio_cap": 0.25}},
    "softcap": {"softcap": 3.0, "teacher_options": {"softcap": 4.0}},
    "temperature": {"temperature": 0.6, "teacher_options": {"temperature": 1.7}},
    "softcap_and_temperature": {"softcap": 3.0, "temperature": 0.7},
    "no_bias": {"bias": False},
    "entropy_output": {"entropy": True},
    "normalizer": {"normalizer": torch.tensor(123.0)},
    "vocab_size": {"V": 37, "V_t": 41, "vocab_size": 37},
    "student_vocab_larger": {"V": 41, "V_t": 37},
    "teacher_vocab_larger": {"V": 37, "V_t": 64},
    "one_row": {"N": 1},
    "one_column": {"V": 1, "V_t": 1},
    "one_hidden": {"H": 1},
}


@pytest.mark.parametrize(
    ("impl", "kd"),
    quick_or_slow(
        ["torch", "triton"],
        ["k2", "rkl", "fkl", "jsd", "rkl+fkl"],
        {"k2", "fkl", "jsd", "rkl+fkl"},
    ),
)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option(impl: str, options: dict[str, Any], kd: str, device: str) -> None:
    assert_matches_definition(impl, kd=kd, device=device, **options)


@pytest.mark.parametrize("kd", ["k2", "k3"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_teacher_logprobs_from_a_server(impl: str, kd: str, device: str) -> None:
    results = assert_matches_definition(impl, kd=kd, server=True, device=device)
    assert results["teacher_logprobs"].abs().min() > 0


@pytest.mark.parametrize(
    ("N", "H", "V"),
    [
        (1, 1, 2),
        (3, 5, 127),
        pytest.param(129, 31, 130, marks=pytest.mark.slow),  # 129 rows in the interpreter
        (4, 8, 3 * 4096 + 5),
    ],
)
@pytest.mark.parametrize("kd", ["k2", "rkl"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_ragged_shapes(impl: str, kd: str, N: int, H: int, V: int, device: str) -> None:
    assert_matches_definition(impl, N=N, H=H, V=V, kd=kd, device=device)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_temperature_of_each_row(impl: str, device: str) -> None:
    temperature = torch.linspace(0.5, 1.5, 7)
    assert_matches_definition(impl, kd="rkl", device=device, softcap=5.0, temperature=temperature)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_small_weights_survive_float16(impl: str, device: str) -> None:
    problem = make_problem(kd="rkl", dtype=torch.float16, device=device)
    expected = problem.solve(impl=impl)
    # float16 has nothing below 6e-8: weights of 1e-7 must not reach the 16-bit logit gradients
    problem.options["token_weights"] = problem.options["token_weights"].float() * 2**-23
    results = problem.solve(impl=impl)
    for name in ("loss", "dhidden", "dweight"):  # the unit is a power of two, so exact
        torch.testing.assert_close(results[name], expected[name], rtol=0, atol=0)


@st.composite
def kinds(draw: st.DrawFn) -> dict[str, Any]:
    """Draw arguments of make_problem: any options that go together."""
    kd = draw(st.sampled_from(KDS))
    objective = {
        "policy": draw(st.sampled_from(["clip", "none", "off"] if kd else ["clip", "none"])),
        "clip_low": draw(st.sampled_from([0.0, 0.2])),
        "clip_high": draw(st.sampled_from([0.0, 0.28])),
        "dual_clip": draw(st.sampled_from([None, 2.0])),
        "entropy_coef": draw(st.sampled_from([0.0, 0.01, -0.01])),
        "kd_ratio_cap": draw(st.sampled_from([0.5, 2.0])),
    }
    server = kd in ("k2", "k3", "k3_ratio") and draw(st.booleans())
    if kd == "k2" and not server:
        objective["kd_baseline"] = draw(st.sampled_from([None, "kl"]))
    return {
        "N": draw(st.integers(1, 9)),
        "H": draw(st.integers(1, 9)),
        "V": draw(st.integers(2, 40)),
        "V_t": draw(st.integers(2, 40)),
        "kd": kd,
        "seed": draw(st.integers(0, 99)),
        "objective": objective,
        "off_policy": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "server": server,
        "softcap": draw(st.sampled_from([None, 2.0])),
        "temperature": draw(st.sampled_from([1.0, 0.7])),
        "entropy": draw(st.booleans()),
    }


def _assert_same(impl: str, problem: Problem, bound: float) -> None:
    """Assert that impl gives what the reference gives, to a bound that a wrong formula exceeds.

    Where sums cancel, the reference at the dtype of the problem says how much is lost anyway.
    """
    exact = problem.map(torch.Tensor.double).solve(impl="reference")
    eager = problem.solve(impl="reference")
    for name, value in problem.solve(impl=impl).items():
        size = loss_size(problem, exact) if name == "loss" else None
        lost = relative_error(eager[name], exact[name], size)
        assert relative_error(value, exact[name], size) <= bound + 10 * lost, name


@settings(deadline=None, max_examples=100)
@given(kind=kinds())
def test_options_together_in_float64(kind: dict[str, Any]) -> None:
    _assert_same("torch", make_problem(dtype=F64, **kind), bound=1e-10)


@pytest.mark.slow  # each option alone is tested above
@settings(deadline=None, max_examples=12)
@given(kind=kinds())
def test_options_together_on_triton(kind: dict[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _assert_same("triton", make_problem(device=device, **kind), bound=1e-4)


@pytest.mark.parametrize("kd", KDS)
def test_reference_passes_gradcheck(kd: str | None) -> None:
    # numerical differences do not see stop-gradients: so off-policy without KD, or KD alone, and
    # a ratio that has its gradient only where it is computed
    policy, off_policy = ("clip", True) if kd is None else ("off", kd == "k3_ratio")
    objective = {"entropy_coef": 0.1, "policy": policy, "kd_ratio_cap": 1e9, "k3_bound": 60}
    problem = make_problem(3, 4, 5, kd=kd, dtype=F64, objective=objective, off_policy=off_policy)
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher)

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        options = {**problem.options, "teacher": teacher, "impl": "reference"}
        return kk.kdrl_loss(hidden, weight, problem.tokens, bias=bias, **options).loss

    inputs = tuple(x.clone().requires_grad_() for x in problem.student.values())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_no_grad_computes_no_gradient(
    impl: str, mode: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(kd="rkl", device=device)
    expected = problem.solve(impl=impl)["loss"]
    monkeypatch.delattr(gradients.Gradients, "add")  # called: an AttributeError
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    with mode():
        result = kk.kdrl_loss(
            tokens=problem.tokens,
            teacher=kk.TeacherHead(**problem.teacher),
            impl=impl,
            **student,
            **problem.options,
        )
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, expected)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_frozen_inputs_get_no_gradient(impl: str, frozen: str, device: str) -> None:
    problem = make_problem(device=device)
    expected = problem.solve(impl=impl)
    student = {k: v.clone().requires_grad_(k != frozen) for k, v in problem.student.items()}
    teacher = kk.TeacherHead(**problem.teacher)
    options = {**problem.options, "teacher": teacher, "impl": impl}
    kk.kdrl_loss(tokens=problem.tokens, **student, **options).loss.backward()
    assert student[frozen].grad is None
    for name in student.keys() - {frozen}:
        assert torch.equal(student[name].grad, expected[f"d{name}"])


def test_gradients_accumulate(device: str) -> None:
    problem = make_problem(device=device)
    once = problem.solve()
    student = {k: v.clone().requires_grad_() for k, v in problem.student.items()}
    for _ in range(2):
        teacher = kk.TeacherHead(**problem.teacher)
        kk.kdrl_loss(
            tokens=problem.tokens, teacher=teacher, **student, **problem.options
        ).loss.backward()
    for name, tensor in student.items():
        torch.testing.assert_close(tensor.grad, 2 * once[f"d{name}"], rtol=1e-6, atol=0)


def test_second_derivative_is_refused(device: str) -> None:
    problem = make_problem(device=device, dtype=F32)
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    teacher = kk.TeacherHead(**problem.teacher)
    loss = kk.kdrl_loss(tokens=problem.tokens, teacher=teacher, **student, **problem.options).loss
    (grad,) = torch.autograd.grad(loss, student["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="Trying to backward through kdrl"):
        grad.sum().backward()


def test_autocast_changes_nothing(device: str) -> None:
    problem = make_problem(kd="rkl", device=device)
    expected = problem.solve(impl="torch")
    with torch.autocast(device, dtype=torch.bfloat16):
        results = problem.solve(impl="torch")
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_default_dtype_changes_nothing(impl: str, device: str) -> None:
    problem = make_problem(kd="rkl", device=device)
    expected = problem.solve(impl=impl)
    torch.set_default_dtype(torch.float16)
    try:
        results = problem.solve(impl=impl)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in expected.items():
        assert torch.equal(results[name], value), name

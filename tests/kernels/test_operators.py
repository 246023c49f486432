"""The operators pass PyTorch's checks, and a compiled caller is one graph."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import kdrl_kernels as kk
from kdrl_kernels.operators import logprobs as logprobs_op
from kdrl_kernels.operators import loss as loss_op
from kdrl_kernels.operators.flat import Layout
from tests.kernels.params import BF16, F32, F64
from tests.kernels.problem import make_problem

CASES: dict[str, dict[str, Any]] = {
    "no_teacher": {"kd": None},
    "server": {"kd": "k2", "server": True},
    "sampled_teacher": {"kd": "k3", "bias": False, "entropy": True},
    "exact_teacher": {"kd": "rkl", "teacher_options": {"softcap": 4.0}, "softcap": 3.0},
    "topk": {"kd": "topk_rkl"},
    "topk_alone": {"kd": "topk_fkl", "objective": {"tail": False}},
    "baseline": {"kd": "k2", "objective": {"kd_baseline": "kl"}},
    "entropy_bonus": {"kd": "jsd", "objective": {"entropy_coef": 0.1}, "compact": True},
    "temperature_of_each_row": {"kd": "fkl", "temperature": torch.linspace(0.5, 1.5, 7)},
    "mixture": {"kd": "rkl+fkl", "objective": {"fkl_share": 0.2}, "entropy": True},
    "distillation_only": {"kd": "rkl", "objective": {"policy": "off"}, "off_policy": False},
    "ids": {"kd": None, "extra_tokens": torch.tensor([[3, -1, 3]] * 7)},
    "normalizer": {"kd": "k2", "normalizer": torch.tensor(9.0), "V_t": 30},
}


@dataclass(frozen=True)
class _Inner:
    x: Tensor
    scale: float | Tensor = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class _Outer:
    first: _Inner
    second: _Inner | None
    name: Literal["a", "b"] | None
    size: int
    flags: tuple[bool, bool]


def test_a_call_becomes_arguments_and_comes_back() -> None:
    layout, x, row_scales = Layout(_Outer), torch.ones(2), torch.zeros(2)
    assert layout.schema("y") == (
        "(Tensor first_x, Tensor? first_scale, float? first_scale_number, float? first_cap, "
        "Tensor? second_x, Tensor? second_scale, float? second_scale_number, float? second_cap, "
        "str? name, SymInt size, bool[] flags) -> (Tensor y)"
    )
    alone = _Outer(_Inner(x, scale=2), None, None, 3, (True, False))
    assert layout.flatten(alone) == [x, None, 2.0, *[None] * 6, 3, (True, False)]
    assert layout.rebuild(layout.flatten(alone)) == alone
    both = _Outer(_Inner(x), _Inner(x, row_scales, 5), "b", 3, (True, False))
    values = layout.flatten(both)
    assert values == [x, None, 1.0, None, x, row_scales, None, 5.0, "b", 3, (True, False)]
    assert layout.rebuild(values) == both


SLOW_BF16 = pytest.param(BF16, marks=pytest.mark.slow)  # a schema knows no dtype
DTYPES = pytest.mark.parametrize("dtype", [F32, SLOW_BF16], ids=str)


def _recorded(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """Record the arguments of each call of an operator from here on."""
    operator, seen = getattr(module, name), list[tuple[Any, ...]]()

    def record(*args: Any) -> Any:
        seen.append(args)
        return operator(*args)

    monkeypatch.setattr(module, name, record)
    return seen


def _opcheck(operator: Any, args: tuple[Any, ...]) -> None:
    """Run every check of torch.library.opcheck; one that fails raises."""
    copies = torch.utils._pytree.tree_map_only(
        Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), args
    )
    outcomes = torch.library.opcheck(operator, copies)
    assert set(outcomes.values()) == {"SUCCESS"}
    assert len(outcomes) == 4


@pytest.mark.parametrize("trained", [("hidden", "weight", "bias"), ("hidden",), ()], ids=len)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@DTYPES
def test_loss(
    dtype: torch.dtype,
    case: dict[str, Any],
    trained: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = _recorded(monkeypatch, loss_op, "_loss")
    problem = make_problem(dtype=dtype, **case)
    problem.options["token_weights"][2] = 0
    student = {k: v.requires_grad_(k in trained) for k, v in problem.student.items()}
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher, **problem.teacher_options)
    kk.kdrl_loss(tokens=problem.tokens, teacher=teacher, impl="torch", **student, **problem.options)
    _opcheck(torch.ops.kdrl.loss.default, *seen)


ALL, FULLEST = ("hidden", "weight", "bias"), ("entropy", "ids", "rest")


@pytest.mark.parametrize(
    ("more", "trained", "cached"),
    [
        *((more, ALL, 3) for more in [(), ("entropy",), ("ids",), ("topk",), ("topk", "rest")]),
        *((FULLEST, ALL, cached) for cached in (0, 3, 7)),
        (FULLEST, ("hidden",), 3),
    ],
    ids=str,
)
@DTYPES
def test_linear_logprobs(
    dtype: torch.dtype,
    more: tuple[str, ...],
    trained: tuple[str, ...],
    cached: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = _recorded(monkeypatch, logprobs_op, "_linear_logprobs")
    backward = _recorded(monkeypatch, logprobs_op, "_linear_logprobs_backward")
    problem = make_problem(V=64, kd=None, dtype=dtype)  # no columns of padding, which are NaN here
    student = {k: v.requires_grad_(k in trained) for k, v in problem.student.items()}
    ids = torch.tensor([[3, -1, 3, 60]] * 7)
    out = kk.linear_logprobs(
        tokens=problem.tokens,
        entropy="entropy" in more,
        extra_tokens=ids if "ids" in more else None,
        rest="rest" in more,
        topk=5 if "topk" in more else None,
        cache_bytes=cached * 64 * 4,
        workspace_bytes=9 * 64 * 4 + 3 * 16 * 8,
        **student,
    )
    outputs = out.logprobs, out.entropy, out.extra_logprobs, out.rest_logprob, out.topk_logprobs
    sum(x.sum() for x in outputs if x is not None).backward()
    ((inputs,), (upstream,)) = forward.copy(), backward.copy()
    call = logprobs_op.LAYOUT.rebuild(inputs)
    assert call.cached == cached
    assert call.topk == (5 if "topk" in more else 0)
    _opcheck(torch.ops.kdrl.linear_logprobs.default, inputs)
    upstream = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, upstream)
    _opcheck(torch.ops.kdrl.linear_logprobs_backward.default, upstream)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_scaled(dtype: torch.dtype) -> None:
    wide = torch.promote_types(dtype, F32)
    args = torch.randn(5, 3, dtype=wide), torch.tensor(0.3, dtype=wide), dtype, "torch"
    _opcheck(torch.ops.kdrl.scaled.default, args)


def _inputs(seed: int, N: int = 8) -> dict[str, Tensor]:
    """Return everything a caller may pass as a tensor; another seed gives other values."""
    problem = make_problem(N, 5, 11, kd="rkl", V_t=13, dtype=F64, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    assert problem.teacher is not None
    inputs = problem.student | {f"teacher_{k}": v for k, v in problem.teacher.items()}
    inputs["x"] = torch.randn(N, 6, generator=rng, dtype=F64)
    inputs["A"] = torch.randn(6, 5, generator=rng, dtype=F64)
    inputs["tokens"] = problem.tokens
    for name in ("advantages", "token_weights", "old_logprobs", "kd_weight"):
        inputs[name] = problem.options[name]
    inputs["token_weights"][[1, 3 + seed]] = 0
    inputs["kd_weight"][2] = 0
    inputs["normalizer"] = torch.tensor(5.0 + seed, dtype=F64)
    inputs["temperature"] = torch.rand(N, generator=rng, dtype=F64) + 0.5
    for name in ("A", "weight", "bias"):
        inputs[name].requires_grad_()
    return inputs


def _loss_caller(
    x: Tensor,
    A: Tensor,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Call kdrl_loss as a step of a model does."""
    result = kk.kdrl_loss(
        hidden + x @ A,
        weight,
        tokens,
        teacher=kk.TeacherHead(teacher_hidden, teacher_weight, temperature=1.3),
        objective=kk.Objective(kd="rkl", kd_coef=0.5, entropy_coef=0.1),
        entropy=True,
        **options,
    )
    assert result.kl is not None
    assert result.entropy is not None
    per_row = torch.stack([result.logprobs, result.kl, result.entropy])
    means = torch.stack([x.double() for x in kk.mean_metrics(result.metrics).values()])
    return result.loss.square() + (A * A).sum(), torch.cat([per_row.flatten(), means])


def _logprob_caller(
    x: Tensor,
    A: Tensor,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor,
    temperature: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    **_: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute a sequence-level loss of a caller, with the log-probabilities of two other tokens."""
    out = kk.linear_logprobs(
        hidden + x @ A,
        weight,
        tokens,
        bias=bias,
        temperature=temperature,
        entropy=True,
        extra_tokens=torch.stack([(tokens + 1) % 11, torch.full_like(tokens, -1), tokens], dim=1),
        rest=True,
    )
    assert out.entropy is not None
    assert out.extra_logprobs is not None
    assert out.rest_logprob is not None
    ratio = (out.logprobs - old_logprobs).mean().exp()
    contrast = (out.extra_logprobs.mean(dim=1) - out.rest_logprob).square().sum()
    loss = ratio * advantages.mean() - out.entropy.square().sum() + contrast
    return loss, out.logprobs.detach()


def _solve(fn: Callable[..., tuple[Tensor, Tensor]], inputs: dict[str, Tensor]) -> dict[str, Any]:
    leaves = {k: v.detach().clone().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    loss, per_row = fn(**leaves)
    loss.backward()
    gradients = {k: v.grad for k, v in leaves.items() if v.requires_grad}
    return {"loss": loss.detach(), "rows": per_row} | gradients


CALLERS = pytest.mark.parametrize("caller", [_loss_caller, _logprob_caller])


@CALLERS
def test_compiled_caller_is_one_graph(caller: Any) -> None:
    """The graph gives eager's numbers; other values, and other zero weights, need no new graph."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(caller, fullgraph=True, backend=counter)
    counts = []
    for seed in range(3):
        inputs = _inputs(seed)
        expected = _solve(caller, inputs)
        assert all(value is not None and value.abs().max() > 0 for value in expected.values())
        torch.testing.assert_close(_solve(compiled, inputs), expected, rtol=1e-12, atol=1e-12)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize(
    "caller", [pytest.param(_loss_caller, marks=pytest.mark.slow), _logprob_caller]
)
def test_compiled_caller_takes_any_number_of_rows(caller: Any) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(caller, fullgraph=True, backend=counter, dynamic=True)
    counts = []  # PyTorch may start a compilation again: the count after it must stay
    for N in (10, 12, 23):
        inputs = _inputs(1, N)
        expected = _solve(caller, inputs)
        torch.testing.assert_close(_solve(compiled, inputs), expected, rtol=1e-12, atol=1e-12)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_a_compiled_caller_with_a_mask_is_one_graph() -> None:
    torch.compiler.reset()
    inputs = _inputs(0)
    arguments = [inputs[name] for name in ("hidden", "weight", "tokens")]
    mask, ids = inputs["token_weights"] != 0, inputs["tokens"][:, None]

    def caller(mask: Tensor) -> Tensor:
        out = kk.linear_logprobs(*arguments, mask=mask, extra_tokens=ids, rest=True)
        assert out.rest_logprob is not None
        return torch.stack([out.logprobs, out.rest_logprob])

    compiled = torch.compile(caller, fullgraph=True, backend="eager")
    assert torch.equal(compiled(mask), caller(mask))


@pytest.mark.slow  # the compiler costs seconds
@pytest.mark.parametrize("cached", [4, 100], ids=["some", "all"])
def test_a_compiled_caller_with_a_mask_may_keep_logits(cached: int) -> None:
    """With any number of rows, of which the mask takes some, a graph cannot count what fits."""
    torch.compiler.reset()
    cache_bytes = cached * 64 * 8  # rows of 64 columns of float64

    def caller(hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        options = {"mask": mask, "cache_bytes": cache_bytes}
        return kk.linear_logprobs(hidden, weight, tokens, **options).logprobs.square().sum()

    compiled = torch.compile(caller, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (10, 23):
        inputs = _inputs(1, N)
        fixed = inputs["tokens"], inputs["token_weights"] != 0
        gradients = []
        for function in (caller, compiled):
            leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
            gradients.append(torch.autograd.grad(function(*leaves, *fixed), leaves))
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_token_loss_breaks_the_graph_of_its_caller_once(impl: str) -> None:
    """No operator takes a Python function: one graph comes before the call, and one after it."""
    torch.compiler.reset()
    counters.clear()

    def caller(
        x: Tensor, A: Tensor, hidden: Tensor, weight: Tensor, tokens: Tensor, **others: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = kk.linear_token_loss(
            hidden + x @ A,
            weight,
            tokens,
            lambda rows: -others["advantages"][rows.index] * rows.logprobs + rows.entropy.square(),
            bias=others["bias"],
            token_weights=others["token_weights"],
            entropy=True,
            impl=impl,
        )
        return result.loss * 3, result.logprobs + 1

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(caller, backend=counter)
    for seed in range(2):
        inputs = _inputs(seed)
        expected = _solve(caller, inputs)
        torch.testing.assert_close(_solve(compiled, inputs), expected, rtol=1e-12, atol=1e-12)
        graphs = [graph for graph in counter.graphs if len(graph.graph.nodes) > 2]
        assert len(graphs) == 2  # a graph that PyTorch drops, to trace its frame again, is empty
    assert sum(counters["graph_break"].values()) == 1
    whole = torch.compile(caller, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="the loss of linear_token_loss is a Python function"):
        whole(**_inputs(0))


@CALLERS
def test_a_second_derivative_raises(caller: Any) -> None:
    inputs = _inputs(0)
    loss, _ = caller(**inputs)
    (first,) = torch.autograd.grad(loss, inputs["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        first.square().sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["kdrl_loss", "linear_logprobs", "linear_token_loss"])
def test_activation_checkpointing_gives_the_same(name: str, reentrant: bool) -> None:
    """It hands each saved tensor out once, so a backward pass may read them once."""

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        head = hidden, weight, torch.arange(5)
        if name == "kdrl_loss":
            objective = kk.Objective(kd=None)
            return kk.kdrl_loss(*head, advantages=torch.ones(5), objective=objective).loss
        if name == "linear_logprobs":
            return kk.linear_logprobs(*head).logprobs.sum()
        return kk.linear_token_loss(*head, lambda rows: -rows.logprobs).loss

    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(size, 4, generator=rng) for size in (5, 6)]
    leaves, others = ([x.clone().requires_grad_() for x in tensors] for _ in range(2))
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    loss(*others).backward()
    for ours, expected in zip(leaves, others, strict=True):
        assert torch.equal(ours.grad, expected.grad)

"""[B, T, H] inputs give what their N = B · T rows give, in the shape [B, T], to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F32, IMPLS

B, T, H, V = 3, 4, 8, 19
PADDING = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
"""Right padding: 3, 1 and 4 tokens."""
Inputs = dict[str, Any]


def _inputs(device: str) -> Inputs:
    """Return [B, T] inputs whose padding holds what must never be read: NaN and token -100."""
    rng = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng)

    inputs = {"hidden": randn(B, T, H), "weight": randn(V, H), "bias": randn(V)}
    inputs["tokens"] = torch.randint(V, (B, T), generator=rng)
    inputs["mask"] = ~PADDING
    inputs["temperature"] = torch.rand(B, T, generator=rng) + 0.5
    for name in ("advantages", "old_logprobs", "teacher_logprobs"):
        inputs[name] = randn(B, T) - 2
    inputs["kd_weight"] = torch.rand(B, T, generator=rng)
    inputs["t_hidden"], inputs["t_weight"] = randn(B, T, H + 1), randn(V, H + 1)
    inputs["t_temperature"] = torch.rand(B, T, generator=rng) + 0.5
    inputs["hidden"][PADDING] = torch.nan
    inputs["tokens"][PADDING] = -100
    return {k: v.to(device) for k, v in inputs.items()}


def _flat(inputs: Inputs) -> Inputs:
    """Return the same inputs as N rows."""
    return {k: v.flatten(0, 1) if v.shape[:2] == (B, T) else v for k, v in inputs.items()}


def _logprobs(x: Inputs, impl: str) -> Any:
    names = ("hidden", "weight", "tokens", "bias", "mask", "temperature")
    return kk.linear_logprobs(**{k: x[k] for k in names}, entropy=True, impl=impl)


def _kdrl(x: Inputs, impl: str) -> kk.LossOutput:
    names = ("tokens", "bias", "temperature", "advantages", "old_logprobs", "kd_weight")
    teacher = kk.TeacherHead(x["t_hidden"], x["t_weight"], temperature=x["t_temperature"])
    return kk.kdrl_loss(
        x["hidden"],
        x["weight"],
        teacher=teacher,
        token_weights=x["mask"],
        objective=kk.Objective(kd="rkl", kd_coef=0.5),
        entropy=True,
        impl=impl,
        **{k: x[k] for k in names},
    )


def _token_loss(x: Inputs, impl: str) -> kk.LossOutput:
    advantages, lq = x["advantages"].flatten(), x["teacher_logprobs"]

    def loss_fn(rows: kk.Rows) -> Tensor:
        assert torch.equal(rows.positions, rows.index % T)
        return (rows.teacher_logprobs - advantages[rows.index]) * rows.logprobs

    options = {"token_weights": x["mask"].long(), "teacher_logprobs": lq, "impl": impl}
    options["positions"] = torch.arange(B * T, device=lq.device).view(lq.shape) % T
    return kk.linear_token_loss(x["hidden"], x["weight"], x["tokens"], loss_fn, **options)


CALLS: dict[str, Callable[[Inputs, str], Any]] = {
    "linear_logprobs": _logprobs,
    "kdrl_loss": _kdrl,
    "linear_token_loss": _token_loss,
}
FIELDS = ("logprobs", "entropy", "teacher_logprobs", "kl")


def _solve(function: Callable[[Inputs, str], Any], inputs: Inputs, impl: str) -> Inputs:
    """Return [B, T] outputs, and the gradients of hidden and weight."""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight")}
    output = function(inputs | leaves, impl)
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = output.logprobs.flatten() @ torch.arange(B * T).to(output.logprobs)
        loss = loss + output.entropy.square().sum()
    loss.backward()
    fields = {name: getattr(output, name, None) for name in FIELDS}
    results = {name: value for name, value in fields.items() if value is not None}
    return results | {"loss": loss} | {f"d{k}": v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("function", CALLS.values(), ids=CALLS)
def test_a_batch_gives_what_its_rows_give(
    function: Callable[[Inputs, str], Any], impl: str, device: str
) -> None:
    inputs = _inputs(device)
    batch, rows = _solve(function, inputs, impl), _solve(function, _flat(inputs), impl)
    assert batch.keys() == rows.keys()
    for name, value in batch.items():
        dims = {"loss": (), "dhidden": (B, T, H), "dweight": (V, H)}.get(name, (B, T))
        assert value.shape == dims, name
        assert torch.equal(value.flatten(), rows[name].flatten()), name
        if value.shape[:2] == (B, T):
            padding = value[PADDING.to(device)]
            assert torch.equal(padding, torch.zeros_like(padding)), name


@pytest.mark.parametrize("impl", ["reference", "torch"])  # what is left out is so before them
def test_a_mask_leaves_out_what_it_says(impl: str, device: str) -> None:
    """The rows that are left give what they give alone, and one of them sets no other's value."""
    inputs = _inputs(device)
    used = inputs["mask"]
    whole = _solve(_logprobs, inputs, impl)
    alone = {k: v[used] if v.shape[:2] == (B, T) else v for k, v in inputs.items()}
    weight = alone["weight"].requires_grad_()
    output = _logprobs(alone, impl)
    assert torch.equal(output.logprobs, whole["logprobs"][used])
    assert torch.equal(output.entropy, whole["entropy"][used])
    steps = torch.arange(B * T).to(output.logprobs).view(B, T)[used]
    (output.logprobs @ steps + output.entropy.square().sum()).backward()
    torch.testing.assert_close(weight.grad, whole["dweight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_a_mask_of_zeros_gives_zeros(impl: str, device: str) -> None:
    inputs = _inputs(device)
    result = _solve(_logprobs, inputs | {"mask": torch.zeros_like(inputs["mask"])}, impl)
    for name, value in result.items():
        assert torch.equal(value, torch.zeros_like(value)), name


def test_a_batch_without_tokens(device: str) -> None:
    hidden = torch.zeros(0, T, H, device=device, dtype=F32)
    tokens = torch.zeros(0, T, device=device, dtype=torch.int64)
    result = kk.linear_logprobs(hidden, torch.ones(V, H, device=device), tokens)
    assert result.logprobs.shape == (0, T)


@pytest.mark.slow  # the compiler costs seconds
def test_a_compiled_caller_keeps_one_graph() -> None:
    inputs = _inputs("cpu")
    inputs |= {"hidden": torch.ones(B, T, H), "tokens": torch.zeros(B, T, dtype=torch.int64)}
    inputs["mask"] = torch.ones(B, T)
    compiled = torch.compile(_kdrl, fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs, "torch").logprobs, _kdrl(inputs, "torch").logprobs)


HEAD = kk.TeacherHead(torch.ones(B, T, H), torch.ones(V, H))
# ruff: noqa: E501 (a table, one case a line)
ERRORS: list[tuple[Inputs, str]] = [
    ({"tokens": torch.zeros(B * T, dtype=torch.int64)}, r"tokens must be \[B, T\] with B = 3 and T = 4 where hidden is \[B, T, H\], got \[12\]"),
    ({"advantages": torch.ones(T, B)}, r"advantages must be \[B, T\] with B = 3 and T = 4 .* got \[4, 3\]"),
    ({"token_weights": torch.ones(B)}, r"token_weights must be \[B, T\] .* got \[3\]"),
    ({"temperature": torch.ones(B, 1)}, r"temperature must be \[B, T\] .* got \[3, 1\]"),
    ({"kd_weight": torch.ones(B, T, 1)}, r"kd_weight must be \[B, T\] .* got \[3, 4, 1\]"),
    ({"teacher": kk.TeacherHead(torch.ones(B * T, H), torch.ones(V, H))}, r"teacher.hidden must be \[B, T, H_t\] .* got \[12, 8\]"),
    ({"hidden": torch.ones(B, H), "tokens": torch.zeros(B, dtype=torch.int64), "advantages": torch.ones(B)}, r"teacher.hidden must have N = 3 rows, got \[3, 4, 8\]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[m[:40] for _, m in ERRORS])
def test_other_shapes_are_refused(changes: Inputs, message: str) -> None:
    arguments = {"hidden": torch.ones(B, T, H), "weight": torch.ones(V, H), "teacher": HEAD}
    arguments |= {"tokens": torch.zeros(B, T, dtype=torch.int64), "advantages": torch.ones(B, T)}
    with pytest.raises(ValueError, match=message):
        kk.kdrl_loss(**(arguments | changes))


def test_the_temperature_of_a_teachers_batch_is_checked() -> None:
    with pytest.raises(ValueError, match=r"\[B, T\] with B = 3 and T = 4, got \[12\]"):
        kk.TeacherHead(torch.ones(B, T, H), torch.ones(V, H), temperature=torch.ones(B * T))

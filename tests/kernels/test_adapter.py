"""A low-rank adapter beside a constant head equals the merged head, whose weight is not trained."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kdrl_kernels as kk
from kdrl_kernels import logprobs, one_pass
from kdrl_kernels.adapter import with_adapter
from kdrl_kernels.head import FLOATS16, StudentHead, in_one_dtype
from kdrl_kernels.sketch import COLUMNS_PER_ENTRY
from tests.kernels.adapters import (
    CALLS,
    H,
    N,
    Tensors,
    V,
    adapted,
    assert_near,
    each_call,
    exact_kd_call,
    kdrl_call,
    logprobs_call,
    make,
    merged,
    solve,
    token_loss_call,
    widened,
)
from tests.kernels.params import BF16, F16, F32, F64, IMPL_DTYPES, IMPLS
from tests.tolerance import assert_matches, relative_error


@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
@each_call
def test_equals_the_merged_head(
    call: Callable[..., Tensors], impl: str, dtype: torch.dtype, device: str
) -> None:
    """16-bit hidden states meet A in a product that is rounded to their dtype, as in a layer."""
    x = make(dtype, device)

    def definition(cast: torch.dtype) -> Tensors:
        same = {k: v if k == "tokens" else v.to(cast) for k, v in x.items()}
        head = (lambda y: widened(y, dtype)) if dtype in FLOATS16 else merged
        return solve(call, same, head, impl="reference")

    assert_matches(solve(call, x, impl=impl), definition)


@pytest.mark.parametrize("r", [1, 8, 11])
@pytest.mark.parametrize("impl", ["torch", "reference"])
@each_call
def test_any_rank_in_float64(call: Callable[..., Tensors], impl: str, r: int) -> None:
    x = make(F64, r=r)
    assert_near(solve(call, x, impl=impl), solve(call, x, merged, impl="reference"), 1e-12)


@pytest.mark.parametrize(("r", "columns"), [(1, 8), (8, 8), (11, 16)])
def test_rows_of_16_bits_stay_aligned(r: int, columns: int) -> None:
    x = make(BF16, r=r)
    head = StudentHead(x["hidden"], x["weight"])
    wide = with_adapter(head, kk.LowRank(x["A"], x["B"]))
    assert wide.weight.shape == (V, columns)
    assert in_one_dtype(wide).weight.shape == (V, H + columns)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_columns_that_the_teacher_lacks_have_no_gradient(impl: str, device: str) -> None:
    x = make(F32, device)
    x["t_weight"], x["tokens"] = x["t_weight"][:-3], x["tokens"].clamp(max=V - 4)
    ours = solve(exact_kd_call, x, impl=impl)
    assert_near(ours, solve(exact_kd_call, x, merged, impl="reference"), 1e-5)
    assert not ours["dB"][-3:].any()


def _k_ids(x: Tensors, head: dict[str, Any], **options: Any) -> Tensors:
    ids = torch.arange(4, device=x["tokens"].device) * 9 % V
    out = kk.linear_logprobs(
        tokens=x["tokens"], extra_tokens=ids.expand(N, 4), rest=True, **head, **options
    )
    loss = out.extra_logprobs.square().mean() + (out.rest_logprob * x["advantages"]).sum()
    return {"loss": loss, "extra_logprobs": out.extra_logprobs.detach()}


def _topk(x: Tensors, head: dict[str, Any], **options: Any) -> Tensors:
    logprobs, ids = (x["t_hidden"] @ x["t_weight"].T).log_softmax(1).topk(3)
    objective = kk.Objective(kd="topk_rkl", kd_coef=0.5)
    rows = {"advantages": x["advantages"], "teacher_topk": (ids, logprobs), "objective": objective}
    out = kk.kdrl_loss(tokens=x["tokens"], **rows, **head, **options)
    return {"loss": out.loss, "kl": out.kl}


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("call", [_k_ids, _topk])
def test_k_ids(call: Callable[..., Tensors], impl: str, device: str) -> None:
    x = make(F64 if impl == "torch" else F32, device)
    expected = solve(call, x, merged, impl="reference")
    assert_near(solve(call, x, impl=impl), expected, 1e-12 if impl == "torch" else 1e-5)


@pytest.mark.parametrize("impl", IMPLS)
@each_call
def test_an_adapter_of_zeros_changes_nothing_but_learns(
    call: Callable[..., Tensors], impl: str, device: str
) -> None:
    """PEFT begins with B = 0: then dA is 0, and dB is not."""
    x = make(F32, device)
    x["B"].zero_()
    ours = solve(call, x, impl=impl)
    assert not ours.pop("dA").any()
    assert (ours.pop("dB").abs().amax(dim=1) > 0).float().mean() > 0.9
    bare = solve(call, x, lambda y: merged(x) | {k: y[k] for k in ("hidden", "bias")}, impl=impl)
    assert_near(ours, {name: bare[name] for name in ours}, 1e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("cache", [0, 10**6])
def test_chunks_and_cache(rows: int, cache: int) -> None:
    x = make(F64)
    budgets = {"workspace_bytes": rows * 10_000, "impl": "torch"}
    expected = solve(logprobs_call, x)
    assert_near(solve(logprobs_call, x, cache_bytes=cache, **budgets), expected, 1e-12)
    for call in (kdrl_call, exact_kd_call, token_loss_call):
        assert_near(solve(call, x, **budgets), solve(call, x), 1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("call", [kdrl_call, logprobs_call, token_loss_call])
def test_rows_that_are_left_out_may_hold_nan(
    call: Callable[..., Tensors], impl: str, device: str
) -> None:
    x = make(F32, device)
    expected = solve(call, x, impl=impl)
    x["hidden"][2], x["hidden"][5] = torch.nan, torch.inf
    for name, value in solve(call, x, impl=impl).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_nan_in_a_row_that_counts_is_seen() -> None:
    x = make(F32)
    x["hidden"][0, 0] = torch.nan
    for call in CALLS.values():
        ours = solve(call, x)
        assert all(ours[name].isnan().any() for name in ("loss", "dA", "dB")), call


@pytest.mark.parametrize("impl", ["torch", "reference"])
@each_call
def test_float32_adapters_beside_16_bits(call: Callable[..., Tensors], impl: str) -> None:
    """Values are those of A and B rounded; their gradients are never rounded to 16 bits."""
    x = make(BF16)
    masters = x | {name: x[name].float() * (1 + 2**-10) for name in ("A", "B")}
    rounded = x | {name: masters[name].to(BF16) for name in ("A", "B")}
    ours, expected = solve(call, masters, impl=impl), solve(call, rounded, impl=impl)
    for name in ("dA", "dB"):
        assert ours[name].dtype == F32
        assert (ours[name] != ours[name].to(BF16).float()).float().mean() > 0.8, name
        ours[name] = ours[name].to(BF16)
    for name, value in expected.items():
        assert torch.equal(ours[name], value), name


def test_small_gradients_survive_float16() -> None:
    """Coefficients of 1e-9 would be 0 in float16 without a unit; dB is float32 here."""
    x = make(F16)
    x["B"], x["A"] = x["B"].float(), x["A"].float()
    expected = solve(kdrl_call, x)["dB"]
    x["weights"] = x["weights"].float() * 1e-9
    leaves = x | {"B": x["B"].requires_grad_()}
    options: dict[str, Any] = {"normalizer": 1e-9 * float(make(F16)["weights"].float().sum())}
    (0.7 * kdrl_call(leaves, adapted(leaves), **options)["loss"]).backward()
    assert relative_error(leaves["B"].grad, expected) < 1e-2


class _Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.sizes.add(out.untyped_storage().nbytes() // out.element_size())
        return out


@each_call
def test_no_gradient_of_the_weight_exists(
    call: Callable[..., Tensors], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one tensor as large as the weight is the copy [V, H + r]."""
    made = _Sizes()

    def recorded(module: Any, name: str) -> None:
        function = getattr(module, name)

        def wrapper(*args: Any, **options: Any) -> Any:
            with made:
                return function(*args, **options)

        monkeypatch.setattr(module, name, wrapper)

    recorded(one_pass, "run")
    recorded(logprobs, "score")
    recorded(logprobs, "gradients")
    solve(call, make(F32, r=8), impl="torch")
    assert {size for size in made.sizes if size >= V * H and size % V == 0} == {V * (H + 8)}


SKETCHES = {
    "sketched": kk.Sketch(threshold=0.1, seed=3, flat=math.inf),
    "partly": kk.Sketch(threshold=0.7, seed=3, flat=0.9 / V),
    "flat": kk.Sketch(threshold=1e-3, seed=3, flat=1e-4),
}
"""flat: entries of a row over V from which it is exact, for sketch_on."""


def sketch_on(device: str, name: str) -> kk.Sketch:
    """Return one of SKETCHES, whose flat rows are the same on each kind of device."""
    sketch = SKETCHES[name]
    return replace(sketch, flat=sketch.flat * COLUMNS_PER_ENTRY[torch.device(device).type])


def test_a_part_of_the_rows_is_flat(device: str) -> None:
    """Those whose coefficient is large, with a divergence over the vocabulary."""
    x, flat = make(F32, device), []
    for name in SKETCHES:
        out = kk.kdrl_loss(
            x["hidden"].requires_grad_(),
            x["weight"],
            x["tokens"],
            advantages=x["advantages"],
            teacher=kk.TeacherHead(x["t_hidden"], x["t_weight"]),
            objective=kk.Objective(kd="rkl", kd_coef=0.5),
            backward="sketch",
            sketch=sketch_on(device, name),
        )
        flat.append(out.metrics["flat_rows"].item())
    assert 0 == flat[0] < flat[1] < flat[2] == N


@pytest.mark.parametrize(
    ("impl", "name"), [*(("torch", name) for name in SKETCHES), ("triton", "partly")]
)
@each_call
def test_a_sketch_is_that_of_the_wider_head(
    call: Callable[..., Tensors], impl: str, name: str, device: str
) -> None:
    x, sketch = make(F32, device), sketch_on(device, name)
    options = {"backward": "sketch", "sketch": sketch, "impl": impl}
    expected = solve(call, x, lambda y: widened(y, F32), **options)
    assert_near(solve(call, x, **options), expected, 2e-6)
    if sketch.flat < math.inf:
        return
    exact = solve(call, x, impl=impl)
    assert relative_error(expected["dB"], exact["dB"]) > 1e-3


@each_call
def test_a_sketch_in_16_bits(call: Callable[..., Tensors]) -> None:
    x = make(BF16)
    for name in ("sketched", "partly"):
        options = {"backward": "sketch", "sketch": sketch_on("cpu", name)}
        expected = solve(call, x, lambda y: widened(y, BF16), **options)
        assert_near(solve(call, x, **options), expected, 2e-2)

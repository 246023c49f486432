"""patch_trl(): TRL's head by linear_logprobs gives the outputs and gradients of full logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS
from trl.trainer import utils

import kdrl_kernels as kk
from kdrl_kernels.integrations.trl import patch, patch_trl, unpatch_trl

N, H, V = 7, 16, 40
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7, "bias": True},
    "scale": {"scale": 0.25, "bias": True},
    "softcap": {"softcap": 3.0, "temperature": 1.3},
    "scale, then softcap": {"scale": 2.5, "softcap": 3.0, "bias": True, "temperature": 0.7},
}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    unpatch_trl()


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden, weight, bias and targets."""
    rng = torch.Generator().manual_seed(5)
    hidden, weight, bias = (
        torch.randn(*size, generator=rng, dtype=torch.float64) for size in ((N, H), (V, H), (V,))
    )
    targets = (hidden @ weight.T).argmax(1)  # half of them are the likeliest
    targets[::2] = torch.randint(V, (len(targets[::2]),), generator=rng)
    return *(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), targets


def call(function: Any, tensors: Any, outputs: Any = OPTIONAL_OUTPUTS, **options: Any) -> Any:
    """Call a fused head as add_fused_lm_head does."""
    hidden, weight, bias, targets = tensors
    bias = bias if options.get("bias") else None
    temperature, softcap = options.get("temperature", 1.0), options.get("softcap")
    arguments = hidden, weight, bias, targets, temperature, 32768, softcap
    return function.apply(*arguments, options.get("scale", 1.0), outputs)


class FullLogits:
    """The same by full logits."""

    @staticmethod
    def apply(*arguments: Any) -> tuple[Tensor, ...]:
        hidden, weight, bias, targets, temperature, _, softcap, scale, _ = arguments
        z = scale * (hidden @ weight.T + (0 if bias is None else bias))
        z = (z if softcap is None else softcap * (z / softcap).tanh()) / temperature
        logp = z.log_softmax(-1)
        chosen = logp.gather(1, targets[:, None]).squeeze(1)
        entropy = -(logp.exp() * logp).sum(1)
        squares = (2 * logp).logsumexp(1)
        return chosen, entropy, squares, z.mean(1), z.argmax(1) == targets


def gradients(outputs: Any, tensors: Any, entropy: bool = True) -> list[Tensor | None]:
    """Return the gradients of a weighted sum of log-probabilities and entropies."""
    weights = torch.linspace(-1, 2, N, dtype=outputs[0].dtype)
    total = (weights * outputs[0]).sum()
    if entropy:
        total = total + (weights.flip(0) * outputs[1]).sum()
    return list(torch.autograd.grad(total, tensors[:3], allow_unused=True))


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_outputs_and_gradients_are_those_of_full_logits(options: dict[str, Any]) -> None:
    tensors = head()
    ours = call(patch_trl(), tensors, **options)
    exact = call(FullLogits, tensors, **options)
    assert exact[4].any()
    assert not exact[4].all()
    for name, value, expected in zip(("log_probs", *OPTIONAL_OUTPUTS), ours, exact, strict=True):
        torch.testing.assert_close(value, expected, msg=name)
    torch.testing.assert_close(gradients(ours, tensors), gradients(exact, tensors))


def test_a_wrong_order_of_scale_and_softcap_would_be_seen() -> None:
    tensors = head()
    options = HEADS["scale, then softcap"]
    exact = call(FullLogits, tensors, **options)
    logits = kk.linear_logprobs(
        tensors[0], tensors[1], tensors[3], bias=tensors[2], softcap=3.0, temperature=0.7 / 2.5
    )
    assert (logits.logprobs - exact[0]).abs().max() > 0.1


def test_outputs_that_are_not_named_are_none() -> None:
    tensors = head()
    ours = call(patch_trl(), tensors, ("log_probs",))
    assert ours[1:] == (None,) * 4
    exact = call(FullLogits, tensors)
    torch.testing.assert_close(gradients(ours, tensors, False), gradients(exact, tensors, False))


def test_no_position_with_a_label_gives_gradients_of_zero() -> None:
    hidden, weight, bias, targets = head()
    ours = call(patch_trl(), (hidden[:0], weight, bias, targets[:0]), bias=True)
    assert [x.shape for x in ours] == [(0,)] * 5
    assert ours[4].dtype == torch.bool
    dhidden, dweight = torch.autograd.grad(ours[0].sum(), (hidden, weight))
    assert not dhidden.any()
    assert not dweight.any()


@pytest.mark.parametrize(
    "options", [HEADS["temperature"], HEADS["softcap"]], ids=["plain", "softcap"]
)
def test_autocast_rounds_the_operands_as_trl_does(options: dict[str, Any]) -> None:
    """Operands are rounded to bfloat16, as is dX; our logits are not, nor is their gradient."""
    tensors = head(torch.float32)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in tensors[:3]]
    exact = call(FullLogits, (*rounded, tensors[3]), **options)
    derivatives = gradients(exact, rounded)
    errors = []
    for function in (patch_trl(), ChunkedLogProbFunction):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = call(function, tensors, ("entropy",), **options)
        results = [*outputs[:2], *gradients(outputs, tensors)]
        assert all(x is None or x.dtype == torch.float32 for x in results)
        pairs = zip(results, [*exact[:2], *derivatives], strict=True)
        errors.append([0.0 if x is None else (x - y).abs().max().item() for x, y in pairs])
    ours, theirs = errors
    assert all(first < 0.1 * second for first, second in zip(ours[:2], theirs[:2], strict=True))
    assert all(first <= 2 * second for first, second in zip(ours[2:], theirs[2:], strict=True))


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_a_model_and_its_reference_have_the_same_log_probabilities(options: dict[str, Any]) -> None:
    """DPO and KTO name more outputs for the model than for the reference."""
    tensors, lean = head(torch.float32), patch_trl()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model, reference = (
            call(lean, tensors, outputs, **options)[0]
            for outputs in (("log_probs", "mean_logits"), ("log_probs",))
        )
    torch.testing.assert_close(model, reference, rtol=0, atol=0)


def test_a_head_in_float32_beside_a_16_bit_weight() -> None:
    """cast_lm_head_to_fp32: hidden states in float32, autocast off."""
    hidden, weight, bias, targets = head(torch.float32)
    half = weight.detach().bfloat16().requires_grad_()
    ours = call(patch_trl(), (hidden, half, bias, targets), bias=True)
    exact = call(FullLogits, (hidden, half.float(), bias, targets), bias=True)
    torch.testing.assert_close(ours[0], exact[0])
    assert torch.autograd.grad(ours[0].sum(), half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_left_to_trl(
    scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = head(torch.float32)
    lean = patch_trl()
    ours, theirs = (call(one, tensors, scale=scale) for one in (lean, ChunkedLogProbFunction))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert "logit_scale of the model must be positive for ours" in caplog.text


def test_the_mean_of_capped_logits_holds_few_of_them_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patch, "CAPPED_BYTES", 4 * V * 2)  # two rows
    sizes = []
    original = patch._capped

    def spy(logits: Tensor, cap: float) -> Tensor:
        sizes.append(len(logits))
        return original(logits, cap)

    monkeypatch.setattr(patch, "_capped", spy)
    options = HEADS["scale, then softcap"]
    ours, exact = (call(one, head(), **options) for one in (patch_trl(), FullLogits))
    torch.testing.assert_close(ours[3], exact[3])
    assert sizes == [2, 2, 2, 1]


def test_cached_logits_give_the_same_gradients_in_less_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = head(torch.float32)
    sizes = []
    original = kk.linear_logprobs

    def spy(*arguments: Any, **options: Any) -> Any:
        sizes.append(options["cache_bytes"])
        return original(*arguments, **options)

    monkeypatch.setattr(patch.kk, "linear_logprobs", spy)
    results = []
    for size in (0, 1 << 20):
        lean = patch_trl(cache_bytes=size)
        results.append(gradients(call(lean, tensors, ("entropy",)), tensors))
    assert sizes == [0, 1 << 20]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_each_call_takes_another_sketch_of_the_same_expectation() -> None:
    tensors = head(torch.float32)
    lean = patch_trl(backward="sketch", sketch_threshold=0.5, sketch_seed=3)
    lean.sketch = kk.Sketch(0.5, seed=3, flat=torch.inf)  # all rows: the vocabulary is tiny
    drawn = [gradients(call(lean, tensors, ("log_probs",)), tensors, False)[0] for _ in range(400)]
    assert not any(torch.equal(first, second) for first, second in pairwise(drawn[:10]))
    exact = gradients(call(FullLogits, tensors), tensors, False)[0]
    mean = torch.stack(drawn).mean(0)
    spread = torch.stack(drawn).std(0).norm() / 400**0.5
    assert (mean - exact).norm() < 3 * spread
    unpatch_trl()
    again = patch_trl(backward="sketch", sketch_threshold=0.5, sketch_seed=3)
    again.sketch = lean.sketch
    first = gradients(call(again, tensors, ("log_probs",)), tensors, False)[0]
    torch.testing.assert_close(first, drawn[0], rtol=0, atol=0)


def test_processes_draw_different_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch.dist, "is_initialized", lambda: True)
    original, drawn, rows = patch._outputs, [], []

    def spy(*arguments: Any) -> Any:
        drawn.append(arguments[-1].sketch)
        return original(*arguments)

    monkeypatch.setattr(patch, "_outputs", spy)
    for rank in (0, 1):
        monkeypatch.setattr(patch.dist, "get_rank", lambda rank=rank: rank)
        call(patch_trl(backward="sketch"), head(torch.float32))
        rows.append((drawn[-1].seed, drawn[-1].rows))
    assert rows == [(0, 0), (0, patch.RANK_ROWS)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backward": "no"}, ValueError, 'backward must be "exact" or "sketch", got \'no\''),
        ({"sketch_threshold": 0.1}, ValueError, "sketch_threshold must be None with"),
        ({"backward": "sketch", "sketch_threshold": 2.0}, ValueError, "threshold must be in"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes must"),
        ({"sketch_seed": 0.5}, TypeError, "sketch_seed must be"),
    ],
    ids=str,
)
def test_options_that_cannot_be_right_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        patch_trl(**options)
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


class Partitioned:
    """Stands for ZeRO-3: the weight is empty but inside of maybe_gather_lm_head_ctx."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.whole, self.entered = weight, weight.detach().clone(), 0
        self.weight.data = torch.empty(0, dtype=weight.dtype)

    @contextmanager
    def gathered(self, *parameters: Any) -> Iterator[None]:
        assert parameters[0] is self.weight
        self.entered += 1
        self.weight.data = self.whole
        yield
        self.weight.data = torch.empty(0, dtype=self.whole.dtype)


@pytest.fixture
def partitioned(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Partitioned]:
    tensors = head()
    shards = Partitioned(tensors[1])
    monkeypatch.setattr(patch, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", shards.gathered)
    return tensors, shards


@pytest.mark.parametrize(
    "options", [HEADS["bias"], HEADS["scale, then softcap"]], ids=["bias", "softcap"]
)
@pytest.mark.parametrize("entropy", [True, False])
def test_a_weight_that_is_freed_after_forward(
    partitioned: tuple[Any, Partitioned], options: dict[str, Any], entropy: bool
) -> None:
    tensors, shards = partitioned
    names = ("entropy", "log_sum_sq_probs", "is_top1")
    with shards.gathered(tensors[1]):
        ours = call(patch_trl(), tensors, names, **options)
    assert not tensors[1].numel()
    results = gradients(ours, tensors, entropy)
    assert shards.entered == 2
    whole = [tensors[0], shards.whole.clone().requires_grad_(), *tensors[2:]]
    exact = call(FullLogits, whole, **options)
    for index in (0, 1, 2, 4):
        torch.testing.assert_close(ours[index], exact[index])
    torch.testing.assert_close(results, gradients(exact, whole, entropy))


def test_a_sketch_of_a_weight_that_is_freed_ignores_the_size_of_the_loss(
    partitioned: tuple[Any, Partitioned],
) -> None:
    """A sketch that knows small coefficients would get coarse; here they hold the normaliser."""
    tensors, shards = partitioned
    lean = patch_trl(backward="sketch", sketch_threshold=0.1)
    lean.sketch = kk.Sketch(0.1, flat=torch.inf)
    counts = []
    for size in (1.0, 1e-6):
        lean.calls = 0
        with shards.gathered(tensors[1]):
            logprobs = call(lean, tensors, ("log_probs",))[0]
        gradient = torch.autograd.grad(size * logprobs.sum(), tensors[0])[0]
        counts.append(gradient / size)
    torch.testing.assert_close(*counts)


def test_a_cache_is_refused_under_zero3(partitioned: tuple[Any, Partitioned]) -> None:
    tensors, shards = partitioned
    with shards.gathered(tensors[1]), pytest.raises(ValueError, match=r"cache_bytes .* must be 0"):
        call(patch_trl(cache_bytes=1), tensors)


def test_the_patch_comes_off() -> None:
    own_choice = utils._use_triton
    with patch_trl() as lean:
        assert utils._ChunkedLogProbFunction is lean
        assert utils._use_triton(torch.device("cpu"))
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    assert utils._use_triton is own_choice


def test_a_patch_inside_of_another_gives_it_back() -> None:
    own_choice = utils._use_triton
    with patch_trl() as outer:
        with patch_trl(backward="sketch") as inner:
            assert utils._ChunkedLogProbFunction is inner
        assert utils._ChunkedLogProbFunction is outer
        assert utils._use_triton(torch.device("cpu"))
    assert utils._use_triton is own_choice

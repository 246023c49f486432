"""A composite teacher is the normalised product of its teachers' powers, in every function."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from tests.kernels.params import F32, F64, IMPLS

N, V = 5, 23
WEIGHTS = {
    "extrapolation": (1.3, -0.3),
    "interpolation": (0.25, 0.75),
    "geometric mean": (1 / 3, 1 / 3, 1 / 3),
    "one of two": (1.0, 0.0),
    "contrast": (1.0, 0.7, -0.7),
    "one": (0.5,),
}
BY_WEIGHTS = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
TEMPERATURES: tuple[float | Tensor, ...] = (0.7, torch.linspace(0.5, 1.5, N), 1.0)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperatures": {"temperatures": TEMPERATURES},
    "biases": {"biased": (0, 2)},
    "all": {"temperatures": TEMPERATURES, "biased": (0, 1, 2), "forbidden": (3, 8)},
}


def _heads(
    count: int,
    *,
    temperatures: tuple[float | Tensor, ...] = (1.0,) * 3,
    biased: tuple[int, ...] = (),
    forbidden: tuple[int, ...] = (),
    dtype: torch.dtype = F64,
) -> list[kk.TeacherHead]:
    """Make teachers of different hidden sizes and vocabularies; head i forbids forbidden[i]."""
    rng = torch.Generator().manual_seed(0)
    heads = []
    for i, (H, extra) in enumerate(((7, 2), (10, 0), (4, 5))[:count]):
        hidden = torch.randn(N, H, generator=rng, dtype=F64)
        weight = torch.randn(V + extra, H, generator=rng, dtype=F64)
        bias = torch.randn(V + extra, generator=rng, dtype=F64)
        if i < len(forbidden):
            bias[forbidden[i]] = -torch.inf
        tensors = (x.to(dtype) for x in (hidden, weight, bias))
        head = kk.TeacherHead(*tensors, temperatures[i])
        heads.append(head if i in biased else replace(head, bias=None))
    return heads


def _logq(head: kk.TeacherHead, vocab: int) -> Tensor:
    z = head.hidden @ head.weight[:vocab].T
    z = z if head.bias is None else z + head.bias[:vocab]
    T = head.temperature
    return (z / (T[:, None] if isinstance(T, Tensor) else T)).log_softmax(dim=1)


def _by_hand(
    heads: list[kk.TeacherHead], weights: tuple[float, ...], vocab: int | None = None
) -> Tensor:
    """Return log q of the composite [N, vocab] from the log-probabilities of its teachers."""
    vocab = vocab or min(len(head.weight) for head in heads)
    logq = [_logq(head, vocab) for head in heads]
    forbidden = torch.stack([x == -torch.inf for x in logq]).any(dim=0)
    pairs = zip(weights, logq, strict=True)
    total = sum(w * x.masked_fill(forbidden, 0) for w, x in pairs)
    return total.masked_fill(forbidden, -torch.inf).log_softmax(dim=1)


def _student() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    sizes = {"hidden": N, "weight": V}
    return {
        name: torch.randn(size, 6, generator=rng, dtype=F64).requires_grad_()
        for name, size in sizes.items()
    }


@BY_WEIGHTS
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_linear_logprobs_of_a_composite(weights: tuple[float, ...], kind: dict[str, Any]) -> None:
    heads = _heads(len(weights), **kind)
    composite = kk.composite_teacher(heads, weights)
    exact = _by_hand(heads, weights)
    assert composite.temperature == 1.0
    assert len(composite.weight) == exact.shape[1]
    for token in range(0, exact.shape[1], 3):
        tokens = torch.full((N,), token)
        ours = kk.linear_logprobs(
            composite.hidden, composite.weight, tokens, bias=composite.bias
        ).logprobs
        torch.testing.assert_close(ours, exact[:, token], rtol=1e-12, atol=1e-12)


@BY_WEIGHTS
@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("kd", ["rkl", "k2"])
def test_kdrl_loss_with_a_composite(weights: tuple[float, ...], kd: Any, impl: str) -> None:
    """Value and gradient are those of the teacher with the combined log-probabilities."""
    forbidden = () if kd == "rkl" else (3, 8)  # for "rkl" it would be infinite
    heads = _heads(len(weights), **KINDS["all"] | {"forbidden": forbidden})
    exact = _by_hand(heads, weights, vocab=V)
    tokens = torch.tensor([0, 5, 11, 17, 22])
    by_hand: dict[str, Any] = {"teacher": kk.TeacherHead(exact, torch.eye(V, dtype=F64))}
    if kd == "k2":
        by_hand = {"teacher_logprobs": exact.gather(1, tokens[:, None])[:, 0]}
    results = []
    for options in ({"teacher": kk.composite_teacher(heads, weights)}, by_hand):
        student = _student()
        out = kk.kdrl_loss(
            **student,
            tokens=tokens,
            advantages=torch.linspace(-1, 1, N, dtype=F64),
            objective=kk.Objective(kd=kd, kd_coef=1.0),
            vocab_size=V,
            impl=impl,
            **options,
        )
        out.loss.backward()
        results.append((out.loss.detach(), out.teacher_logprobs, student["hidden"].grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
def test_every_implementation_in_float32(impl: str, device: str) -> None:
    heads = [
        replace(
            head,
            hidden=head.hidden.to(device),
            weight=head.weight.to(device),
            bias=None if head.bias is None else head.bias.to(device),
        )
        for head in _heads(2, dtype=F32, biased=(1,), forbidden=(3, 8))
    ]
    composite = kk.composite_teacher(heads, (1.3, -0.3))
    tokens = torch.arange(N, device=device)
    out = kk.linear_logprobs(
        composite.hidden, composite.weight, tokens, bias=composite.bias, impl=impl
    )
    exact = _by_hand(_heads(2, biased=(1,), forbidden=(3, 8)), (1.3, -0.3))
    expected = exact[range(N), range(N)].float()
    torch.testing.assert_close(out.logprobs.cpu(), expected, rtol=2e-5, atol=2e-5)


def test_a_token_that_one_teacher_forbids_is_forbidden() -> None:
    """Also where the weight of that teacher is negative or 0."""
    for weights in ((1.3, -0.3), (1.0, 0.0), (-1.0, 2.0)):
        heads = _heads(2, biased=(0, 1), forbidden=(3, 8))
        composite = kk.composite_teacher(heads, weights)
        assert composite.bias is not None
        assert composite.bias.isneginf().nonzero().flatten().tolist() == [3, 8]
        assert composite.weight.isfinite().all()
        logq = _logq(composite, V)
        assert (logq.exp()[:, [3, 8]] == 0).all()
        assert not logq.isnan().any()


def test_batches() -> None:
    temperatures = (0.7, torch.linspace(0.5, 1.5, N), 1.0)
    flat = _heads(3, temperatures=temperatures, biased=(1,))
    batch = [
        replace(
            head,
            hidden=head.hidden[None],
            temperature=T[None] if isinstance(T, Tensor) else T,
        )
        for head, T in zip(flat, temperatures, strict=True)
    ]
    weights = (0.5, 0.7, -0.2)
    ours, expected = kk.composite_teacher(batch, weights), kk.composite_teacher(flat, weights)
    assert torch.equal(ours.hidden[0], expected.hidden)
    assert torch.equal(ours.weight, expected.weight)


@pytest.mark.parametrize("biased", [(), (0,)], ids=["no bias", "bias"])
def test_a_composite_is_concatenated_once(biased: tuple[int, ...]) -> None:
    """Later steps take its memory, whatever the hidden states, temperatures and numbers are."""
    first = kk.composite_teacher(_heads(2, biased=biased), (1.3, -0.3))
    later = _heads(2, biased=biased, temperatures=TEMPERATURES)
    later = [replace(head, hidden=head.hidden.flip(0)) for head in later]
    H = later[0].hidden.shape[1]
    views = [replace(later[0], weight=first.weight[:, :H], bias=None), later[1]]
    if biased:
        views[0] = replace(later[0], weight=first.weight[:, :H], bias=later[0].bias[:V])
    ours = kk.composite_teacher(views, (1.5, -0.5), reuse=first)
    assert ours.weight.data_ptr() == first.weight.data_ptr()
    expected = kk.composite_teacher(later, (1.5, -0.5))
    for name in ("hidden", "weight"):
        assert torch.equal(getattr(ours, name), getattr(expected, name))
    torch.testing.assert_close(_logq(ours, V), _by_hand(later, (1.5, -0.5)), rtol=1e-12, atol=1e-12)


def test_a_composite_of_some_rows_is_some_rows_of_the_composite() -> None:
    """So a rank that has these rows of all weights has those of the composite (vocab_group)."""
    heads, rows = _heads(2, biased=(0, 1), forbidden=(3, 8)), slice(5, 14)
    parts = [replace(head, weight=head.weight[rows], bias=head.bias[rows]) for head in heads]
    ours, whole = (kk.composite_teacher(x, (1.3, -0.3)) for x in (parts, heads))
    assert torch.equal(ours.hidden, whole.hidden)
    assert torch.equal(ours.weight, whole.weight[rows])
    assert torch.equal(ours.bias, whole.bias[rows])


def test_columns_of_biases_keep_rows_of_16_bytes() -> None:
    heads = _heads(2, dtype=torch.bfloat16, biased=(0, 1))
    assert kk.composite_teacher(heads, (0.5, 0.5)).weight.shape == (V, 7 + 10 + 8)
    heads = _heads(2, dtype=torch.bfloat16)
    assert kk.composite_teacher(heads, (0.5, 0.5)).weight.shape == (V, 7 + 10)


def test_a_composite_is_never_trained() -> None:
    heads = _heads(2)
    leaf = torch.randn(N, 7, dtype=F64, requires_grad=True)
    composite = kk.composite_teacher([replace(heads[0], hidden=leaf * 2), heads[1]], (0.5, 0.5))
    assert not composite.hidden.requires_grad


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_loud(temperature: float) -> None:
    temperatures = torch.tensor([1.0, temperature, 1.0, 1.0, 1.0])
    composite = kk.composite_teacher(_heads(2, temperatures=(1.0, temperatures)), (0.5, 0.5))
    assert composite.hidden.isnan().any(dim=1).tolist() == [False, True, False, False, False]


A, B = _heads(2)
REUSE = kk.composite_teacher([A, B], (0.5, 0.5))
ERRORS: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    ([], [], {}, ValueError, "one number for each of one or more heads, got 0 for 0 heads"),
    ([A, B], [1.0], {}, ValueError, "weights must be one number for each .* got 1 for 2 heads"),
    (A, [1.0], {}, TypeError, "heads must be a list or tuple of TeacherHeads, got TeacherHead"),
    ([A], 1.0, {}, TypeError, "weights must be a list or tuple of numbers, got float"),
    ([A], torch.ones(1), {}, TypeError, r"weights must be .*, got Tensor: take .tolist\(\)"),
    ([A, "B"], [1, 1], {}, TypeError, r"heads\[1\] must be a TeacherHead, got str"),
    ([A, B], [1, "x"], {}, TypeError, r"weights\[1\] must be a number, got 'x'"),
    ([A, B], [1, torch.inf], {}, ValueError, r"weights\[1\] must be finite, got inf"),
    (
        [A, replace(B, softcap=30.0)],
        [1, 1],
        {},
        ValueError,
        r"heads\[1\].softcap must be None, got 30.0: capped logits are not linear",
    ),
    (
        [A, replace(B, hidden=B.hidden[1:])],
        [1, 1],
        {},
        ValueError,
        r"heads\[1\].hidden must have the rows of heads\[0\].hidden \[5\], got \[4, 10\]",
    ),
    (
        [A, _heads(2, dtype=F32)[1]],
        [1, 1],
        {},
        TypeError,
        r"heads\[1\].hidden must have the dtype of heads\[0\].hidden \(torch.float64\), got",
    ),
    (
        [A, replace(B, hidden=B.hidden.to("meta"), weight=B.weight.to("meta"))],
        [1, 1],
        {},
        ValueError,
        r"heads\[1\].hidden must be on the device of heads\[0\].hidden \(cpu\), got meta",
    ),
    ([A, A], [1, 1], {"reuse": REUSE}, ValueError, r"with weight \[25, 14\] and no bias, got"),
    (
        [A, B],
        [1, 1],
        {"reuse": replace(REUSE, bias=torch.zeros(V, dtype=F64))},
        ValueError,
        r"with weight \[23, 17\] and no bias, got weight \[23, 17\] and a bias",
    ),
    ([A, B], [1, 1], {"reuse": 1}, TypeError, "reuse must be a TeacherHead or None, got int"),
]


@pytest.mark.parametrize(
    ("heads", "weights", "options", "error", "message"),
    ERRORS,
    ids=[row[-1][:40] for row in ERRORS],
)
def test_errors(
    heads: Any, weights: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        kk.composite_teacher(heads, weights, **options)

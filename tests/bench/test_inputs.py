"""Tests the floor and the inputs of bench/."""

from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil, log
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench import definition, floor
from bench.floor import Floor
from bench.inputs import PROFILES, Inputs, make_inputs
from bench.ops import OPS, OPS_BY_NAME, Op
from bench.shapes import SHAPES, TINY, Shape

GRPO = OPS_BY_NAME["GRPO"]
ODD = replace(TINY, name="odd", N=37, H=65, V=513, H_t=97, V_t=511)
"""No two sizes are equal, and the student knows more tokens."""
FEW = replace(TINY, name="few", N=256, V=600, V_t=40)
"""The teacher knows 40 of the student's 600 tokens."""
CPU_SMALL = SHAPES["cpu-small"]


def _name(one: Any) -> str:
    return str(getattr(one, "name", one))


@pytest.fixture(scope="module", params=[TINY, ODD], ids=_name)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return make_inputs(request.param, device="cpu", teachers=2)


def _add_mm_flop(_: Any, a: Sequence[int], b: Sequence[int], **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("rows", [8, 2048], ids="{} rows".format)
@pytest.mark.parametrize("op", OPS, ids=_name)
def test_floor_does_the_flop_of_the_operation(inputs: Inputs, op: Op, rows: int) -> None:
    gemms, shape = Floor(inputs, rows), inputs.shape
    in_place = {torch.ops.aten.addmm_: _add_mm_flop}  # torch leaves it out
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        gemms.run(op)
    flop, row_flop = counted.get_total_flops(), 2 * shape.H * shape.V
    # a chunk's active rows are whole ones: half a row off each, for each gradient
    rounded = ceil(shape.N / rows) * row_flop * len(op.gradients) / 2 if op.active < 1 else 0
    error = abs(flop - op.flop(shape))
    assert error <= rounded + 1e-12 * flop, (flop, op.flop(shape))
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted_again:
        gemms.run(op, projections=2)
    assert counted_again.get_total_flops() == flop + shape.unit_flop


@pytest.mark.parametrize(
    ("gigabytes", "rows"), [(150, 16384), (85, 11520), (40, 5376), (10, 2048)], ids=str
)
def test_chunks_of_the_floor_are_as_large_as_a_gpu_has_room(
    gigabytes: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of the reference shape takes 6 V bytes, and an eighth of the memory is for them."""
    memory = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(floor, "DEVICE", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    assert floor.chunk_rows(SHAPES["reference"]) == rows
    assert floor.chunk_rows(TINY) == TINY.N


def test_the_floor_reads_a_gradient_like_that_of_a_softmax(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor, "FILLED_ROWS", 8)  # so that several parts are filled
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    expected = (hidden @ weight.T).softmax(dim=1) * inputs.advantages[:, None]
    torch.testing.assert_close(Floor(inputs).dz, expected)


# inputs


@pytest.fixture(scope="module")
def small() -> dict[str, Inputs]:
    """Return inputs of the shape cpu-small, by profile."""
    return {profile: make_inputs(CPU_SMALL, profile, "cpu") for profile in PROFILES}


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    values = {one.name: getattr(inputs, one.name) for one in fields(inputs)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _logp(inputs: Inputs, who: str) -> Tensor:
    """Return log-probabilities of student ("") or teacher ("teacher_"): [N, V] in float64."""
    hidden, weight = getattr(inputs, f"{who}hidden"), getattr(inputs, f"shared_{who}weight")
    return (hidden.detach().double() @ weight.detach().double().T).log_softmax(dim=1)


def test_profile_of_the_entropy_cpu_small_float32(small: dict[str, Inputs]) -> None:
    entropy = small["reasoning"].entropy
    assert 0.40 <= (entropy < 0.01).double().mean() <= 0.62
    assert 0.15 <= (entropy > 0.67).double().mean() <= 0.28
    assert (small["flat"].entropy >= 0.01).all()
    low, high = make_inputs(CPU_SMALL, "hard", "cpu").entropy.quantile(torch.tensor([0.25, 0.75]))
    assert 2.5 < low < high < 4.5  # 3.7 to 4.8 at V = 32,768


def test_hard_tokens_of_rl_have_fewer_nats_than_those_of_reasoning(
    small: dict[str, Inputs],
) -> None:
    entropy, other = make_inputs(CPU_SMALL, "rl", "cpu").entropy, small["reasoning"].entropy
    assert 0.40 <= (entropy < 0.01).double().mean() <= 0.62
    assert 0.15 <= (entropy > 0.67).double().mean() <= 0.28
    assert entropy.max() < 5  # 5.3 at V = 32,768
    assert other.quantile(0.95) > 5


@pytest.mark.parametrize("profile", PROFILES)
def test_entropy_is_of_the_students_logits(small: dict[str, Inputs], profile: str) -> None:
    inputs = small[profile]
    logp = _logp(inputs, "")
    exact = -(logp.exp() * logp).sum(dim=1)
    logits = (inputs.hidden @ inputs.weight.T).detach().abs().max().item()
    bound = 16 * torch.finfo(torch.float32).eps * logits * (1 + exact.max().item())
    assert (inputs.entropy - exact).abs().max() < bound


def test_tokens_are_sampled(small: dict[str, Inputs]) -> None:
    """A sampled token's log-probability is minus the entropy on average; the likeliest has more."""
    inputs = small["flat"]
    logp = _logp(inputs, "")
    chosen = logp.gather(1, inputs.tokens[:, None]).squeeze(1)
    excess = chosen + inputs.entropy
    standard_error = excess.std() / len(excess) ** 0.5
    assert abs(excess.mean()) < 4 * standard_error
    assert (logp.amax(dim=1) + inputs.entropy).mean() > 8 * standard_error
    off = (inputs.old_logprobs - chosen).abs()
    assert 0.005 < off.mean() < 0.05, "a ratio of about 1, but not of 1"
    assert off.max() < 0.2, "inside the clip range"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("shape", [FEW, replace(FEW, name="many", V=40, V_t=600), TINY], ids=_name)
def test_tokens_are_of_both_models(shape: Shape, profile: str) -> None:
    tokens = make_inputs(shape, profile, "cpu").tokens
    assert tokens.shape == (shape.N,)
    assert tokens.min() >= 0
    assert tokens.max() < min(shape.V, shape.V_t)
    assert len(tokens.unique()) > 16


def test_same_seed_same_inputs() -> None:
    first, same_seed, other = (
        _tensors(make_inputs(ODD, device="cpu", seed=n, teachers=2)) for n in (3, 3, 4)
    )
    assert len(first) == 15
    for name, value in first.items():
        assert torch.equal(value, same_seed[name]), name
        assert not torch.equal(value, other[name]), name
    for name, value in _tensors(make_inputs(ODD, device="cpu", seed=3)).items():
        assert torch.equal(value, first[name]), "a second teacher changes nothing else"


@pytest.mark.parametrize(("N", "zeros"), [(37, 19), (256, 128)])
def test_half_of_the_advantages_are_zero(N: int, zeros: int) -> None:
    inputs = make_inputs(replace(TINY, N=N), device="cpu")
    zero = inputs.half_advantages == 0
    assert zero.sum() == zeros
    assert torch.equal(inputs.half_advantages[~zero], inputs.advantages[~zero])
    assert (inputs.advantages != 0).all()
    changes = (zero[1:] != zero[:-1]).sum()
    assert changes > N // 4, "zeros are not at random places"


@pytest.mark.parametrize(
    ("shape", "profile"),
    [
        (CPU_SMALL, "reasoning"),
        (CPU_SMALL, "flat"),
        (SHAPES["cpu-ragged"], "reasoning"),
        pytest.param(
            replace(CPU_SMALL, name="wide-teacher", H=128, H_t=512),
            "reasoning",
        ),
    ],
    ids=_name,
)
def test_teacher_differs_a_little(shape: Shape, profile: str) -> None:
    inputs = make_inputs(shape, profile, "cpu")
    p, q = _logp(inputs, ""), _logp(inputs, "teacher_")
    kl = (p.exp() * (p - q)).sum(dim=1)
    unrelated = (p.exp() * (p - q.roll(1, 0))).sum(dim=1)  # the teacher of another token
    assert 0.02 < kl.mean() < 1, "its KL is a fraction of a nat"
    assert kl.mean() < unrelated.mean() / 4


def test_unknown_profile_is_named() -> None:
    with pytest.raises(ValueError, match=r"one of reasoning, rl, flat, hard, got 'steep'$"):
        make_inputs(TINY, "steep", "cpu")


def test_shared_weight_is_cut_where_the_models_differ() -> None:
    """Equal models keep the tensor itself: a slice would cost a copy of its gradient."""
    more, fewer, same = (
        make_inputs(shape, device="cpu") for shape in (FEW, replace(FEW, V=40, V_t=600), TINY)
    )
    assert torch.equal(more.shared_weight, more.weight[:40])
    assert more.shared_teacher_weight is more.teacher_weight
    assert fewer.shared_weight is fewer.weight
    assert torch.equal(fewer.shared_teacher_weight, fewer.teacher_weight[:40])
    assert same.shared_weight is same.weight
    assert same.shared_teacher_weight is same.teacher_weight


@pytest.mark.parametrize("shape", [CPU_SMALL, FEW, TINY], ids=_name)
@pytest.mark.parametrize("profile", PROFILES)
def test_the_teachers_best_tokens(shape: Shape, profile: str) -> None:
    inputs = make_inputs(shape, profile, "cpu")
    K = min(64, min(shape.V, shape.V_t) - 1)
    best = _logp(inputs, "teacher_").topk(K, dim=1)
    logprobs = inputs.teacher_topk_logprobs
    assert torch.allclose(logprobs.double(), best.values + log(1 - 1e-4), rtol=1e-5, atol=2e-6)
    # a tie of float32 may be in another order
    assert (inputs.teacher_topk_tokens == best.indices).double().mean() > 0.99
    assert (1 - logprobs.double().exp().sum(dim=1)).min() > 0.9e-4


@pytest.mark.parametrize("profile", PROFILES)
def test_the_adapter_leaves_no_ratio_clipped(profile: str) -> None:
    inputs = make_inputs(CPU_SMALL, profile, "cpu")
    with torch.no_grad():
        with_adapter = definition.student_logprobs(inputs, OPS_BY_NAME["GRPO, head adapter"])
        without = definition.student_logprobs(inputs, GRPO)
    assert (with_adapter - without).abs().max() > 0.01
    chosen = with_adapter.gather(1, inputs.tokens[:, None]).squeeze(1)
    assert (chosen - inputs.old_logprobs).abs().max() < log(1.2)
    merged = inputs.weight + 2 * inputs.adapter_b @ inputs.adapter_a
    assert torch.allclose(with_adapter, (inputs.hidden @ merged.T).log_softmax(dim=1), atol=1e-4)


def test_the_reverse_kl_of_the_best_tokens_has_one_bucket_for_the_rest() -> None:
    inputs = make_inputs(TINY, "flat", "cpu")
    p, ids = _logp(inputs, "").exp(), inputs.teacher_topk_tokens
    q_best = inputs.teacher_topk_logprobs.double().exp()
    q = torch.cat([q_best, 1 - q_best.sum(dim=1, keepdim=True)], dim=1)
    rest = p.scatter(1, ids, 0).sum(dim=1, keepdim=True)
    both = torch.cat([p.gather(1, ids), rest], dim=1)
    expected = (both * (both.log() - q.log())).sum(dim=1)
    assert expected.min() > 0.01
    assert torch.allclose(definition.topk_reverse_kl(p.log(), inputs), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [ODD, FEW], ids=_name)
def test_two_teachers_are_their_geometric_mean(shape: Shape) -> None:
    inputs = make_inputs(shape, "flat", "cpu", teachers=2)
    assert inputs.both_hidden is not None
    assert inputs.both_weights is not None
    halves = [x.double().chunk(2, dim=1) for x in (inputs.both_hidden, inputs.both_weights)]
    V = min(shape.V, shape.V_t)
    first, second = (
        (hidden @ weight[:V].T).softmax(dim=1) for hidden, weight in zip(*halves, strict=True)
    )
    assert torch.allclose(first.log(), _logp(inputs, "teacher_"), rtol=1e-10)
    assert (first * (first / second).log()).sum(dim=1).min() > 0.01
    mean = (first * second).sqrt()
    logq = definition.teacher_logprobs(inputs, OPS_BY_NAME["KDRL, two teachers"])
    assert torch.allclose(logq.double().exp(), mean / mean.sum(dim=1, keepdim=True), rtol=1e-4)
    with pytest.raises(ValueError, match=r"made with teachers=2, got those of one teacher$"):
        definition.teacher_logprobs(
            make_inputs(shape, "flat", "cpu"), OPS_BY_NAME["KDRL, two teachers"]
        )


def test_the_weight_of_a_divergence_is_larger_where_the_teacher_is_sure() -> None:
    inputs, op = make_inputs(TINY, "reasoning", "cpu"), OPS_BY_NAME["entropy-weighted reverse KL"]
    logp, logq = _logp(inputs, ""), _logp(inputs, "teacher_")
    results = definition.row_results(inputs, op, logp, logq)
    entropy = -(logq.exp() * logq).sum(dim=1)
    assert entropy.max() - entropy.min() > 1
    assert results.losses is not None
    assert torch.allclose(results.losses, (-entropy).exp() * results.outputs["kl"], rtol=1e-10)


def test_the_mean_of_both_divergences() -> None:
    inputs = make_inputs(TINY, "flat", "cpu")
    logp, logq = _logp(inputs, ""), _logp(inputs, "teacher_")
    p, q = logp.exp(), logq.exp()
    expected = ((p - q) * (logp - logq)).sum(dim=1) / 2  # half of Jeffreys' divergence
    assert torch.allclose(definition.divergence("rkl+fkl", logp, logq), expected, rtol=1e-10)

"""The Triton row kernels match PyTorch's over many blocks, in place, and compacted."""

from dataclasses import replace

import pytest
import torch

from kdrl_kernels.buffers import gradient_view
from kdrl_kernels.compaction import Compaction
from kdrl_kernels.rows import load
from kdrl_kernels.rows.streams import Stream, TeacherStream
from kdrl_kernels.rows.tiles import Tile
from kdrl_kernels.token_rows import Coefficients

N, V = 5, 150
TILES = [Tile(1, 16, 4), Tile(4, 16, 4), Tile(2, 128, 4)]
"""Many blocks, several deep, and one that the row does not fill."""


def _teacher(logits: torch.Tensor, kd: str) -> TeacherStream:
    return TeacherStream(logits, 1.0, None, kd, 0.3, entropy=True)


def _streams(
    kd: str | None, softcap: float | None, device: str
) -> tuple[Stream, TeacherStream | None]:
    rng = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 8, V)  # the running maximum moves in every block
    student = torch.randn(N, V, generator=rng) + ramp
    teacher = torch.randn(N, V, generator=rng) + ramp.flip(0)
    return (
        Stream(student.to(device), torch.linspace(0.7, 1.3, N).to(device), softcap),
        _teacher(teacher.to(device), kd) if kd else None,
    )


def _coefficients(kd: str | None, device: str) -> Coefficients:
    coef = torch.randn(5, N, generator=torch.Generator().manual_seed(1)).to(device)
    forward = coef[3] if kd == "rkl+fkl" else None
    return Coefficients(coef[0], coef[1], coef[2] if kd else None, forward, coef[4])


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.depth}x{tile.lanes}")
@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [
        pytest.param(torch.float32, None, id="float32-plain"),
        pytest.param(torch.float32, 5.0, id="float32-softcap", marks=pytest.mark.slow),
        pytest.param(torch.float16, None, id="float16-plain"),
        pytest.param(torch.float16, 5.0, id="float16-softcap", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "kd",
    [None, "rkl", "jsd", *(pytest.param(x, marks=pytest.mark.slow) for x in ("fkl", "rkl+fkl"))],
)
def test_tiles(
    kd: str | None, dtype: torch.dtype, softcap: float | None, tile: Tile, device: str
) -> None:
    tokens = torch.tensor([0, 15, 16, 149, 77], device=device)
    coef = _coefficients(kd, device)
    results = {}
    for impl, options in (("torch", {}), ("triton", {"tile": tile})):
        work = load(impl)
        student, teacher = _streams(kd, softcap, device)
        stats = work.sweep(student, tokens, entropy=True, teacher=teacher, **options)
        out = gradient_view(student.logits, dtype)
        dz = work.gradient(student, tokens, stats, coef, out=out, teacher=teacher, **options)
        assert dz.data_ptr() == student.logits.data_ptr()  # in place
        results[impl] = stats, dz.float()
    (expected, expected_dz), (stats, dz) = results["torch"], results["triton"]
    names = ["max", "log_sum", "logprobs", "entropy"]
    names += ["teacher_logprobs", "kl", "teacher_entropy"] if kd else []
    names += {"jsd": ["mixture_kl"], "rkl+fkl": ["forward_kl"]}.get(kd or "", [])
    for name in names:
        torch.testing.assert_close(
            getattr(stats, name), getattr(expected, name), rtol=1e-5, atol=2e-6, msg=name
        )
    rounding = 1e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(dz, expected_dz, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("used", ["00000", "11111", "00011", "10101", "01100", "00001"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compaction_in_place(impl: str, dtype: torch.dtype, used: str, device: str) -> None:
    """The gradient of each used row is in one of the first slots, to the bit."""
    work = load(impl)
    tokens = torch.tensor([0, 15, 16, 149, 77], device=device)
    keep = torch.tensor([flag == "1" for flag in used], device=device)
    coef = Coefficients(torch.where(keep, _coefficients(None, device).logprobs, 0))
    gradients = []
    for compact in (False, True):
        student, _ = _streams(None, None, device)
        stats = work.sweep(student, tokens)
        compaction = Compaction(coef, impl)
        out = gradient_view(student.logits, dtype)
        source = compaction.source if compact else None
        dz = work.gradient(student, tokens, stats, coef, out=out, source=source)
        rows = compaction.rows(torch.arange(N, device=device))
        gradients.append(dz[: len(rows)] if compact else dz[rows])
    assert sorted(rows.tolist()) == keep.nonzero().squeeze(1).tolist()
    assert torch.equal(*gradients)


def test_minus_infinity_in_the_first_blocks_of_one_stream(device: str) -> None:
    """The running maximum may start late, in the student, the teacher or both."""
    tokens = torch.tensor([140, 140, 140], device=device)
    student, teacher = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)).to(device)
    student[0, :100] = student[2, :100] = -torch.inf
    teacher[1, :40] = teacher[2, :40] = -torch.inf
    for kd in ("rkl", "fkl", "jsd"):
        stats = {}
        for impl, tile in (("torch", {}), ("triton", {"tile": Tile(1, 16, 4)})):
            stats[impl] = load(impl).sweep(
                Stream(student.clone(), 1.0, None),
                tokens,
                teacher=_teacher(teacher.clone(), kd),
                entropy=True,
                **tile,
            )
        for name in ("logprobs", "entropy", "teacher_logprobs", "kl"):
            expected = getattr(stats["torch"], name)
            torch.testing.assert_close(getattr(stats["triton"], name), expected, msg=f"{kd} {name}")
        # in the last row the student's support lies inside the teacher's
        infinite = {"rkl": [False, True, False], "fkl": [True, False, True], "jsd": [False] * 3}[kd]
        assert stats["triton"].kl.isinf().tolist() == infinite


def test_a_log_ratio_that_underflows_after_it_was_infinite(device: str) -> None:
    """A column the teacher excludes leads the first block, then sinks to p = 0: it counts 0."""
    student, teacher = torch.zeros(2, 1, V, device=device)
    student[0, 3], student[0, 140] = 5.0, 500.0
    teacher[0, 3] = -torch.inf
    tokens = torch.tensor([140], device=device)
    results = [
        load(impl).sweep(
            Stream(student.clone(), 1.0, None),
            tokens,
            teacher=_teacher(teacher.clone(), "rkl"),
            **tile,
        )
        for impl, tile in (("torch", {}), ("triton", {"tile": Tile(1, 16, 4)}))
    ]
    expected = torch.tensor([149.0], device=device).log()  # p is one-hot, q uniform over the rest
    for stats in results:
        torch.testing.assert_close(stats.kl, expected)


@pytest.mark.parametrize("token", [-1, 150, 159, 2**32 + 5, -(2**32) + 5])
def test_a_token_beyond_the_columns_has_no_gradient_of_its_own(token: int, device: str) -> None:
    """It is no column here, whatever its low 32 bits are: those are what the kernel compares."""
    work = load("triton")
    student, _ = _streams(None, None, device)
    stats = work.sweep(student, torch.zeros(N, dtype=torch.int64, device=device))
    coef = Coefficients(torch.ones(N, device=device))
    before = student.logits.clone()
    p = (student.logits / student.temperature[:, None]).softmax(-1)
    out = torch.empty(N, 160, device=device)
    tokens = torch.full((N,), token, device=device)
    dz = work.gradient(replace(student, logits=before), tokens, stats, coef, out=out)[:, :V]
    torch.testing.assert_close(dz, -p / student.temperature[:, None], rtol=1e-5, atol=1e-6)

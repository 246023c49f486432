"""The Triton row kernels over many blocks, and over each other's memory, against PyTorch's."""

import pytest
import torch

from kdrl_kernels.rows import Coefficients, Stream, load

N, V = 5, 150


def _streams(softcap: float | None, device: str) -> tuple[Stream, Stream]:
    rng = torch.Generator().manual_seed(0)
    ramp = torch.linspace(0, 8, V)  # the running maximum moves in every block
    student = torch.randn(N, V, generator=rng) + ramp
    teacher = torch.randn(N, V, generator=rng) + ramp.flip(0)
    return (
        Stream(student.to(device), torch.linspace(0.7, 1.3, N).to(device), softcap),
        Stream(teacher.to(device), 1.0, None),
    )


@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kd", [None, "rkl", "fkl"])
def test_blocks(
    kd: str | None, dtype: torch.dtype, softcap: float | None, block: int, device: str
) -> None:
    tokens = torch.tensor([0, 15, 16, 149, 77], device=device)
    coef = Coefficients(*torch.randn(3, N, generator=torch.Generator().manual_seed(1)).to(device))
    if kd is None:
        coef = Coefficients(coef.logprobs, coef.entropy)
    found = {}
    for impl, tile in (("torch", {}), ("triton", {"BLOCK_V": block})):
        work = load(impl)
        student, teacher = _streams(softcap, device)
        options = {"teacher": teacher if kd else None, "kd": kd}
        work.activate_(student)
        stats = work.sweep(student, tokens, entropy=True, **options, **tile)
        dz = work.gradient_(student, tokens, stats, coef, dtype=dtype, **options, **tile)
        assert dz.dtype == dtype
        assert dz.data_ptr() == student.logits.data_ptr()  # in place
        found[impl] = stats, dz.float()
    (expected, expected_dz), (stats, dz) = found["torch"], found["triton"]
    names = ["max", "log_sum", "logprobs", "entropy"] + (["teacher_logprobs", "kl"] if kd else [])
    for name in names:
        torch.testing.assert_close(
            getattr(stats, name), getattr(expected, name), rtol=1e-5, atol=2e-6, msg=name
        )
    rounding = 1e-3 if dtype == torch.float16 else 1e-5
    torch.testing.assert_close(dz, expected_dz, rtol=rounding, atol=rounding)


def test_minus_infinity_in_the_first_blocks_of_one_stream(device: str) -> None:
    """A running maximum that starts late, in the student, the teacher or both."""
    tokens = torch.tensor([140, 140, 140], device=device)
    student, teacher = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)).to(device)
    student[0, :100] = student[2, :100] = -torch.inf
    teacher[1, :40] = teacher[2, :40] = -torch.inf
    for kd in ("rkl", "fkl"):
        stats = {}
        for impl, tile in (("torch", {}), ("triton", {"BLOCK_V": 16})):
            streams = [Stream(z.clone(), 1.0, None) for z in (student, teacher)]
            stats[impl] = load(impl).sweep(
                streams[0], tokens, teacher=streams[1], kd=kd, entropy=True, **tile
            )
        for name in ("logprobs", "entropy", "teacher_logprobs", "kl"):
            expected = getattr(stats["torch"], name)
            torch.testing.assert_close(getattr(stats["triton"], name), expected, msg=f"{kd} {name}")
        infinite = [False, True, True] if kd == "rkl" else [True, False, True]
        infinite[2] = kd == "fkl"  # there the student's support is inside the teacher's
        assert stats["triton"].kl.isinf().tolist() == infinite


def test_a_gap_that_underflows_after_it_was_infinite(device: str) -> None:
    """A column the teacher excludes leads the first block, then sinks to p = 0: it counts 0."""
    student, teacher = torch.zeros(2, 1, V, device=device)
    student[0, 3], student[0, 140] = 5.0, 500.0
    teacher[0, 3] = -torch.inf
    tokens = torch.tensor([140], device=device)
    found = [
        load(impl).sweep(
            Stream(student.clone(), 1.0, None),
            tokens,
            teacher=Stream(teacher.clone(), 1.0, None),
            kd="rkl",
            **tile,
        )
        for impl, tile in (("torch", {}), ("triton", {"BLOCK_V": 16}))
    ]
    expected = torch.tensor([149.0], device=device).log()  # p is one-hot, q uniform over the rest
    for stats in found:
        torch.testing.assert_close(stats.kl, expected)

"""Where a call waits for a GPU: every wait is listed here with its reason, and there is no other.

On a pretended GPU, with the PyTorch row work; test_no_sync.py is the proof on a real one.
"""

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

import kdrl_kernels as kk
from kdrl_kernels import call, flat_rows, one_pass
from tests.kernels.problem import make_problem
from tests.pretended_gpu import GpuTensor, PretendedGpu, on_gpu, pretend

WEIGHTS = [1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 1.0]
COUNT = {"kdrl_kernels/call.py LossCall.active_rows: nonzero": 1}
"""The caller has not said how many rows count: their GEMM cannot be launched without."""
AGREEMENT = {"kdrl_kernels/vocab_ranks.py VocabRanks.tell: to": 1}
"""Ranks of a vocab_group compare their arguments, on the GPU where they have no CPU backend."""
COMPACT = {
    # which logits go where is known, but how many rows the GEMMs of dX and dW have is not
    "kdrl_kernels/compaction.py Compaction.rows: Event.synchronize": 1,
    # of the PyTorch row work alone: the Triton kernel reads on the GPU which slots are empty
    "kdrl_kernels/rows/eager_gradient.py gradient: index": 1,
}
"""Of each chunk, where rows without a gradient are left out."""
SKETCH = {
    # blocks to read, those of rows that are not flat, and the kept entries: Triton's only wait
    "kdrl_kernels/rows/eager_sketch.py _keep: nonzero": 3,
    # the sampled tokens' own entries among them go, and each used row gets one
    "kdrl_kernels/sketched.py with_tokens: nonzero": 1,
    "kdrl_kernels/sketched.py Lists.take: nonzero": 1,
    # the flat rows, whose gradient is exact
    "kdrl_kernels/sketched.py indices: nonzero": 1,
}
"""Of each chunk of a sketched gradient, besides COMPACT for its flat rows."""
BESIDE_FLAT_ROWS = {
    # the rows and the columns that have entries, whose products are added to those of flat rows
    "kdrl_kernels/sparse_rows.py _add_bags: unique_consecutive": 2,
    "kdrl_kernels/sparse_rows.py _blocks: to": 2,
    "kdrl_kernels/sparse_rows.py SparseRows.add_to: unique_consecutive": 1,  # for the bias
}
"""Of a pass, where many rows are flat."""
SKETCH_OF_SCORES = {
    "kdrl_kernels/rows/eager_sketch.py _keep: nonzero": 3,
    "kdrl_kernels/sketched.py with_tokens: nonzero": 1,
    "kdrl_kernels/sketched.py Lists.take_scores: nonzero": 1,
    "kdrl_kernels/sketched.py indices: nonzero": 1,
    # in backward, once for all chunks: the rows that have entries
    "kdrl_kernels/sketched.py entry_values: nonzero": 1,
}
"""As SKETCH, for a loss that is known later."""
SKETCH_OF_SCORES_AND_IDS = SKETCH_OF_SCORES | {
    # each id has an entry, equal ones the same, in the place of those kept by chance
    "kdrl_kernels/sketched_ids.py with_ids: nonzero": 1,
    "kdrl_kernels/sketched_ids.py with_ids: _unique2": 1,
    "kdrl_kernels/rows/entries.py Entries.select: nonzero": 1,
    # in backward: their gradients are added up
    "kdrl_kernels/sketched_ids.py add_at: nonzero": 1,
    "kdrl_kernels/sketched_ids.py add_at: unique_consecutive": 1,
}
Waits = dict[str, int]


def _waits(gpu: PretendedGpu, kd: str | None, **options: Any) -> Waits:
    """Run a loss and its backward pass on the pretended GPU."""
    problem = make_problem(kd=kd)
    options = problem.options | {"token_weights": torch.tensor(WEIGHTS)} | options
    with gpu:
        student = {k: GpuTensor(v).requires_grad_() for k, v in problem.student.items()}
        teacher = {k: on_gpu(v) for k, v in (problem.teacher or {}).items()}
        out = kk.kdrl_loss(
            tokens=on_gpu(problem.tokens),
            teacher=kk.TeacherHead(**teacher) if kd else None,
            **student,
            **{name: on_gpu(value) for name, value in options.items()},
        )
        out.loss.backward()
    return dict(gpu.waits)


def _chunks(waits: Waits, chunks: int) -> Waits:
    return {what: chunks * count for what, count in waits.items()}


@pytest.mark.parametrize("kd", [None, "k2", "rkl", "fkl", "jsd", "rkl+fkl"])
def test_no_wait_where_the_caller_knows_the_rows(kd: str | None, gpu: PretendedGpu) -> None:
    assert _waits(gpu, kd, active_rows=4, compact=False) == {}
    assert _waits(gpu, kd, token_weights=None) == {}


def test_no_wait_for_an_adapter(gpu: PretendedGpu) -> None:
    problem, draw = make_problem(kd="rkl"), torch.Generator().manual_seed(0)
    (V, H), r = problem.student["weight"].shape, 3
    with gpu:
        A, B = (
            GpuTensor(torch.randn(shape, generator=draw)).requires_grad_()
            for shape in ((r, H), (V, r))
        )
        student = {name: on_gpu(value) for name, value in problem.student.items()}
        teacher = {name: on_gpu(value) for name, value in (problem.teacher or {}).items()}
        student["hidden"].requires_grad_()
        out = kk.kdrl_loss(
            tokens=on_gpu(problem.tokens),
            advantages=None,
            adapter=kk.LowRank(A, B, 0.5),
            teacher=kk.TeacherHead(**teacher),
            objective=kk.Objective(policy="off", kd="rkl", kd_coef=1.0),
            token_weights=on_gpu(torch.tensor(WEIGHTS)),
            active_rows=4,
            compact=False,
            **student,
        )
        out.loss.backward()
    assert A.grad is not None
    assert not gpu.waits


@pytest.mark.parametrize("backend", ["cpu:gloo,cuda:nccl", "cuda:nccl"])
def test_a_wait_for_the_ranks_to_agree(
    backend: str, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(dist, "get_backend_config", lambda _: backend)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        waits = _waits(gpu, "rkl", active_rows=4, compact=False, vocab_group=dist.group.WORLD)
        assert waits == ({} if "cpu:" in backend else AGREEMENT)
    finally:
        dist.destroy_process_group()


def test_a_wait_for_the_number_of_rows_that_count(gpu: PretendedGpu) -> None:
    assert _waits(gpu, "rkl", compact=False) == COUNT


def test_a_known_number_is_counted_where_pytorch_cannot_use_it(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "HAVE_NONZERO_STATIC", ())  # as on MPS
    assert _waits(gpu, "rkl", active_rows=4, compact=False) == COUNT


def test_a_wait_in_each_chunk_for_the_rows_that_have_a_gradient(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _waits(gpu, "rkl") == COUNT | COMPACT
    gpu.waits.clear()
    monkeypatch.setattr(one_pass, "chunks_of", lambda N, _: (slice(0, 1), slice(1, N)))
    assert _waits(gpu, "rkl", active_rows=4) == _chunks(COMPACT, 2)


@pytest.mark.parametrize("kd", [None, "rkl"])
def test_waits_of_a_sketch(kd: str | None, gpu: PretendedGpu) -> None:
    waits = _waits(gpu, kd, active_rows=4, backward="sketch", sketch=kk.Sketch(flat=0.01))
    assert waits == SKETCH | COMPACT


def test_waits_of_a_sketch_with_many_flat_rows(
    gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_rows, "most_kept", lambda _: -1)  # their dz is not kept
    sketch = kk.Sketch(threshold=0.05, flat=10)
    waits = _waits(gpu, "rkl", active_rows=4, backward="sketch", sketch=sketch)
    assert waits == SKETCH | COMPACT | BESIDE_FLAT_ROWS


@pytest.mark.parametrize(
    ("options", "waits"),
    [
        ({"mask": WEIGHTS}, {"kdrl_kernels/api/logprobs.py linear_logprobs: nonzero": 1}),
        ({"backward": "sketch"}, SKETCH_OF_SCORES),
        ({"backward": "sketch", "extra_tokens": [[1, -1]] * 7}, SKETCH_OF_SCORES_AND_IDS),
    ],
    ids=["mask", "sketch", "sketch_with_ids"],
)
def test_waits_of_scores(options: dict[str, Any], waits: Waits, gpu: PretendedGpu) -> None:
    """Their number of rows is no argument."""
    problem = make_problem(kd=None)
    lists = {name: value for name, value in options.items() if isinstance(value, list)}
    with gpu:
        head = {name: GpuTensor(value).requires_grad_() for name, value in problem.student.items()}
        tensors = {name: on_gpu(torch.tensor(value)) for name, value in lists.items()}
        out = kk.linear_logprobs(tokens=on_gpu(problem.tokens), **head, **options | tensors)
        extra = 0 if out.extra_logprobs is None else out.extra_logprobs.sum()
        (out.logprobs.sum() + extra).backward()
    assert gpu.waits == waits


def test_other_losses_wait_for_nothing(gpu: PretendedGpu) -> None:
    problem = make_problem(kd=None)
    with gpu:
        head = {name: GpuTensor(value).requires_grad_() for name, value in problem.student.items()}
        tokens, weights = on_gpu(problem.tokens), on_gpu(torch.tensor(WEIGHTS))
        scores = kk.linear_logprobs(tokens=tokens, entropy=True, topk=3, rest=True, **head)
        (scores.logprobs + scores.entropy + scores.rest_logprob).sum().backward()
        options = {"token_weights": weights, "active_rows": 4, "compact": False}
        loss = kk.linear_token_loss(
            tokens=tokens, loss_fn=lambda rows: -rows.logprobs, **options, **head
        )
        loss.loss.backward()
    assert not gpu.waits


def test_every_kind_of_wait_is_seen(gpu: PretendedGpu) -> None:
    with gpu:
        x = on_gpu(torch.tensor([1.0, 0.0, 2.0]))
        mask, index, counts = x > 0, on_gpu(torch.tensor([2, 0])), on_gpu(torch.tensor([1, 2]))
        ones = torch.ones(3)
        reads = [
            *(x.nonzero, x.unique, x.unique_consecutive, x.tolist, x.cpu, x.max().item),
            *(mask.any().__bool__, index.bincount, partial(torch.equal, x, x)),
            *(partial(x.masked_select, mask), partial(x.index_put_, (mask,), ones[0])),
            *(lambda: x[mask], lambda: x[torch.tensor([1, 0])]),
            *(partial(index.repeat_interleave, counts), partial(x.to, "cpu"), partial(ones.to, x)),
            partial(torch.tensor, [1], device="cuda"),
            *(partial(ones.to, "cuda", non_blocking=True), partial(x.copy_, ones)),
        ]
        for i, read in enumerate(reads):
            gpu.waits.clear()
            read()
            assert gpu.waits.total() == 1, (i, gpu.waits)
        gpu.waits.clear()
        index.repeat_interleave(counts, output_size=3), x.to("cpu", non_blocking=True)
        ones.pin_memory().to("cuda", non_blocking=True)
        x.index_put_((index,), x[index] * 2).where(mask, 0).sort()
        torch.nonzero_static(x, size=2).double().to("cuda")
        assert not gpu.waits
        assert x.is_cuda
        assert (x * 2).device.type == torch.zeros(2, device=x.device).device.type == "cuda"
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.ones(3)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> PretendedGpu:
    """Make a pretended GPU."""
    return pretend(monkeypatch)

"""Rows of a GPU's chunks: from its whole memory and shapes, in multiples, with one buffer."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kdrl_kernels as kk
from kdrl_kernels import api, chunks, logprobs, one_pass
from kdrl_kernels.chunks import Geometry, balanced, held_rows, max_rows, warn_of_few_rows
from tests.kernels.problem import make_problem

GB = 10**9
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
REFERENCE = {"N": 16_384, "H": 3584, "V": 152_064}
CARDS = {  # as sold, and as PyTorch tells
    "24": (24 * GB, 25_300_000_000),
    "a100-40": (40 * GB, 42_300_000_000),
    "h100": (80 * GB, 85_000_000_000),
    "h200": (141 * GB, 150_100_000_000),
    "b200": (180 * GB, 192_000_000_000),
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Make PyTorch report a GPU whose memory the test sets."""
    memory = SimpleNamespace(total=85 * GB, free=80 * GB, reserved=0, allocated=0)
    properties = SimpleNamespace(total_memory=memory.total)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (memory.free, memory.total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: memory.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: memory.allocated)
    return memory


def _geometry(memory_bytes: int | None, *, N: int = 16_384, V: int = 152_064, **kind: Any) -> Any:
    teacher = (3584, V, "rkl") if kind.get("kd") else (0, 0, None)
    dtype = kind.get("dtype", torch.bfloat16)
    return Geometry(N, 3584, V, *teacher, dtype, CUDA, "torch", memory_bytes=memory_bytes)


@pytest.mark.parametrize(
    ("V", "rows"),
    [
        (32_000, {"24": 8192, "a100-40": 8192, "h100": 8192, "h200": 8192, "b200": 8192}),
        (128_256, {"24": 2432, "a100-40": 2432, "h100": 4096, "h200": 8192, "b200": 8192}),
        (152_064, {"24": 2048, "a100-40": 2048, "h100": 4096, "h200": 8192, "b200": 8192}),
        (256_000, {"24": 2048, "a100-40": 2048, "h100": 2048, "h200": 4096, "b200": 4096}),
    ],
)
def test_rows_of_a_card_as_sold_and_as_it_reports(V: int, rows: dict[str, int]) -> None:
    for name, sizes in CARDS.items():
        for memory in sizes:
            assert max_rows(_geometry(memory, V=V), None) == rows[name], name
            plan = kk.chunk_plan(16_384, 3584, V, memory_bytes=memory)
            assert plan.held_rows == rows[name]
            assert plan.rows % chunks.MULTIPLE == 0
    small = max_rows(_geometry(None, V=V), None)  # of a card that is not known
    assert small == rows["24"]


def test_the_default_takes_a_small_part_of_a_card() -> None:
    for sizes in CARDS.values():
        for V in (50_257, 151_936, 262_144):
            rows = max_rows(_geometry(sizes[1], V=V), None)
            taken = kk.chunk_plan(rows, 64, V, memory_bytes=sizes[1]).workspace_bytes
            assert taken <= max(sizes[1] / 27, 1.02 * max(2048 * 4 * V, chunks.GPU_BYTES))


def test_free_memory_does_not_change_the_rows(card: SimpleNamespace) -> None:
    """As long as half of it holds them: a run that is resumed has the chunks that it had."""
    sizes = REFERENCE | {"teacher": (3584, 152_064), "kd": "rkl"}
    first = kk.chunk_plan(**sizes)
    assert first.held_rows == 4096
    for sizes_gb in ((11, 0, 0), (6, 7, 1), (12, 0, 0)):
        card.free, card.reserved, card.allocated = (GB * x for x in sizes_gb)
        assert kk.chunk_plan(**sizes) == first


@pytest.mark.parametrize(("free", "rows"), [(10, 2048), (4, 1024), (1.2, 256), (0.2, 80)])
def test_a_full_card_halves_the_rows_and_says_so(
    free: float, rows: int, card: SimpleNamespace
) -> None:
    card.free = int(free * GB)
    with pytest.warns(UserWarning, match=f"chunk of 4096 rows .* got room for {rows}: a run"):
        plan = kk.chunk_plan(**REFERENCE, teacher=(3584, 152_064), kd="rkl", impl="triton")
    assert plan.held_rows == rows
    assert plan.workspace_bytes <= card.free // 2


def test_a_few_tokens_on_a_full_card_are_one_chunk_without_a_warning(card: SimpleNamespace) -> None:
    card.free = 2 * GB
    plan = kk.chunk_plan(1000, 3584, 152_064)
    assert (plan.rows, plan.held_rows, plan.chunks) == (1000, 1000, 1)
    planned = kk.chunk_plan(16_384, 3584, 152_064, memory_bytes=141 * GB)  # of another card
    assert planned.held_rows == 8192


def test_a_budget_decides_alone(card: SimpleNamespace) -> None:
    card.free = 0
    plan = kk.chunk_plan(**REFERENCE, workspace_bytes=3 * GB)
    assert plan.held_rows == 4736  # of 4,872
    assert plan.rows == 4096
    assert plan.workspace_bytes <= 3 * GB
    assert kk.chunk_plan(**REFERENCE, workspace_bytes=60_000_000).held_rows == 95


@pytest.mark.parametrize("N", [1, 127, 128, 2049, 4096, 5000, 16_384])
def test_every_number_of_tokens_has_the_same_buffer(N: int) -> None:
    plan = kk.chunk_plan(N, 64, 152_064, memory_bytes=80 * GB)
    assert plan.held_rows == 4096
    assert plan.chunks == -(-N // 4096)
    logits = 4096 * 4 * 152_064
    assert logits <= plan.workspace_bytes <= logits + plan.rows * 64 * 6
    assert held_rows(plan.rows, 4096, CUDA) == 4096
    assert held_rows(7, 4096, CPU) == 7


def test_a_call_holds_its_buffer_and_computes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU that takes the rules of a GPU: three chunks in a buffer that is larger than one."""
    problem = make_problem(300, 8, 64, kd=None, off_policy=False)
    scores = kk.linear_logprobs(tokens=problem.tokens, **problem.student)
    expected = problem.solve()
    seen: list[int] = []
    for module in (one_pass, logprobs):
        real = module.Buffers

        def recorded(
            head: Any, V: int, rows: int, *rest: Any, real: Any = real, **more: Any
        ) -> Any:
            seen.append(rows)
            return real(head, V, rows, *rest, **more)

        monkeypatch.setattr(module, "Buffers", recorded)
        monkeypatch.setattr(module, "balanced", lambda N, most, _: balanced(N, most, CUDA))
        monkeypatch.setattr(module, "held_rows", lambda _, most, __: most)
    monkeypatch.setattr(api.calls, "max_rows", lambda *_, **__: 140)
    monkeypatch.setattr(api.logprobs, "max_rows", lambda *_, **__: 140)
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    again = kk.linear_logprobs(tokens=problem.tokens, **student)
    again.logprobs.sum().backward()
    torch.testing.assert_close(again.logprobs.detach(), scores.logprobs)
    torch.testing.assert_close(problem.solve(), expected)
    assert seen == [140, 140, 140]


def test_few_rows_are_warned_of_where_dw_is_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    message = "at least 735 rows, so that sums of the head's gradient .* got 512: raise"
    with pytest.warns(UserWarning, match=message):
        warn_of_few_rows(512, 10_000, CUDA)
    seen: list[tuple[int, int]] = []
    for module in (api.calls, api.logprobs):
        monkeypatch.setattr(module, "warn_of_few_rows", lambda rows, N, _: seen.append((rows, N)))
        monkeypatch.setattr(module, "max_rows", lambda *_, **__: 5)
    problem = make_problem(kd=None)
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    tokens, options = problem.tokens, problem.options
    kk.kdrl_loss(tokens=tokens, **student, **options)
    kk.linear_logprobs(tokens=tokens, **student)
    assert seen == [(5, 7), (5, 7)]
    kk.kdrl_loss(tokens=tokens, **student, **options, backward="sketch")
    kk.linear_logprobs(tokens=tokens, **student, backward="sketch")
    with torch.no_grad():
        kk.kdrl_loss(tokens=tokens, **student, **options)
        kk.linear_logprobs(tokens=tokens, **student)
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("rows", "N", "device"), [(735, 10**6, CUDA), (512, 512, CUDA), (5, 9, CPU)]
)
def test_enough_rows_are_not_warned_of(rows: int, N: int, device: torch.device) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_few_rows(rows, N, device)


def test_a_graph_takes_the_memory_of_a_card_for_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=85 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def rows(x: torch.Tensor) -> torch.Tensor:
        memory = chunks._card_bytes(CUDA)
        options = {"memory_bytes": memory}
        geometry = Geometry(len(x), 3584, 152_064, 0, 0, None, x.dtype, CUDA, "torch", **options)
        return x + max_rows(geometry, None)

    compiled = torch.compile(rows, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(3)).tolist() == [4096.0] * 3

"""Without token weights, or where their number is known, the host never waits for the device.

Meta tensors have no values: whatever reads one (.item(), nonzero, a boolean index, a branch, a
copy to the host) raises. So it shows without a GPU; with one, CUDA itself reports a wait.
"""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kdrl_kernels as kk
from kdrl_kernels import logprobs, one_pass, scaling, token_loss
from kdrl_kernels.call import LogprobCall, LossCall
from kdrl_kernels.head import Head
from kdrl_kernels.logprobs import BackwardCall
from tests.kernels.params import BF16, F16, F32, KDS, quick_or_slow
from tests.kernels.problem import Problem, make_problem

DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
READS_A_VALUE = "meta"
"""What PyTorch says of it, in several sentences, always names the device."""


def _call(problem: Problem, **changes: Any) -> LossCall:
    options = problem.options
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher, **problem.teacher_options)
    arguments: dict[str, Any] = {
        "student": Head(**problem.student, temperature=0.7, softcap=5.0),
        "tokens": problem.tokens,
        "vocab_size": 37,
        "loss": options["objective"],
        "impl": "torch",
        "needs": (True, True, True),
        "normalizer": torch.ones((), device="meta"),
        "advantages": options["advantages"].float(),
        "old_logprobs": options["old_logprobs"].float(),
        "teacher": teacher,
        "entropy": True,
        "max_rows": 3,  # three chunks
    }
    if options["objective"].kd:
        arguments["kd_weight"] = options["kd_weight"].float()
    return LossCall(**arguments | changes)


def _meta_problem(**kind: Any) -> Problem:
    problem = make_problem(objective={"entropy_coef": 0.1}, **kind).map(lambda x: x.to("meta"))
    return replace(problem, tokens=problem.tokens.to("meta"))


@pytest.mark.parametrize("kd", KDS)
@DTYPES
def test_one_pass(kd: str | None, dtype: torch.dtype) -> None:
    problem = _meta_problem(kd=kd, dtype=dtype)
    ids = torch.zeros(len(problem.tokens), 2, dtype=torch.int64, device="meta")
    for more in (
        {"normalizer": torch.ones((), device="meta")},
        {"normalizer": None, "extra_tokens": ids, "rest": True},
        {"weights": problem.options["token_weights"].float(), "active": 5},
    ):
        call = _call(problem, **more)
        result = one_pass.run(call)
        assert all(x is not None and x.is_meta for x in result.gradients.tensors())
        assert scaling.scaled(result.loss, result.scale, dtype).is_meta


@pytest.mark.parametrize("kd", ["topk_rkl", "topk_fkl", "topk_jsd"])
def test_one_pass_of_k_tokens(kd: str) -> None:
    problem = _meta_problem(kd=kd)
    ids, logprobs = (x.to("meta") for x in problem.options["teacher_topk"])
    result = one_pass.run(_call(problem, extra_tokens=ids, rest=True, teacher_topk=logprobs))
    assert result.rows.kl is not None
    assert all(x is not None and x.is_meta for x in result.gradients.tensors())


def test_the_likeliest_tokens() -> None:
    problem = _meta_problem(kd=None)
    head = Head(**problem.student, temperature=0.7, softcap=5.0)
    call = LogprobCall(head, problem.tokens, False, "torch", 3, 0, (True, True, True), topk=3)
    scores = logprobs.score(call)
    assert scores.topk_tokens is not None
    call = replace(call, extra_tokens=scores.topk_tokens)
    upstream = torch.ones_like(scores.logprobs), None, scores.extra_logprobs
    total, _ = logprobs.gradients(BackwardCall(call, scores, *upstream))
    assert all(x is not None and x.is_meta for x in total.tensors())


@pytest.mark.parametrize("reason", ["weights", "compact"])
def test_it_is_seen_where_the_host_waits(reason: str) -> None:
    """Both options are documented to wait for the number of rows."""
    problem = _meta_problem(kd="rkl")
    changes = {"compact": True}
    if reason == "weights":
        changes = {"weights": problem.options["token_weights"]}
    with pytest.raises((RuntimeError, NotImplementedError), match=READS_A_VALUE):
        one_pass.run(_call(problem, **changes))


@pytest.mark.parametrize("entropy", [False, True], ids=["logprobs", "entropy_and_ids"])
@pytest.mark.parametrize("cached", [0, 3], ids="cached{}".format)
@DTYPES
def test_logprobs(dtype: torch.dtype, cached: int, entropy: bool) -> None:
    problem = _meta_problem(kd=None, dtype=dtype)
    head = Head(**problem.student, temperature=0.7, softcap=5.0)
    call = LogprobCall(head, problem.tokens, entropy, "torch", 3, cached, (True, True, True))
    ids = torch.zeros(len(problem.tokens), 2, dtype=torch.int64, device="meta")
    call = replace(call, extra_tokens=ids if entropy else None, rest=entropy)
    scores = logprobs.score(call)
    upstream, more = torch.ones_like(scores.logprobs), (None,)
    if entropy:
        assert scores.extra_logprobs is not None
        more = upstream, torch.ones_like(scores.extra_logprobs), upstream
    backward = BackwardCall(call, scores, upstream, *more)
    gradients, scale = logprobs.gradients(backward)
    assert scale.is_meta
    assert all(x is not None and x.is_meta for x in gradients.tensors())


def _step(problem: Problem, impl: str, **changes: Any) -> dict[str, Tensor]:
    student = {k: v.detach().requires_grad_() for k, v in problem.student.items()}
    teacher = problem.teacher and kk.TeacherHead(**problem.teacher)
    options = problem.options | {"token_weights": None, "impl": impl} | changes
    result = kk.kdrl_loss(tokens=problem.tokens, teacher=teacher, **student, **options)
    result.loss.backward()
    gradients = {k: v.grad for k, v in student.items() if v.grad is not None}
    assert gradients.keys() == student.keys()
    return {"loss": result.loss.detach()} | result.metrics | gradients


@pytest.mark.parametrize("kd", KDS)
@DTYPES
def test_checks_and_metrics(kd: str | None, dtype: torch.dtype) -> None:
    """The public function waits for nothing around the pass either."""
    for normalizer in (torch.ones((), device="meta"), None):
        results = _step(_meta_problem(kd=kd, dtype=dtype), "torch", normalizer=normalizer)
        assert all(value.is_meta for value in results.values())


def test_checks_and_metrics_of_a_token_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # meta tensors have no autocast
    monkeypatch.setattr(token_loss, "without_autocast", nullcontext)
    problem = _meta_problem(kd="rkl")
    student = {k: v.requires_grad_() for k, v in problem.student.items()}
    result = kk.linear_token_loss(
        loss_fn=lambda rows: rows.kl - rows.logprobs + rows.rest_logprob,
        tokens=problem.tokens,
        extra_tokens=torch.zeros(len(problem.tokens), 2, dtype=torch.int64, device="meta"),
        rest=True,
        teacher=kk.TeacherHead(**problem.teacher or {}),
        kl="rkl",
        compact=False,
        **student,
    )
    assert all(x.is_meta for x in (result.loss, *result.metrics.values()))


def set_mode(mode: str | int) -> None:
    """Set what a wait does, without the notice that this is a prototype, which comes once."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*ynchronization debug mode")
        torch.cuda.set_sync_debug_mode(mode)


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """Make a call that waits for the GPU raise."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        set_mode("error")
        yield
    finally:
        set_mode(before)


def test_the_notice_of_a_prototype_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str | int] = []

    def notify(mode: str | int) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", notify)
    set_mode("error")
    assert modes == ["error"]


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True], ids=["all", "weighted"])
@pytest.mark.parametrize("kd", KDS)
@DTYPES
def test_on_a_gpu(
    kd: str | None, dtype: torch.dtype, weighted: bool, request: pytest.FixtureRequest
) -> None:
    problem, options = make_problem(kd=kd, dtype=dtype, device="cuda"), {}
    if weighted:
        weights = torch.tensor([1.0, 0, 2, 1, 0, 1, 1], device="cuda")
        options = {"token_weights": weights, "active_rows": 5, "compact": False}
    expected = _step(problem, "triton", **options)  # compiles
    torch.cuda.synchronize()
    request.getfixturevalue("waiting_is_an_error")
    results = _step(problem, "triton", **options)
    set_mode("default")
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.usefixtures("waiting_is_an_error")
def test_a_gpu_reports_a_wait() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(3, device="cuda").nonzero()


@pytest.mark.parametrize(
    ("impl", "kd"), quick_or_slow(["torch", "triton"], KDS, {"k3", "k3_ratio", "fkl", "jsd"})
)
def test_compaction_gives_the_same_numbers(impl: str, kd: str | None, device: str) -> None:
    """Compaction, which waits, changes no number where some rows have no gradient."""
    problem = make_problem(8, kd=kd, device=device)
    problem.options["advantages"][[1, 4]] = 0
    if kd:
        problem.options["kd_weight"][[1, 4]] = 0
    results, expected = (_step(problem, impl, compact=compact) for compact in (True, False))
    assert results.pop("gradient_rows") <= 6
    assert expected.pop("gradient_rows") == 8
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-6)

"""Tests step and rows of bench/ on tiny sizes: they time what they say."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import definition
from bench.inputs import Inputs, make_inputs
from bench.measures import rows, step
from bench.ops import OPS_BY_NAME
from bench.providers import Provider
from bench.providers.home import PROVIDERS
from bench.results_file import OURS, Record
from bench.shapes import TINY
from kdrl_kernels.rows import load
from tests.tolerance import assert_matches

GRPO, KDRL = (OPS_BY_NAME[name] for name in ("GRPO", "KDRL exact"))
HOME = {one.name: one for one in PROVIDERS}
FULL, CHUNKS = "PyTorch, full logits", "PyTorch, chunk loop"
ROUNDS = 4
MODEL = step.ModelSizes(replace(TINY, N=16), 2, 4, 2, 96, 8, tied=True)
FIGURES = ("total_ms", "copy_ms", "step_ms", "head_ms", "extra_bytes", "bytes", "model")
no_head = Provider(name="no head", whole=lambda inputs, _: {"loss": inputs.weight.sum()})
"""Its loss does not depend on the hidden states."""


def later() -> float:
    return time.monotonic() + 600


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(TINY)


@pytest.fixture(scope="module")
def trainee() -> step.Trainee:
    return step.Trainee(MODEL)


def assert_samples(one: Record, *names: str) -> None:
    """Check that a list holds as many times as there are rounds."""
    assert one["status"] == "ok", one
    for name in names:
        assert len(one[name]) == ROUNDS, (name, one)
        assert all(math.isfinite(ms) and ms > 0 for ms in one[name]), (name, one)


def assert_no_figure(one: Record, status: str) -> None:
    assert one["status"] == status
    assert not set(FIGURES) & one.keys()


# step


def test_step_records() -> None:
    records = list(step.records(ROUNDS, later(), models=(MODEL,)))
    assert [(one["op"], one["provider"]) for one in records] == [
        (op, provider) for op in ("GRPO", "KDRL exact") for provider in (OURS, FULL)
    ]
    H, V, kv, wide = 64, 512, 32, 96
    attention = 2 * H * H + H + 2 * (H * kv + kv)  # q with bias, o without, k and v with
    parameters = V * H + H + 2 * (attention + 3 * H * wide + 2 * H)
    for one in records:
        assert_samples(one, "step_ms", "head_ms")
        assert one["kind"] == "step"
        assert one["sizes"]["N"] == 16
        model = one["model"]
        assert (model["layers"], model["tokens"], model["sequence_length"]) == (2, 16, 8)
        assert model["parameters"] == parameters
        assert ("not timed" in model.get("teacher", "")) == (one["op"] == "KDRL exact")


def test_step_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "Trainee", None)  # no model is built any more
    records = list(step.records(ROUNDS, time.monotonic() - 1, models=(MODEL,)))
    assert len(records) == 4
    for one in records:
        assert_no_figure(one, "out of time")


def test_step_names_why_a_provider_is_not_timed() -> None:
    others = (Provider(name="other", package="kdrl-not-on-any-index"), no_head)
    records = list(step.records(ROUNDS, later(), others, (MODEL,)))
    assert_no_figure(records[0], "not installed")
    assert records[1]["status"].startswith(
        "failed: RuntimeError: no head, GRPO: the backbone got no"
    )
    assert "step_ms" not in records[1]


def test_step_without_memory_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: step.ModelSizes) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step, "Trainee", fails)
    for one in step.records(ROUNDS, later(), models=(MODEL,)):
        assert_no_figure(one, "failed: out of memory")


def model_gradients(model: Any, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("op", [GRPO, KDRL], ids=lambda op: op.name)
def test_the_steps_gradient_reaches_every_parameter(trainee: step.Trainee, op: Any) -> None:
    batch = trainee.batches[1]

    def by_definition(model: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        def loss() -> Tensor:
            head_inputs = replace(batch.inputs, old_logprobs=batch.inputs.old_logprobs.to(dtype))
            hidden = model.model(input_ids=batch.ids).last_hidden_state.flatten(0, 1)
            logp = (hidden @ model.lm_head.weight.T).log_softmax(dim=1)
            t_logits = head_inputs.teacher_hidden.to(dtype) @ head_inputs.teacher_weight.to(dtype).T
            losses = definition.row_results(
                head_inputs, op, logp, t_logits.log_softmax(dim=1)
            ).losses
            assert losses is not None
            return losses.mean()

        return model_gradients(model, loss)

    assert trainee.step_ms(HOME[OURS], op, {}, batch) > 0
    gradients = {name: p.grad.clone() for name, p in trainee.model.named_parameters()}
    assert len(gradients) == 26
    assert all(gradient.any() for gradient in gradients.values())
    # k's bias moves all scores of a query alike: its gradient is rounding, and so is its floor
    assert_matches(
        gradients, lambda dtype: by_definition(copy.deepcopy(trainee.model).to(dtype), dtype)
    )


def test_a_step_that_stops_at_the_head_is_no_sample(trainee: step.Trainee) -> None:
    with pytest.raises(RuntimeError, match="the backbone got no gradient"):
        trainee.step_ms(no_head, GRPO, {}, trainee.batches[0])


def test_the_head_alone_has_the_steps_hidden_states(trainee: step.Trainee) -> None:
    first, second = trainee.batches
    for batch in (first, second):
        with torch.no_grad():
            hidden = trainee.model.model(input_ids=batch.ids).last_hidden_state
        torch.testing.assert_close(batch.inputs.hidden.detach(), hidden.view(16, 64))
        assert batch.inputs.weight is trainee.model.lm_head.weight
    assert not torch.equal(first.ids, second.ids)
    assert trainee.head_ms(HOME[OURS], GRPO, {}, first) > 0
    untouched = [p.grad for name, p in trainee.model.named_parameters() if "layers" in name]
    assert untouched == [None] * len(untouched)


def test_no_row_of_a_step_is_clipped(trainee: step.Trainee) -> None:
    for batch in trainee.batches:
        head_inputs = batch.inputs
        logp = (head_inputs.hidden @ head_inputs.weight.T).detach().log_softmax(dim=1)
        log_ratio = (
            logp.gather(1, head_inputs.tokens[:, None]).squeeze(1) - head_inputs.old_logprobs
        )
        assert 0 < log_ratio.abs().max() < math.log1p(definition.CLIP)
        assert torch.equal(head_inputs.tokens.view(2, 8)[:, :-1], batch.ids[:, 1:])
        assert (
            1 < (head_inputs.hidden @ head_inputs.weight.T).std() < 4
        )  # as long as those of inputs.py


# rows

BYTES = {
    "sweep": 4,
    "sweep, two streams": 8,
    "jsd": 16,
    "gradient": 4 + 4,
    "gradient, two streams": 8 + 4,
}
"""An element of [C, V], dz in float32."""


def test_rows_records(inputs: Inputs) -> None:
    all_records = list(rows.records(inputs, ROUNDS, later()))
    assert [one["op"] for one in all_records] == [*BYTES]
    for one in all_records:
        assert_samples(one, "total_ms", "copy_ms")
        assert (one["kind"], one["provider"], one["shape"]) == ("rows", OURS, "tiny")
        assert one["bytes"] == BYTES[one["op"]] * TINY.N * TINY.V
        assert one["setting"] == {"rows": TINY.N}


def test_rows_bytes_of_a_16_bit_gradient() -> None:
    chunk: Any = SimpleNamespace(C=3, V=1000, dtype=torch.bfloat16)
    moved = {kernel.name: kernel.moved(chunk) for kernel in rows.KERNELS}
    assert moved == {
        "sweep": 12_000,
        "sweep, two streams": 24_000,
        "jsd": 48_000,
        "gradient": 18_000,
        "gradient, two streams": 30_000,
    }


def test_rows_out_of_time(inputs: Inputs) -> None:
    all_records = list(rows.records(inputs, ROUNDS, time.monotonic() - 1))
    assert len(all_records) == len(BYTES)
    for one in all_records:
        assert_no_figure(one, "out of time")


@pytest.mark.parametrize("kernel", rows.KERNELS, ids=lambda kernel: kernel.name)
def test_copy_moves_as_many_bytes(inputs: Inputs, kernel: rows.Kernel) -> None:
    chunk = rows.ChunkInputs(inputs, 32)
    chunk.work.fill_(math.nan)
    chunk.copy(kernel.moved(chunk))
    written = 4 * int((~chunk.work.isnan()).sum())
    assert 2 * written == kernel.moved(chunk)


def test_rows_are_timed_on_the_heads_logits(
    monkeypatch: pytest.MonkeyPatch, inputs: Inputs
) -> None:
    """Every sweep of every round reads the logits, although sweeps write over them."""
    work = load(rows._impl(inputs.hidden.device))
    real, seen = work.sweep, []
    logits = (inputs.hidden @ inputs.weight.T).detach()
    t_logits = inputs.teacher_hidden @ inputs.teacher_weight.T

    def spy(student: Any, tokens: Tensor, *, teacher: Any = None, **options: Any) -> Any:
        torch.testing.assert_close(student.logits, logits)
        if teacher is not None:
            torch.testing.assert_close(teacher.logits, t_logits)
        assert torch.equal(tokens, inputs.tokens)
        seen.append(teacher and teacher.kd)
        return real(student, tokens, teacher=teacher, **options)

    monkeypatch.setattr(work, "sweep", spy)
    all_records = list(rows.records(inputs, ROUNDS, later()))
    assert {one["status"] for one in all_records} == {"ok"}
    each = ROUNDS + 1  # and the one that warms up
    assert [seen.count(kd) for kd in (None, "rkl", "jsd")] == [2 * each, 2 * each, each]
    assert logits.std() > 1


def test_rows_gradient_is_one(monkeypatch: pytest.MonkeyPatch, inputs: Inputs) -> None:
    """The timed gradient is dL/dlogits of c · log p_y + g · KL(p‖q), in place."""
    work = load(rows._impl(inputs.hidden.device))
    real, checked = work.gradient, []

    def exact(coef: Any, dtype: torch.dtype) -> Tensor:
        heads = (
            (inputs.hidden, inputs.weight),
            (inputs.teacher_hidden, inputs.teacher_weight),
        )
        z, t = (x.detach().to(dtype) @ w.detach().to(dtype).T for x, w in heads)
        logp, logq = z.requires_grad_().log_softmax(dim=1), t.log_softmax(dim=1)
        loss = (coef.logprobs * logp.gather(1, inputs.tokens[:, None]).squeeze(1)).sum()
        if coef.kl is not None:
            loss = loss + (coef.kl * definition.divergence("rkl", logp, logq)).sum()
        return torch.autograd.grad(loss, z)[0]

    def spy(student: Any, tokens: Tensor, stats: Any, coef: Any, **options: Any) -> Any:
        out = real(student, tokens, stats, coef, **options)
        assert out.data_ptr() == student.logits.data_ptr()
        assert_matches({"dz": out}, lambda dtype: {"dz": exact(coef, dtype)})
        checked.append(coef.kl is not None)
        return out

    monkeypatch.setattr(work, "gradient", spy)
    all_records = list(rows.records(inputs, ROUNDS, later()))
    assert {one["status"] for one in all_records} == {"ok"}
    assert sorted(checked) == [False] * (ROUNDS + 1) + [True] * (ROUNDS + 1)

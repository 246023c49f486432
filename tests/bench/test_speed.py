"""Tests who is timed, who is not and why, what a sample is, and what a stopped run leaves."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import definition, results_file
from bench.inputs import LEAVES, Inputs, make_inputs
from bench.measures import accuracy, speed, timing
from bench.measures.sketch import GRADIENTS
from bench.ops import FLOORS, OPS, OPS_BY_NAME, Op
from bench.providers import Outputs, Provider
from bench.providers.home import PROVIDERS as HOME
from bench.results_file import OURS, SKETCH
from bench.shapes import TINY
from kdrl_kernels import gemm

ROOT = Path(__file__).parents[2]
GRPO, KDRL = OPS_BY_NAME["GRPO"], OPS_BY_NAME["KDRL exact"]
OUR_OWN, OUR_SKETCH, FULL_LOGITS = HOME[:3]


@pytest.fixture(scope="module")
def inputs() -> list[Inputs]:
    return [make_inputs(TINY, device="cpu", seed=seed) for seed in range(2)]


def _records(
    inputs: list[Inputs], *contestants: Provider, op: Op = GRPO, deadline: float = float("inf")
) -> dict[str, dict[str, Any]]:
    all_records = speed.records(op, inputs, contestants, rounds=4, deadline=deadline)
    return {one["provider"]: one for one in all_records}


def _scaled(factor: float) -> Provider:
    """Make a provider with the right outputs, and with gradients times a factor."""

    def call(case: Inputs, op: Op) -> Outputs:
        outputs, _ = definition.by_rows(case, op, torch.float32, 8)
        logp = definition.log_softmax(case.hidden @ case.weight.T)
        whole = definition.row_results(case, op, logp, None).losses
        assert whole is not None
        graph = whole.mean()
        return outputs | {"loss": factor * graph + (1 - factor) * graph.detach()}

    return Provider(name=f"scaled by {factor}", whole=call)


def test_everybody_has_a_sample_for_each_round(inputs: list[Inputs]) -> None:
    by_name = _records(inputs, OUR_OWN, FULL_LOGITS)
    assert list(by_name) == [*FLOORS, OURS, FULL_LOGITS.name]
    for one in by_name.values():
        assert one["status"] == "ok"
        assert len(one["total_ms"]) == 4
        assert min(one["total_ms"]) > 0
        assert one["flop"] == 3 * 2 * 32 * 64 * 512
    ours = by_name[OURS]
    parts = zip(ours["forward_ms"], ours["backward_ms"], ours["total_ms"], strict=True)
    assert all(a + b == total for a, b, total in parts)
    assert set(ours["errors"]) == {"logprobs", "loss", "dhidden", "dweight"}


def test_orders_differ_and_inputs_alternate(
    inputs: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []

    def spy(provider: Provider, case: Inputs, *_: object) -> tuple[float, float]:
        seen.append((provider.name, inputs.index(case)))
        return 1.0, 2.0

    monkeypatch.setattr(speed, "timed_call", spy)
    monkeypatch.setattr(Inputs, "__eq__", lambda a, b: a is b)
    _records(inputs, OUR_OWN, FULL_LOGITS)
    assert len(seen) == 10, "four rounds, and one that warms up"
    rounds = [seen[i : i + 2] for i in range(2, 10, 2)]
    assert [case for one in rounds for _, case in one] == [
        0,
        0,
        1,
        1,
        0,
        0,
        1,
        1,
    ]
    assert all({name for name, _ in one} == {OURS, FULL_LOGITS.name} for one in rounds)
    assert len({one[0][0] for one in rounds}) == 2, "the same one always goes first"


@pytest.mark.parametrize("factor", [0.9, 1.1, -1.0])
def test_another_gradient_is_marked_and_not_timed(inputs: list[Inputs], factor: float) -> None:
    one = _records(inputs, _scaled(factor))[f"scaled by {factor}"]
    assert one["status"].startswith("differs: d")
    assert f"{abs(1 - factor):.1%}" in one["status"]
    assert "total_ms" not in one
    assert _records(inputs, _scaled(1.0))["scaled by 1.0"]["status"] == "ok"


def test_nan_differs(inputs: list[Inputs]) -> None:
    one = _records(inputs, _scaled(float("nan")))["scaled by nan"]
    assert one["status"].startswith("differs"), one["status"]


def test_our_own_budget_is_the_tests(inputs: list[Inputs], monkeypatch: pytest.MonkeyPatch) -> None:
    """Our library may not have an error of a percent, which others may."""
    slightly = _scaled(1.01)
    assert _records(inputs, slightly)[slightly.name]["status"] == "ok"
    monkeypatch.setattr(speed, "OURS", slightly.name)
    one = _records(inputs, slightly)[slightly.name]
    assert one["status"].startswith("differs: error of d")
    assert "budget" in one["status"]


def test_our_sketch_is_no_peer_of_ours(inputs: list[Inputs]) -> None:
    """Its error is beyond that of peers, which is noise; its outputs are exact."""
    no_row_is_flat = replace(OUR_SKETCH, settings=({"threshold": 2**-6, "flat": math.inf},))
    one = _records(inputs, no_row_is_flat, op=KDRL)[SKETCH]
    assert one["status"] == "ok"
    assert one["errors"]["dhidden"]["max"] > accuracy.DIFFERS
    assert max(one["errors"][name]["max"] for name in ("loss", "logprobs", "kl")) < 1e-5


@pytest.mark.parametrize(
    ("mean", "status"), [(1.0, "ok"), (1.1, "differs: relative error of dhidden 1.0e-01 on av")]
)
def test_a_sketch_may_have_noise_but_no_bias(
    inputs: list[Inputs], mean: float, status: str
) -> None:
    def noisy(case: Inputs, op: Op, seed: int = 0) -> Outputs:
        whole = _scaled(mean + (0.1 if seed % 2 else -0.1)).whole
        assert whole is not None
        return whole(case, op)

    one = _records(inputs, Provider(name=SKETCH, whole=noisy))[SKETCH]
    assert one["status"].startswith(status), one["status"]
    assert ("total_ms" in one) == (mean == 1)


def test_rounding_is_no_bias() -> None:
    truth = {"dhidden": torch.ones(4, 4).double()}
    draws = [{"dhidden": torch.full((4, 4), 1 + 1e-5)}] * accuracy.DRAWS
    assert accuracy.biased(draws, truth, ["dhidden"]) is None
    draws = [{"dhidden": torch.full((4, 4), 1 + 1e-4)}] * accuracy.DRAWS
    difference = accuracy.biased(draws, truth, ["dhidden"])
    assert difference == (
        "differs: relative error of dhidden 1.0e-04 on average over 16 seeds, 1.0e-04 with one"
    )


def test_wrong_outputs_of_a_sketch_differ(inputs: list[Inputs]) -> None:
    def shifted(case: Inputs, op: Op, **sketch: int) -> Outputs:
        assert OUR_SKETCH.whole is not None
        outputs = OUR_SKETCH.whole(case, op, **sketch)
        return outputs | {"logprobs": outputs["logprobs"] + 1e-3}

    one = _records(inputs, Provider(name=SKETCH, whole=shifted))[SKETCH]
    assert one["status"].startswith("differs: error of logprobs")


def test_no_gradient_differs(inputs: list[Inputs]) -> None:
    def call(case: Inputs, _: Op) -> Outputs:
        return {"loss": case.hidden.sum()}  # the head is left out

    one = _records(inputs, Provider(name="half", whole=call))["half"]
    assert one["status"] == "differs: no dweight"


def test_failure_stands_in_the_record(inputs: list[Inputs]) -> None:
    calls = 0

    def later(case: Inputs, op: Op) -> Outputs:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("illegal memory access\nand a long trace")
        assert FULL_LOGITS.whole is not None
        return FULL_LOGITS.whole(case, op)

    by_name = _records(inputs, Provider(name="later", whole=later), OUR_OWN)
    assert by_name["later"]["status"] == "failed: RuntimeError: illegal memory access"
    assert "total_ms" not in by_name["later"]
    assert len(by_name[OURS]["total_ms"]) == 4, "one failure costs nobody else a round"


def test_the_faster_right_setting_is_kept(inputs: list[Inputs]) -> None:
    def call(case: Inputs, op: Op, pause: float, factor: float) -> Outputs:
        time.sleep(pause)
        whole = _scaled(factor).whole
        assert whole is not None
        return whole(case, op)

    choices = ({"pause": 0.05, "factor": 1.0}, {"pause": 0.0, "factor": 1.0})
    wrong = {"pause": 0.0, "factor": 2.0}
    provider = Provider(name="choosy", whole=call, settings=(*choices, wrong))
    one = _records(inputs, provider)["choosy"]
    assert one["setting"] == choices[1]
    assert [trial["status"][:7] for trial in one["tried"]] == ["ok", "ok", "differs"]


def test_out_of_time(inputs: list[Inputs]) -> None:
    by_name = _records(inputs, OUR_OWN, deadline=time.monotonic() - 1)
    assert {one["status"] for one in by_name.values()} == {speed.OUT_OF_TIME}
    assert not any("total_ms" in one for one in by_name.values())


def test_errors_are_relative_to_the_largest() -> None:
    truth = {"dhidden": torch.arange(1.0, 2001.0).double(), "loss": torch.tensor(1e-9).double()}
    results = {"dhidden": truth["dhidden"].clone(), "loss": torch.tensor(2e-9)}
    results["dhidden"][3] += 20
    errors = accuracy.errors(results, truth)
    assert errors["dhidden"]["max"] == pytest.approx(0.01)
    assert errors["dhidden"]["p999"] == pytest.approx(0.0, abs=1e-9)
    assert errors["loss"]["max"] < 1e-8, "a mean that cancels is not 100% off"


def test_the_budget_is_that_of_the_gemm_of_16_bit_operands(
    inputs: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensor cores truncate: what they cost a float32 GEMM's error is no fault of ours."""
    names = (*LEAVES, "teacher_hidden", "teacher_weight")
    half = {name: getattr(inputs[0], name).detach().bfloat16() for name in names}
    case, exact_project = replace(inputs[0], **half), gemm.project

    def truncating(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        exact_project(hidden, weight, out)
        out.mul_(1 - 1e-5)

    monkeypatch.setattr(gemm, "project", truncating)
    op = OPS_BY_NAME["logprob + entropy"]
    truth = accuracy.exact(case, op)

    def verdict(factor: float) -> str | None:
        logits = case.hidden.float() @ case.shared_weight.float().T * factor
        logp = logits.log_softmax(1)
        results = definition.row_results(case, op, logp, None).outputs
        return accuracy.beyond_budget(results, accuracy.errors(results, truth), truth, case, op)

    assert verdict(1 - 1e-5) is None
    assert "error of" in str(verdict(1 - 4e-5))


def test_flop_of_the_operations() -> None:
    unit = TINY.unit_flop
    units = {op.name: op.flop(TINY) / unit for op in OPS}
    assert units == {
        "logprob + entropy": 1,
        "GRPO": 3,
        "KDRL exact": 4,
        "KDRL k2": 4,
        "reverse KL": 4,
        "forward KL": 4,
        "JSD": 4,
        "GRPO, half at 0": 2,
        "GRPO, frozen head": 2,
        "cross entropy": 3,
        "GRPO + top-64 reverse KL": 3,
        "GRPO, head adapter": 2,
        "GRPO + both KLs": 4,
        "KDRL, two teachers": 5,
        "entropy-weighted reverse KL": 4,
    }


def test_a_call_that_leaves_too_few_gradients_is_refused(inputs: list[Inputs]) -> None:
    partial = Provider(name="partial", whole=lambda case, _: {"loss": case.hidden.sum()})
    with pytest.raises(RuntimeError, match="partial, GRPO must leave gradients"):
        timing.timed_call(partial, inputs[0], GRPO, {})


@pytest.mark.slow  # test_scaling.py has one case
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="sizes are of the CPU allocator")
def test_memory_counts_the_logits() -> None:
    """Full logits hold [N, V] several times, our library a part of it."""
    cases = [(FULL_LOGITS.name, {}), (OURS, {"workspace_bytes": 4 << 20})]
    full, ours, by_threshold = _memory(
        f"[in_own_process(shape, 'reasoning', 'GRPO', *case) for case in {cases!r}] + "
        "[alone(extra_bytes, shape, 'reasoning', 'GRPO')]"
    )
    logits = 4 * 512 * 8192
    assert full["gradient_bytes"] == ours["gradient_bytes"] == 4 * 64 * (512 + 8192)
    assert full["extra_bytes"] > 2 * logits
    # a chunk is so small that the kernel's counters, right to some 100 KB, may say less than 0
    assert abs(ours["extra_bytes"]) < logits / 2
    assert list(by_threshold) == list(GRADIENTS)
    assert all(0.9 * logits < size < 2 * logits for size in by_threshold.values()), by_threshold


def _memory(expression: str) -> Any:
    """Evaluate in a process whose fork server no other test shares: it has torch loaded."""
    code = f"""
import dataclasses, json
from bench.measures.memory import alone, in_own_process
from bench.measures.sketch import extra_bytes
from bench.shapes import TINY
from kdrl_kernels import gemm
shape = dataclasses.replace(TINY, name="memory", N=512, V=8192, V_t=8192)
print(json.dumps({expression}))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_file_is_whole_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = results_file.new_run("python -m bench")
    run["records"] = [results_file.record("speed", "GRPO", TINY, "reasoning", OURS, total_ms=[1.0])]
    results_file.save(run, tmp_path)
    before = (tmp_path / "results.json").read_text()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    run["records"] *= 2
    with pytest.raises(OSError, match="disk full"):
        results_file.save(run, tmp_path)
    assert (tmp_path / "results.json").read_text() == before
    assert results_file.load(tmp_path)["finished"] is None
    assert len(json.loads(before)["records"]) == 1


@pytest.mark.slow  # seconds of timing
def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--minutes", "2", "--shape", "tiny", "--rounds", "3"]
    command += ["--stages", "speed", "--providers", OURS, "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the first record is there
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    run = results_file.load(tmp_path / "run")
    assert run["finished"] is None
    assert run["records"]
    assert "--out DIR" in run["command"]
    assert str(tmp_path) not in json.dumps(run["command"])

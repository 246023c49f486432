"""Tests scaling of bench/ on tiny sizes: it times what it says."""

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from bench.inputs import Inputs
from bench.measures import scaling
from bench.ops import FLOOR
from bench.providers import Provider
from bench.results_file import OURS
from bench.shapes import TINY
from tests.bench.test_measures import (
    CHUNKS,
    FULL,
    GRPO,
    HOME,
    KDRL,
    ROUNDS,
    assert_no_figure,
    assert_samples,
    later,
)

SIZES = scaling.ScalingSizes(
    TINY,
    tokens=(8, 24),
    vocabularies=(128, 300),
    workspaces=(1 << 16, 1 << 18),
    workspace_tokens=40,
)


def test_scaling_records() -> None:
    all_records = list(scaling.records(ROUNDS, later(), None, SIZES))
    curves = {
        "N": (SIZES.tokens, (FLOOR, OURS, FULL, CHUNKS)),
        "V": (SIZES.vocabularies, (FLOOR, OURS, FULL, CHUNKS)),
        "workspace": (SIZES.workspaces, (OURS,)),
    }
    assert {(r["axis"], r["value"], r["op"], r["provider"]) for r in all_records} == {
        (axis, value, op, provider)
        for axis, (values, providers) in curves.items()
        for value in values
        for provider in providers
        for op in ("GRPO", "KDRL exact")
    }
    assert len(all_records) == 36
    for one in all_records:
        assert_samples(one, "total_ms")
        assert one["kind"] == "scaling"
        assert one["extra_bytes"] is None
        N = {"N": one["value"], "V": TINY.N, "workspace": 40}[one["axis"]]
        V = one["value"] if one["axis"] == "V" else TINY.V
        assert one["sizes"] == {"N": N, "H": 64, "V": V, "H_t": 64, "V_t": V}
        if one["axis"] == "workspace":
            assert one["setting"] == {"workspace_bytes": one["value"]}
        if one["provider"] == CHUNKS:
            assert one["setting"] in HOME[CHUNKS].settings


def test_scaling_times_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def fake(provider: Provider, case: Inputs, op: Any, setting: Any) -> tuple[float, float]:
        called.append(
            (
                provider.name,
                case.hidden.shape,
                case.weight.shape,
                op.name,
                setting,
            )
        )
        return 1.0, 2.0

    monkeypatch.setattr(scaling, "timed_call", fake)
    for one in scaling.records(ROUNDS, later(), None, SIZES):
        if one["provider"] == FLOOR:
            continue
        assert one["total_ms"] == [3.0] * ROUNDS
        N, V = one["sizes"]["N"], one["sizes"]["V"]
        case = one["provider"], (N, 64), (V, 64), one["op"], one["setting"]
        assert called.count(case) == ROUNDS + 1


@pytest.mark.slow  # a process of its own
def test_scaling_memory_is_that_of_its_case() -> None:
    measured = []

    def fake(shape: Any, profile: str, op: str, provider: str, setting: Any) -> dict[str, int]:
        measured.append(
            (shape.N, shape.V, shape.V_t, profile, op, provider, tuple(setting.items()))
        )
        if provider == FULL:
            raise RuntimeError("its process died")
        return {"extra_bytes": len(measured), "input_bytes": -1}

    all_records = list(scaling.records(ROUNDS, later(), fake, SIZES))
    for one in all_records:
        if one["provider"] == FLOOR:
            assert one["extra_bytes"] is None
            continue
        sizes = [one["sizes"][name] for name in ("N", "V", "V_t")]
        case = one["profile"], one["op"], one["provider"], tuple(one["setting"].items())
        number = measured.index((*sizes, *case)) + 1
        if one["provider"] == FULL:
            assert one["extra_bytes"] is None
            assert one["memory_status"] == "failed: RuntimeError: its process died"
        else:
            assert one["extra_bytes"] == number
    assert len(measured) == len(set(measured)) == 28


def test_scaling_out_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "make_inputs", None)  # nothing is made any more
    all_records = list(scaling.records(ROUNDS, time.monotonic() - 1, None, SIZES))
    assert len(all_records) == 36
    for one in all_records:
        assert_no_figure(one, "out of time")


def test_scaling_skips_full_logits_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 4 * 24 * 512 / scaling.LOGITS_SHARE
    monkeypatch.setattr(scaling, "free_bytes", lambda: math.ceil(most))
    all_records = list(scaling.records(ROUNDS, later(), None, SIZES))
    skipped = {
        (one["axis"], one["value"], one["op"]): one["status"]
        for one in all_records
        if one["status"] != "ok"
    }
    assert all(one["provider"] == FULL for one in all_records if one["status"] != "ok")
    assert skipped == {  # one stream: 24 x 512 and 32 x 300 fit; two: half of that
        ("N", 24, "KDRL exact"): "not supported: 24 x 512 logits need 0.0 GB",
        ("V", 300, "KDRL exact"): "not supported: 32 x 300 logits need 0.0 GB",
    }
    for one in all_records:
        if one["status"] != "ok":
            assert_no_figure(one, one["status"])


def test_scaling_says_how_much_full_logits_need() -> None:
    shape = replace(TINY, N=131_072, V=152_064, V_t=152_064)
    assert scaling.too_large(shape, GRPO, None) is None
    assert scaling.too_large(shape, GRPO, 140 << 30) is None
    assert scaling.too_large(shape, KDRL, 140 << 30) == (
        "not supported: 131,072 x 152,064 logits need 159.5 GB"
    )

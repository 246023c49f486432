"""The estimate of time: each term by hand, what overlaps, and the devices."""

from dataclasses import replace

import pytest
import torch

from kdrl_train.config import ModelConfig
from kdrl_train.start.estimate.case import Placement
from kdrl_train.start.estimate.devices import PEAKS, Device, link_gb_per_s, measure_cpu
from kdrl_train.tools.plan import command
from kdrl_train.tools.plan.command import PlanConfig
from kdrl_train.tools.plan.speed import Lengths, time_terms, totals
from tests.train.estimate_cases import ATTENTION, case_of, sharded_case

DEVICE = Device(memory_bytes=1e9, flops=1e9, bandwidth=1e8, link=1e7)


def test_time_by_hand(models: dict[str, str]) -> None:
    """Two completions a GPU, of 6 + 5 tokens on average and 10 at most; 1,216 = 2·608."""
    seconds = {
        term.name: term.value
        for term in time_terms(
            sharded_case(models), DEVICE, Lengths(prompt=6, response=5), launch_us=100
        )
    }
    read, tokens, prompts = 1216 + 256, 2 * 11, 2 * 6
    forward = tokens * (2 * 1216 + 4 * 2 * 8 * 5.5)
    kept = 2 * (8 * 16 + 2 * (ATTENTION + 4 * 16))
    expected = {
        "decode, weights": 10 * max(2 * read / 1e8, 2 * read * 2 / 1e9),
        "decode, keys and values": 2 * (10 * 6 + 50) * (4 * 2 * 4) / 1e8,
        "decode, Python and kernel launches": 10 * 2 * 1e-4,
        "prefill": prompts * (2 * 1216 + 4 * 2 * 8 * 3) / 1e9,
        "policy, forward and backward": 3 * forward / 1e9,
        "policy, norms and activations": 4 * kept * tokens / 1e8,
        "policy, recomputed": forward / 1e9,
        "teacher, forward": tokens * (2 * 3384 + 4 * 3 * 12 * 5.5) / 1e9,
        "head, GEMMs": 3 * 2 * 10 * 8 * 32 / 1e9,
        "head, row kernels": (2 * 2 * 10 * 256 + 10 * 32 * 2) / 1e8,
        "head, teacher's GEMM": 2 * 10 * 12 * 40 / 1e9,
        "AdamW and clip": 40 * 1480 / 4 / 1e8,
        "all-gather, policy": 2 * 1 * 2 * 1480 * 0.75 / 1e7,
        "reduce-scatter, gradients": 4 * 1480 * 0.75 / 1e7,
        "weights to the sampler": 2 * 1480 * 0.75 / 1e7,
        "all-gather, teacher": 2 * 4356 * 0.75 / 1e7,
    }
    assert seconds == pytest.approx(expected)


def test_only_the_cache_of_a_window_is_copied_for_each_token(models: dict[str, str]) -> None:
    case, lengths = sharded_case(models), Lengths(prompt=6, response=5)
    wide = [replace(layer, window=1000) for layer in case.policy.each]
    copied = replace(case, policy=replace(case.policy, each=tuple(wide)))
    once, thrice = (
        next(t.value for t in time_terms(one, DEVICE, lengths, launch_us=1) if "values" in t.name)
        for one in (case, copied)
    )
    assert thrice == pytest.approx(3 * once)


def test_a_sketch_projects_and_multiplies_a_few_entries(models: dict[str, str]) -> None:
    """10 tokens of 8 and 12 numbers, 32 columns, 5 entries a token; dX and dW are written once."""
    case = sharded_case(models)
    run = replace(case.run, model=replace(case.run.model, head_backward="sketch"))
    lengths = Lengths(prompt=6, response=5)
    case = replace(case, run=run, entries=5.0, flat=0.0)
    terms = time_terms(case, DEVICE, lengths, launch_us=100)
    head = {term.name: term for term in terms if term.name.startswith("head")}
    assert {name: term.value for name, term in head.items()} == pytest.approx(
        {
            "head, GEMMs": 2 * 10 * 8 * 32 / 1e9,
            "head, row kernels": (2 + 1) * 10 * 256 / 1e8,  # the sweep, and the sketch of p
            "head, products of the sketch": 2 * (10 * 8 + 32 * 8 + 2 * 50 * 8) / 1e8,
            "head, teacher's GEMM": 2 * 10 * 12 * 40 / 1e9,
        }
    )
    assert head["head, GEMMs"].formula.startswith("1 · 2 · 10 · 8 · 32 = ")
    terms = time_terms(replace(case, flat=0.2), DEVICE, lengths, launch_us=100)
    gemms = next(term for term in terms if term.name == "head, GEMMs")
    assert gemms.value == pytest.approx(1.4 * 2 * 10 * 8 * 32 / 1e9)
    assert gemms.formula.startswith("1.4 · 2 · 10 · 8 · 32 = ")


def test_ratios_of_completions_cost_a_product_more(models: dict[str, str]) -> None:
    """10 tokens of 8 numbers, 32 columns; where completions are used once, all ratios are 1."""
    case = sharded_case(models)
    names = []
    for updates, policy in ((2, "gspo"), (1, "gspo"), (2, "cispo")):
        method = replace(case.run.method, policy=policy)
        optim = replace(case.run.optim, updates_per_rollout=updates)
        run = replace(case.run, method=method, optim=optim)
        terms = time_terms(
            replace(case, run=run), DEVICE, Lengths(prompt=6, response=5), launch_us=100
        )
        names.append({t.name: t.value for t in terms}.get("head, ratios of completions"))
    assert names == [pytest.approx(2 * 10 * 8 * 32 / 1e9), None, None]


def test_a_reference_reads_what_the_teacher_reads(models: dict[str, str]) -> None:
    case = sharded_case(models)
    model = replace(case.run.model, reference="somewhere")
    run = replace(case.run, model=model)
    case = replace(case, run=run, other_teachers=(case.policy,))
    terms = time_terms(case, DEVICE, Lengths(prompt=6, response=5), launch_us=100)
    seconds = {term.name: term.value for term in terms}
    policy = seconds["policy, forward and backward"]
    assert seconds["reference, forward"] == pytest.approx(policy / 3)
    assert seconds["head, reference's GEMM"] == pytest.approx(2 * 10 * 8 * 40 / 1e9)


def test_communication_hides_behind_the_passes_at_best(models: dict[str, str]) -> None:
    lengths = Lengths(prompt=6, response=5)
    terms = time_terms(sharded_case(models), DEVICE, lengths, launch_us=100)
    sequential, overlapped = totals(terms)
    parts = {part: sum(t.value for t in terms if part in t.when) for part in ("communication",)}
    compute = sum(t.value for t in terms if {"update", "teacher"} & set(t.when))
    assert sequential == pytest.approx(sum(t.value for t in terms))
    assert overlapped == pytest.approx(sequential - min(parts["communication"], compute))
    alone = replace(case_of(models, "untied"), placement=Placement())
    sequential, overlapped = totals(time_terms(alone, DEVICE, lengths, launch_us=100))
    assert sequential == overlapped


def test_a_mask_skips_no_attention(models: dict[str, str]) -> None:
    case = case_of(models, "untied")
    lengths = Lengths(prompt=6, response=5)
    sdpa = replace(case, run=replace(case.run, model=ModelConfig(attention="sdpa")))
    masked, free = (
        {t.name: t.value for t in time_terms(c, DEVICE, lengths, launch_us=0)} for c in (sdpa, case)
    )
    attention = 3 * 88 * 4 * 2 * 8 * (64 - 5.5) / 1e9
    name = "policy, forward and backward"
    assert masked[name] - free[name] == pytest.approx(attention)


def test_offloading_costs_time(models: dict[str, str]) -> None:
    lengths = Lengths(prompt=6, response=5)
    case = sharded_case(models, teacher_weights="cpu", offload_policy=True)
    seconds = {t.name: t.value for t in time_terms(case, DEVICE, lengths, launch_us=0)}
    assert seconds["teacher from the CPU"] == pytest.approx(2 * 4356 / 25e9)
    assert seconds["offloaded policy"] == pytest.approx(8 * 370 / 25e9)


def test_devices() -> None:
    assert link_gb_per_s(PEAKS["h100"], 8, 8) == 450
    assert link_gb_per_s(PEAKS["h100"], 64, 8) == 400
    assert link_gb_per_s(PEAKS["a100"], 16, 4) == 100
    config = PlanConfig(device="h100", gpus=64, model=ModelConfig(dtype="bfloat16"))
    assert command.device_of(config) == Device(
        memory_bytes=80e9,
        flops=pytest.approx(0.7 * 989e12),
        bandwidth=pytest.approx(0.8 * 3.35e12),
        link=pytest.approx(0.7 * 400e9),
    )
    custom = replace(
        config, gpu_memory=96, tflops=100, bandwidth=1, interconnect=10, gemm_share=1.0
    )
    assert command.device_of(custom) == Device(
        memory_bytes=96e9, flops=100e12, bandwidth=pytest.approx(0.8e12), link=pytest.approx(7e9)
    )


def test_the_cpu_is_measured_and_shared() -> None:
    one, two = (measure_cpu(torch.float32, processes) for processes in (1, 2))
    assert two.memory_bytes == one.memory_bytes / 2
    assert 1e8 < one.flops < 1e14
    assert 1e8 < one.bandwidth < 1e13

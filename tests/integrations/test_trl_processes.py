"""KdrlTrainer on two processes: DDP and FSDP2 (gloo), a teacher, LoRA, a process without tokens."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl")

from tests.integrations.trl_ranks import TrlOutcome, TrlRun, train_ranks

LOSSES = ("grpo", "dapo", "dr_grpo", "bnpo", "cispo")
QUICK = ("dapo", "token", 2, False)
CASES = [(loss_type, "token", 4, False) for loss_type in LOSSES]
CASES += [(loss_type, "sequence", 1, True) for loss_type in ("grpo", "bnpo")]
"""How the tokens of all processes are counted is the loss's, and the same with shards."""
ATTENTION = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
WITH_HEAD = {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"]}
HEAD_SAVED = ATTENTION | {"modules_to_save": ["lm_head", "embed_tokens"]}


def assert_same(run: TrlOutcome, other: TrlOutcome, names: tuple[str, ...] = ()) -> None:
    """Compare the weights and what was logged, or some names of it, to the rounding of float32."""
    assert other.log
    for record, expected in zip(run.log, other.log, strict=True):
        assert record.keys() == expected.keys()
        for name in names or expected:
            value = expected[name]
            assert record[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert run.parameters.keys() == other.parameters.keys()
    for name, value in other.parameters.items():
        np.testing.assert_allclose(run.parameters[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("loss_type", "level", "accumulation", "fsdp"),
    [QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)],
)
def test_two_processes_train_as_with_trl(
    tmp_path: Path, loss_type: str, level: str, accumulation: int, fsdp: bool
) -> None:
    options = {
        "loss_type": loss_type,
        "importance_sampling_level": level,
        "gradient_accumulation_steps": accumulation,
    }
    run = TrlRun(folder=tmp_path, options=options, tool_mask=True, fsdp=fsdp)
    ours = train_ranks(run)
    assert_same(ours, train_ranks(replace(run, kdrl=False)))
    assert ours.sharded == fsdp
    if loss_type != "bnpo":  # which takes the mean over the tokens of each process
        # with several micro-batches TRL shuffles them, and logs means of their means
        names = ("loss", "grad_norm") if accumulation > 1 else ()
        assert_same(ours, train_ranks(run, 1), names)


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["grpo", "cispo"])
def test_two_processes_have_trls_ratios(tmp_path: Path, loss_type: str) -> None:
    options = {"loss_type": loss_type, "num_iterations": 2, "learning_rate": 0.5, "max_steps": 4}
    run = TrlRun(folder=tmp_path, options=options | {"max_grad_norm": 10.0})
    ours, theirs = train_ranks(run), train_ranks(replace(run, kdrl=False))
    assert_same(ours, theirs)
    if loss_type != "cispo":
        assert max(record["clip_ratio/region_mean"] for record in theirs.log) > 0.05


@pytest.mark.slow
def test_a_tied_head_is_sharded(tmp_path: Path) -> None:
    run = TrlRun(folder=tmp_path, options={"kd": "rkl", "kd_coef": 0.1}, teacher=True, tied=True)
    sharded = train_ranks(replace(run, fsdp=True))
    assert sharded.sharded
    assert not any("lm_head" in name for name in sharded.parameters)
    assert_same(sharded, train_ranks(run, 1))


@pytest.mark.slow
def test_shards_sample_as_with_trl(tmp_path: Path) -> None:
    run = TrlRun(folder=tmp_path, sampled=True, fsdp=True)
    assert_same(train_ranks(run), train_ranks(replace(run, kdrl=False)))


@pytest.mark.slow
def test_mixed_precision_of_shards_rounds_no_loss(tmp_path: Path) -> None:
    """FSDP2 rounds what a forward returns to bfloat16.

    The loss, minus the sum of weight · advantage where ratios are 1, does not depend on logits.
    """
    options = {"num_iterations": 2, "max_steps": 1}  # with log-probabilities of the old policy
    run = TrlRun(folder=tmp_path, options=options)
    expected = train_ranks(run, 1).log[0]
    sharded = train_ranks(replace(run, options=options | {"bf16": True}, fsdp=True)).log[0]
    assert sharded["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert sharded["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.02)
    assert sharded["grad_norm"] != expected["grad_norm"]


@pytest.mark.parametrize(
    "options",
    [
        {"kd": "rkl"},
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in (
                {"kd": "k2"},
                {"kd": "jsd", "loss_type": "sapo"},  # the term is added to TRL's loss
                {"kd": "topk_rkl", "kd_topk": 8},
                {"kd": "rkl", "gradient_accumulation_steps": 2, "loss_type": "grpo"},
            )
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_teacher_pulls_alike_on_one_process_two_and_shards(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    run = TrlRun(folder=tmp_path, options={"kd_coef": 0.1} | options, teacher=True)
    alone = train_ranks(run, 1)
    names = ("loss", "grad_norm") if "gradient_accumulation_steps" in options else ()
    assert_same(train_ranks(run), alone, names)
    sharded = train_ranks(replace(run, fsdp=True))
    assert sharded.sharded
    assert_same(sharded, alone, names)
    assert any(name.startswith("kdrl/") and value > 0.1 for name, value in alone.log[0].items())


@pytest.mark.parametrize("fsdp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_process_without_tokens(tmp_path: Path, fsdp: bool) -> None:
    options = {"kd": "rkl", "kd_coef": 0.1}
    run = TrlRun(folder=tmp_path, options=options, teacher=True, fsdp=fsdp, masked_from=4)
    assert_same(train_ranks(run), train_ranks(replace(run, fsdp=False), 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "fsdp", "teacher"),
    [
        (WITH_HEAD, True, True),
        (WITH_HEAD, False, False),
        (ATTENTION, True, False),
        (HEAD_SAVED, True, True),
        (HEAD_SAVED, False, False),
    ],
)
def test_lora_alike_on_one_process_and_two(
    tmp_path: Path, lora: dict[str, Any], fsdp: bool, teacher: bool
) -> None:
    options = {"learning_rate": 3.0} | ({"kd": "rkl", "kd_coef": 0.1} if teacher else {})
    run = TrlRun(folder=tmp_path, options=options, lora=lora, teacher=teacher)
    both = train_ranks(replace(run, fsdp=fsdp))
    assert both.sharded == fsdp
    assert_same(both, train_ranks(run, 1))
    if lora is not WITH_HEAD and not teacher:
        assert_same(both, train_ranks(replace(run, kdrl=False, fsdp=fsdp)))

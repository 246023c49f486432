"""Several ranks do what one process does, and stop together.

They sample the same tokens, whose draws do not depend on the number of ranks. They add up in
another order, hence the tolerances.
"""

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict
from transformers import AutoModelForCausalLM

from kdrl_train import train
from kdrl_train.config import EvalConfig, LogConfig, OptimConfig, SamplingConfig, TrainConfig
from kdrl_train.method import grpo
from kdrl_train.method.config import ScheduleConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.policy import Policy
from kdrl_train.ranks import ALONE
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.best import FILE, resolved
from kdrl_train.runfolder.log import read_records
from tests.train.conftest import EXACT
from tests.train.ranks import train_ranks
from tests.train.test_train import without_times

Config = Callable[..., TrainConfig]
ONE_SEQUENCE_PER_PACK = OptimConfig(learning_rate=1e-3, micro_batch_tokens=1)


def alone(config: TrainConfig) -> list[dict[str, Any]]:
    train.main(config, Console(file=io.StringIO()))
    return read_records(config.out)


def together(config: TrainConfig, ranks: int, **options: Any) -> list[dict[str, Any]]:
    said = train_ranks(config, ranks, **options)
    assert said[0].splitlines()[-1].startswith("all steps are done: "), said
    assert not any(said[1:]), said
    return read_records(config.out)


def assert_same_metrics(records: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(records) == len(expected)
    for record, other in zip(without_times(records), without_times(expected), strict=True):
        assert set(record) == set(other)
        for name, value in other.items():
            mismatch = name.startswith("sampler_mismatch")  # which is nothing but rounding
            rounding = 1e-5 if mismatch else 1e-6
            near = value if value is None else pytest.approx(value, rel=1e-4, abs=rounding)
            assert record[name] == near, (record["step"], name)


def gradient(config: TrainConfig) -> dict[str, Tensor]:
    """Read AdamW's first moments after the first step: the clipped gradient times 1 - beta_1."""
    model = AutoModelForCausalLM.from_pretrained(config.model.policy)
    policy = Policy(model, config.method)
    optimizer = torch.optim.AdamW(policy.parameters())
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    folder = config.out / "checkpoints" / "step_000001"
    checkpoint._read_into(state, checkpoint.read(folder), ALONE)
    return {name: moments["exp_avg"] for name, moments in state["optimizer"]["state"].items()}


@pytest.mark.parametrize(
    ("ranks", "tokens", "policy"),
    [  # the student has a tied head, the llama one of its own
        pytest.param(1, 64, "student", marks=pytest.mark.slow),
        pytest.param(2, 1, "student", marks=pytest.mark.slow),
        (2, 64, "llama"),
        pytest.param(3, 1000, "llama", marks=pytest.mark.slow),
    ],
)
def test_ranks_learn_what_one_process_learns(
    config: Config, ranks: int, tokens: int, policy: str
) -> None:
    optim = OptimConfig(learning_rate=1e-3, micro_batch_tokens=tokens)
    settings = {"steps": 3, "save_every": 1, "keep_checkpoints": 3, "policy": policy}
    whole, parts = config("whole", **settings), config("parts", optim=optim, **settings)
    assert_same_metrics(together(parts, ranks), alone(whole))
    theirs = gradient(whole)
    for name, ours in gradient(parts).items():
        torch.testing.assert_close(ours, theirs[name], rtol=1e-4, atol=1e-7, msg=name)
    after = dict(AutoModelForCausalLM.from_pretrained(whole.out / "model").named_parameters())
    saved = AutoModelForCausalLM.from_pretrained(parts.out / "model")
    for name, weight in saved.named_parameters():
        moved = (weight - after[name]).abs().mean()
        if not name.endswith("k_proj.bias"):  # a key's bias has no gradient but rounding
            assert moved < 1e-6, name  # of steps of 1e-3


SHAPED = replace(PRESETS["reward_shaping"], kd_coef=ScheduleConfig(initial=0.5, final=0.5))
BUDGET = ScheduleConfig(kind="kl_budget", initial=0.1, target_kl=2.0, gain=0.4, bounds=(0.05, 0.3))
VARIANTS: dict[str, dict[str, Any]] = {
    "reward shaping": {"method": SHAPED},
    "budget": {"method": replace(PRESETS["kdrl"], kd_coef=BUDGET, kd_mask="wrong")},
    "updates": {"optim": replace(ONE_SEQUENCE_PER_PACK, updates_per_rollout=2)},
    "correction": {"method": replace(EXACT, sampler_correction="mask")},
    "measured": {"log": LogConfig(diagnostics_every=1)},
    "measured after a pass that scores": {
        "log": LogConfig(diagnostics_every=1),
        "method": SHAPED,
    },
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[] if x == "updates" else pytest.mark.slow) for x in VARIANTS],
)
def test_every_method_is_the_same_on_two_ranks(config: Config, name: str) -> None:
    settings = dict(VARIANTS[name])
    if name.startswith("measured"):  # the first micro-batches of all ranks: here the whole step
        settings["optim"] = replace(ONE_SEQUENCE_PER_PACK, micro_batch_tokens=9999)
        settings["optim"] = replace(settings["optim"], schedule="cosine", warmup_steps=1)
        data, greedy = config().data, name != "measured"
        settings["eval"] = EvalConfig(
            data=data, sets={"b": data}, every=2, samples=3, max_problems=5, greedy=greedy,
            keep_best=True,
        )  # fmt: skip
    whole, parts = (config(out, **settings) for out in ("whole", "parts"))
    assert_same_metrics(together(parts, 2), alone(whole))
    if name.startswith("measured"):
        bests = [json.loads((one.out / FILE).read_text("utf-8")) for one in (whole, parts)]
        assert bests[0] == bests[1]
        assert resolved(parts.out / FILE).is_dir()


@pytest.mark.slow  # other tests here train on two ranks
def test_a_rank_without_tokens_learns_too(config: Config) -> None:
    sampling = SamplingConfig(prompts_per_step=1, group_size=2, max_new_tokens=8)
    whole, parts = (
        config(name, sampling=sampling, optim=ONE_SEQUENCE_PER_PACK) for name in ("whole", "parts")
    )
    assert_same_metrics(together(parts, 3), alone(whole))


@pytest.mark.slow
def test_bfloat16_ranks_keep_float32_weights(config: Config) -> None:
    base = config(steps=1)
    settings = replace(base, model=replace(base.model, dtype="bfloat16"))
    (row,) = together(settings, 2)
    (exact,) = alone(config("float32", steps=1))
    assert row["kl_teacher"] == pytest.approx(exact["kl_teacher"], rel=0.1)
    assert 1e-6 < row["sampler_mismatch_mean"] < 0.05
    before = AutoModelForCausalLM.from_pretrained(base.model.policy)
    old = dict(before.named_parameters())
    saved = AutoModelForCausalLM.from_pretrained(settings.out / "model")
    for name, weight in saved.named_parameters():
        assert weight.dtype == torch.float32
        assert (weight - old[name]).abs().max().item() == pytest.approx(1e-3, rel=1e-2), name


@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(config: Config) -> None:
    whole, parts = config("whole", steps=4), config("parts", steps=2)
    expected = alone(whole)
    together(parts, 2)
    records = together(replace(parts, steps=4, resume=True), 3)
    assert_same_metrics(records, expected)


@pytest.mark.slow  # other tests here train on two ranks
def test_a_checkpoint_of_one_process_is_read_by_ranks_and_theirs_by_one(config: Config) -> None:
    whole, parts = config("whole", steps=4), config("parts", steps=2)
    expected = alone(whole)
    alone(parts)
    assert_same_metrics(together(replace(parts, steps=3, resume=True), 2), expected[:3])
    assert_same_metrics(alone(replace(parts, steps=4, resume=True)), expected)


@pytest.mark.slow  # other tests here train on two ranks
def test_weights_alone_start_another_run(config: Config) -> None:
    source = config("source", steps=2)
    alone(source)
    weights = source.out / "checkpoints" / "step_000002"
    after = dict(
        AutoModelForCausalLM.from_pretrained(config("source").out / "model").named_parameters()
    )
    for name, run in (("alone", alone), ("ranks", lambda settings: together(settings, 2))):
        base = config(name, steps=1)
        settings = replace(base, model=replace(base.model, weights=weights))
        (row,) = run(settings)
        assert row["step"] == 0
        old = dict(AutoModelForCausalLM.from_pretrained(settings.out / "model").named_parameters())
        furthest = max((old[key] - after[key]).abs().max().item() for key in after)
        assert furthest == pytest.approx(1e-3, rel=1e-2)  # one step of a fresh AdamW from there


def fail_on_second_rank(rank: int) -> None:
    if rank == 1:

        def fail(*_: object, **__: object) -> None:
            raise OSError("the disk of rank 1 is gone")

        train.collect.__globals__["_draw_share"] = fail


@pytest.mark.fault("error in a step")
def test_an_error_of_one_rank_stops_all(config: Config) -> None:
    said = train_ranks(config(), 2, sabotage=fail_on_second_rank)
    for words in said:
        assert words.endswith("RankError: rank 1 stopped with OSError: the disk of rank 1 is gone")


def verify_slowly_on_second_rank(rank: int) -> None:
    if rank == 1:
        draw_share = train.collect.__globals__["_draw_share"]

        def slow(*arguments: Any) -> Any:
            time.sleep(0.5)
            return draw_share(*arguments)

        train.collect.__globals__["_draw_share"] = slow


@pytest.mark.slow
def test_waiting_for_the_slowest_rank_is_a_stage(config: Config) -> None:
    (row,) = together(config(steps=1), 2, sabotage=verify_slowly_on_second_rank)
    assert 0.3 < row["seconds_wait"] < row["seconds"]
    assert "tokens_per_s_wait" not in row


def make_loss_infinite(rank: int) -> None:
    advantages, calls = grpo.advantages, []

    def broken(*arguments: Any) -> Tensor:
        values_R = advantages(*arguments)
        calls.append(1)
        if len(calls) > 1 and rank == 0:
            values_R[rank] = float("inf")
        return values_R

    grpo.advantages = broken


@pytest.mark.fault("weights or gradient not finite")
def test_all_ranks_stop_before_a_step_that_is_not_finite(config: Config) -> None:
    settings = config(steps=3)
    said = train_ranks(settings, 2, sabotage=make_loss_infinite)
    for words in said:
        assert "FloatingPointError: loss and gradient norm must be finite" in words
        assert "at step 1: stopped before the optimiser step" in words
    assert [row["step"] for row in read_records(settings.out)] == [0]
    assert (settings.out / "failed_step_000001.pt").exists()
    assert (settings.out / "checkpoints" / "step_000001").exists()  # the weights that met it


def skip_a_push(_rank: int) -> None:
    from kdrl_train.rollouts.engines.generate import GenerateEngine  # noqa: PLC0415

    load = GenerateEngine.load

    def skip_second(self: Any, policy: Policy, version: int) -> None:
        if version != 1:
            load(self, policy, version)

    GenerateEngine.load = skip_second


def push_nothing_but_say_so(_rank: int) -> None:
    from kdrl_train.rollouts.engines.generate import GenerateEngine  # noqa: PLC0415

    def pretend(self: Any, _policy: Policy, version: int) -> None:
        self.version = version

    GenerateEngine.load = pretend


def leave_the_tied_head_stale(_rank: int) -> None:
    from kdrl_train.rollouts.engines.generate import GenerateEngine  # noqa: PLC0415

    load = GenerateEngine.load

    def stale(self: Any, policy: Policy, version: int) -> None:
        head = self.model.get_output_embeddings()
        if head.weight is self.model.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        old = head.weight
        head.weight = self.model.get_input_embeddings().weight
        load(self, policy, version)
        head.weight = old

    GenerateEngine.load = stale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        (skip_a_push, "EngineError: rollouts of step 2 must come from the weights after 1"),
        (push_nothing_but_say_so, "EngineError: the engine's log-probabilities must be within"),
        (leave_the_tied_head_stale, "EngineError: the engine's log-probabilities must be within"),
    ],
)
def test_an_engine_with_other_weights_stops_the_run(
    config: Config, sabotage: Any, message: str
) -> None:
    settings = config(steps=3)
    for words in train_ranks(settings, 2, sabotage=sabotage):
        assert message in words
    assert [row["step"] for row in read_records(settings.out)] == [0]


def test_the_largest_sampler_mismatch_can_be_set(config: Config) -> None:
    base = config(steps=1)
    settings = replace(base, engine=replace(base.engine, max_sampler_mismatch=1e-12))
    with pytest.raises(RuntimeError, match=r"within engine.max_sampler_mismatch = 1e-12 nats"):
        alone(settings)
    assert read_records(settings.out) == []
    assert not (settings.out / "checkpoints").exists()


@pytest.mark.slow  # other tests here train on two ranks
def test_an_engine_without_sabotage_agrees_and_the_folder_is_whole(config: Config) -> None:
    settings = config(steps=2, save_every=1)
    for row in together(settings, 2):
        assert row["sampler_mismatch_mean"] < 1e-5
    names = sorted(path.name for path in (settings.out / "checkpoints").iterdir())
    assert names == ["LATEST", "step_000001", "step_000002"]
    assert (settings.out / "checkpoints" / "LATEST").read_text() == "step_000002\n"
    assert Path(settings.out / "samples" / "step_000001.jsonl").exists()

"""Checkpoints are bit-equal, complete or absent, and only for the run that wrote them."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrl_train.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.config_file import to_dict
from kdrl_train.method.config import MethodConfig, ScheduleConfig
from kdrl_train.model.policy import Policy
from kdrl_train.runfolder import checkpoint, durable
from kdrl_train.runfolder.checkpoint import RunState
from kdrl_train.runfolder.export import export
from kdrl_train.runfolder.resume import check_config, check_data

CONFIG = TrainConfig(keep_checkpoints=2)


def state(policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> RunState:
    return RunState(step=step, model=policy, optimizer=optimizer, config=CONFIG)


def make(tiny: Callable[..., Any], seed: int) -> tuple[Policy, torch.optim.Optimizer]:
    policy = Policy(tiny("qwen2", seed=seed, tie_word_embeddings=True), MethodConfig(kd=None))
    return policy, torch.optim.AdamW(policy.parameters(), lr=0.1)


def train(policy: Policy, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        ids = torch.randint(258, (1, 9))  # from the global random state, which is saved too
        policy.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def states(policy: Policy, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    moments = [v for s in optimizer.state.values() for v in s.values()]
    return [p.detach().clone() for p in policy.parameters()] + [m.clone() for m in moments]


def test_loading_continues_bit_equal(tiny: Callable[..., Any], tmp_path: Path) -> None:
    policy, optimizer = make(tiny, seed=0)
    train(policy, optimizer, steps=2)
    checkpoint.save(tmp_path, state(policy, optimizer, step=2))
    train(policy, optimizer, steps=3)

    other, other_optimizer = make(tiny, seed=9)
    torch.manual_seed(1234)
    newest = checkpoint.latest(tmp_path)
    step = checkpoint.load(newest, model=other, optimizer=other_optimizer)
    assert step == 2
    assert other.model.lm_head.weight is other.model.model.embed_tokens.weight
    train(other, other_optimizer, steps=3)
    for a, b in zip(states(policy, optimizer), states(other, other_optimizer), strict=True):
        assert torch.equal(a, b)


def test_every_so_many_are_kept_for_good(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    policy, optimizer = make(tiny, seed=0)
    train(policy, optimizer, steps=1)
    for step in range(2, 15, 2):
        kept = replace(CONFIG, keep_checkpoints=1, keep_every=6)
        checkpoint.save(tmp_path, replace(state(policy, optimizer, step), config=kept))
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step_000006",
        "step_000012",
        "step_000014",
    ]


def test_the_newest_ones_are_kept(tiny: Callable[..., Any], tmp_path: Path) -> None:
    policy, optimizer = make(tiny, seed=0)
    train(policy, optimizer, steps=1)
    assert checkpoint.latest(tmp_path) is None
    for step in (5, 10, 999_999, 1_000_000):
        checkpoint.save(tmp_path, state(policy, optimizer, step))
    names = ["LATEST", "step_1000000", "step_999999"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert checkpoint.latest(tmp_path).step == 1_000_000
    (tmp_path / "step_1000000").rename(tmp_path / "step_1000001")  # it would stay the newest
    with pytest.raises(
        ValueError, match=r"step in its name, got that of .* rename it to step_1000000"
    ):
        checkpoint.latest(tmp_path)


def test_a_killed_save_leaves_the_previous_checkpoint(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, optimizer = make(tiny, seed=0)
    train(policy, optimizer, steps=1)
    checkpoint.save(tmp_path, state(policy, optimizer, step=1))

    class Killed(BaseException):
        pass

    rename = Path.rename

    def kill(self: Path, target: Path) -> Path:
        if self.parent == tmp_path:
            raise Killed
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)  # everything is written, but not yet in place
        with pytest.raises(Killed):
            checkpoint.save(tmp_path, state(policy, optimizer, step=2))
    assert checkpoint.latest(tmp_path).step == 1
    checkpoint.save(tmp_path, state(policy, optimizer, step=2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["LATEST", "step_000001", "step_000002"]
    assert (tmp_path / "LATEST").read_text() == "step_000002\n"


def test_saving_a_step_again_replaces_it(tiny: Callable[..., Any], tmp_path: Path) -> None:
    policy, optimizer = make(tiny, seed=0)
    train(policy, optimizer, steps=1)
    for _ in range(2):
        checkpoint.save(tmp_path, state(policy, optimizer, step=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["LATEST", "step_000001"]


def test_a_checkpoint_of_another_run_is_refused() -> None:
    place, written = Path("runs/a"), to_dict(CONFIG)
    changed = replace(
        CONFIG, seed=3, optim=OptimConfig(learning_rate=1.0), model=ModelConfig(teacher="t")
    )
    with pytest.raises(ValueError, match=r"keep the settings of runs.a") as error:
        check_config(place, written, changed)
    assert str(error.value).splitlines()[1:-1] == [
        "  seed: 0 before, 3 now",
        "  model.teacher: None before, t now",
        "  optim.learning_rate: 1e-06 before, 1.0 now",
    ]


def test_what_may_change_may_change() -> None:
    place, written = Path("runs/a"), to_dict(CONFIG)
    changed = replace(
        CONFIG,
        out=Path("elsewhere"),
        resume=True,
        steps=999,
        save_every=1,
        optim=OptimConfig(micro_batch_tokens=17),
        sampling=SamplingConfig(batch_size=3),
        eval=EvalConfig(every=3, data=DataConfig(path="held_out.jsonl")),
    )
    check_config(place, written, changed)
    other = replace(changed, sampling=SamplingConfig(group_size=3))
    with pytest.raises(ValueError, match=r"  sampling\.group_size: 8 before, 3 now"):
        check_config(place, written, other)


def test_a_run_without_a_threshold_of_right_resumes_where_it_means_the_same() -> None:
    place, written = Path("runs/a"), to_dict(CONFIG)
    del written["reward"]["right_above"]
    check_config(place, written, CONFIG)  # math pays 0 or 1
    shaped = replace(CONFIG, reward=RewardConfig(function="my:reward"))
    written["reward"]["function"] = "my:reward"
    with pytest.raises(ValueError, match=r"  reward\.right_above: 0\.0 before, 0\.5 now"):
        check_config(place, written, shaped)
    check_config(place, written, replace(shaped, reward=replace(shaped.reward, right_above=0.0)))


def saved_with(data: dict[str, dict[str, Any]]) -> checkpoint.Checkpoint:
    return checkpoint.Checkpoint(Path("runs/a/step_000002"), 2, to_dict(CONFIG), {}, data)


def test_other_problems_are_refused() -> None:
    then, more = {"count": 8, "sha256": "aa"}, {"count": 9, "sha256": "bb"}
    before = saved_with({"data": then, "eval.data": then})
    assert check_data(before, {"data": then, "eval.data": then}, CONFIG) == []
    expected = (
        r"data\.path must hold the problems that it held at runs.a.step_000002, in .* got 9 in"
    )
    with pytest.raises(
        ValueError, match=expected + r" place of 8: restore .* --model\.weights runs"
    ):
        check_data(before, {"data": more}, CONFIG)
    with pytest.raises(ValueError, match=r"got 8, not all of them the same or in the same place: "):
        check_data(before, {"data": {"count": 8, "sha256": "cc"}}, CONFIG)


def test_other_held_out_problems_are_named_and_refused_where_a_schedule_waits() -> None:
    then, more = {"count": 8, "sha256": "aa"}, {"count": 9, "sha256": "bb"}
    before = saved_with({"data": then, "eval.data": then})
    (warning,) = check_data(before, {"data": then, "eval.data": more}, CONFIG)
    assert warning.startswith("eval.data.path must hold the problems that it held at")
    assert warning.endswith("got 9 in place of 8: scores before and after do not compare")
    assert check_data(before, {"data": then}, CONFIG) == []  # no evaluation any more
    assert check_data(saved_with({"data": then}), {"data": then, "eval.data": more}, CONFIG) == []
    sets = {"data": then, "eval.data": then, "eval.sets.b": more}
    switch = ScheduleConfig(kind="switch", patience=2)
    waits = replace(
        CONFIG,
        method=MethodConfig(kd="rkl", kd_coef=switch),
        eval=EvalConfig(every=1, data=DataConfig(path="held.jsonl")),
    )
    (warning,) = check_data(saved_with(sets | {"eval.sets.b": then}), sets, waits)
    assert warning.startswith("eval.sets.b.path must hold the problems that it held at")
    with pytest.raises(ValueError, match=r"eval\.data\.path must hold .*: restore them, or start"):
        check_data(before, {"data": then, "eval.data": more}, waits)


def test_a_checkpoint_that_names_no_problems_warns() -> None:
    (warning,) = check_data(saved_with({}), {"data": {"count": 8, "sha256": "aa"}}, CONFIG)
    assert "does not say which problems the run had" in warning


def test_the_log_is_on_the_disk_before_the_checkpoint_has_its_name(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a power cut would leave a checkpoint without the records of its last steps."""
    (tmp_path / "metrics.jsonl").touch()
    number, synced, fsync = (tmp_path / "metrics.jsonl").stat().st_ino, [], os.fsync

    def note(handle: int) -> None:
        fsync(handle)
        if os.fstat(handle).st_ino == number:
            synced.append(checkpoint.latest(tmp_path / "checkpoints"))

    monkeypatch.setattr(os, "fsync", note)
    policy, optimizer = make(tiny, seed=0)
    train(policy, optimizer, steps=1)
    checkpoint.save(tmp_path / "checkpoints", state(policy, optimizer, 1))
    assert synced == [None]


def test_windows_flushes_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "os", SimpleNamespace(name="nt"))  # it has no fsync
    durable.sync(tmp_path)


@pytest.mark.parametrize("name", ["student", "llama"])
def test_the_exported_folder_loads(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path, name: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[name])
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    for _ in range(2):  # the second one replaces the first
        export(model, tokenizer, tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert loaded.encode("1+2=3") == tokenizer.encode("1+2=3")
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_evaluation_that_a_schedule_waits_for_may_not_change() -> None:
    waits = ScheduleConfig(kind="switch", patience=2)
    evaluation = EvalConfig(every=3, data=DataConfig(path="held_out.jsonl"))
    config = replace(CONFIG, method=MethodConfig(kd_coef=waits), eval=evaluation)
    other = replace(config, eval=replace(evaluation, every=5))
    with pytest.raises(ValueError, match=r"  eval\.every: 3 before, 5 now"):
        check_config(Path("runs/a"), to_dict(config), other)
    check_config(Path("runs/a"), to_dict(config), replace(config, save_every=1))

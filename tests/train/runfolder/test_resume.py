"""A resume refuses a damaged folder before it changes anything in it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdrl_train import train
from kdrl_train.config import DataConfig, EvalConfig, ModelConfig, TeacherConfig, TrainConfig
from kdrl_train.config_file import load_yaml, save_yaml, to_dict
from kdrl_train.runfolder import jsonl
from kdrl_train.runfolder.checkpoint import Checkpoint
from kdrl_train.runfolder.log import RunLog
from kdrl_train.runfolder.resume import (
    changed_evaluation,
    changed_rate,
    check_log,
    open_folder,
    resumes,
)
from tests.train.test_train import run, without_times


def stopped_run(folder: Path, steps: int, **fields: Any) -> TrainConfig:
    """Write the folder of a run that was killed in step 4, with a checkpoint after some steps."""
    settings = TrainConfig(out=folder, resume=True, **fields)
    checkpoint = folder / "checkpoints" / f"step_{steps:06d}"
    checkpoint.mkdir(parents=True)
    save_yaml(settings, folder / "config.yaml")
    meta = {"step": steps, "config": to_dict(settings), "files": {}}
    (checkpoint / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    jsonl.write(folder / "metrics.jsonl", [{"step": step} for step in range(4)])
    jsonl.write(folder / "events.jsonl", [{"step": 0, "event": "started"}])
    return settings


@pytest.mark.fault("flipped or cut file")
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metrics.jsonl", '{"step": 0}\n{"step": 2}\n', "line 2 of .* got that of step 2"),
        (
            "metrics.jsonl",
            '{"step": 0}\n',
            r"all steps up to 1, got those of 0 to 0: .*step_000002",
        ),
        ("metrics.jsonl", '{"step": 3}\n', "all steps up to 1, got those of 3 to 3"),
        ("metrics.jsonl", '{"step": 0}\n{"step":\n', "line 2 of .* got Expecting value"),
        ("events.jsonl", "{}\n\0{}\n", "line 2 of .*events.jsonl must be .* NUL bytes"),
        ("postponed.jsonl", "null\n", "line 1 of .*postponed.jsonl must be .* NoneType"),
    ],
)
def test_a_damaged_log_is_refused_and_stays_as_it_is(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    settings = stopped_run(tmp_path, 2)
    (tmp_path / name).write_text(text, encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        open_folder(settings)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("steps", "postponed"),
    [([0, 1, 2, 3], []), ([0, 1], []), ([0], [1]), ([], []), ([], [1]), ([2, 3], []), ([1, 2], [])],
)
def test_what_a_stopped_run_leaves_is_taken(
    tmp_path: Path, steps: list[int], postponed: list[int]
) -> None:
    """Also where metrics.jsonl was moved away before."""
    for name, numbers in (("metrics", steps), ("postponed", postponed)):
        jsonl.write(tmp_path / f"{name}.jsonl", [{"step": step} for step in numbers])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step"')
    check_log(tmp_path, 2)
    RunLog(tmp_path, 2, 10)
    kept = [{"step": step} for step in steps if step < 2]
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == "".join(json.dumps(record) + "\n" for record in kept)


@pytest.mark.fault("flipped or cut file")
@pytest.mark.slow
def test_a_flipped_bit_deletes_no_good_rows(config: Callable[..., TrainConfig]) -> None:
    """The run is resumed, refused, and equals an uninterrupted one once the bit is right again."""
    settings = config(steps=2, save_every=1)
    run(settings)
    path = settings.out / "metrics.jsonl"
    text = path.read_bytes()
    path.write_bytes(text[:1] + b"#" + text[2:])  # " is 0x22, # is 0x23
    before = {file: file.read_bytes() for file in settings.out.rglob("*") if file.is_file()}
    more = replace(settings, steps=3, resume=True)
    with pytest.raises(ValueError, match=r"line 1 of .*metrics\.jsonl must be a record"):
        run(more)
    assert before == {f: f.read_bytes() for f in settings.out.rglob("*") if f.is_file()}
    path.write_bytes(text)
    assert [record["step"] for record in run(more)] == [0, 1, 2]
    assert path.read_bytes().startswith(text)


@pytest.mark.fault("restart")
@pytest.mark.slow
def test_the_same_command_starts_resumes_and_starts_over(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first checkpoint, after it, and when it is done, the run goes on."""
    optim = replace(config().optim, schedule="cosine")
    expected = without_times(run(config("whole", steps=3, optim=optim)))
    settings = config("parts", steps=3, save_every=2, resume="auto", optim=optim)
    finish, ends = train.finish, [1, 2]

    def killed(running: train.Run, step: int, *more: Any) -> None:
        finish(running, step, *more)
        if ends and step == ends[0]:
            ends.pop(0)
            raise SystemExit  # saves nothing, as a kill

    monkeypatch.setattr(train, "finish", killed)
    for _ in range(2):
        with pytest.raises(SystemExit):
            run(settings)
    for _ in range(2):
        assert without_times(run(settings)) == expected
    events = jsonl.read(settings.out / "events.jsonl")
    starts = [(e["event"], e["step"], e["dropped"]) for e in events if "dropped" in e]
    assert starts == [("started", 0, 0), ("resumed", 0, 2), ("resumed", 2, 1), ("resumed", 3, 0)]
    second = next(e["message"] for e in events if e["event"] == "resumed")
    assert "steps since the last checkpoint that are lost: 2" in second
    with pytest.raises(ValueError, match="must keep the settings of"):
        run(replace(settings, seed=1))


def test_auto_resumes_where_there_is_a_run(tmp_path: Path) -> None:
    settings = TrainConfig(out=tmp_path / "run", resume="auto")
    assert not resumes(settings)
    settings.out.mkdir()
    (settings.out / "metrics.jsonl").touch()
    assert not resumes(settings)  # of what run? train refuses the folder
    (settings.out / "checkpoints" / "step_000001").mkdir(parents=True)
    assert resumes(settings)
    assert not resumes(replace(settings, resume=False))


def test_the_learning_rate_changes_on_demand_alone(tmp_path: Path) -> None:
    settings = stopped_run(tmp_path, 4)
    optim = replace(settings.optim, learning_rate=2e-6, schedule="linear")
    other = replace(settings, optim=optim, steps=10)
    refusal = (
        r"(?s)optim\.learning_rate: 1e-06 before, 2e-06 now.*set them back, or pass "
        r"--allow-changes optim\.learning_rate optim\.schedule, or start a new run"
    )
    with pytest.raises(ValueError, match=refusal):
        open_folder(other)
    with pytest.raises(ValueError, match=r"pass --allow-changes optim\.schedule, or start"):
        open_folder(replace(other, allow_changes=("optim.learning_rate",)))
    allowed = replace(other, allow_changes=("optim.learning_rate", "optim.schedule"))
    newest = open_folder(allowed)
    assert newest is not None
    assert changed_rate(newest, settings) is None
    assert changed_rate(newest, replace(settings, steps=900)) is None
    assert changed_rate(newest, allowed) == (
        "learning rate changed from 1e-06 to 1.2e-06 at step 5: optim.learning_rate 1e-06 -> 2e-06,"
        " optim.schedule constant -> linear, steps 280 -> 10"
    )
    with pytest.raises(ValueError, match=r"set them back, or start a new run") as caught:
        open_folder(replace(allowed, seed=1))
    assert "optim" not in str(caught.value)


def test_a_resumed_run_says_that_scores_do_not_compare(tmp_path: Path) -> None:
    evaluation = EvalConfig(data=DataConfig(path="a.jsonl"), every=2)
    settings = TrainConfig(out=tmp_path, eval=evaluation)
    older = {k: v for k, v in to_dict(evaluation).items() if k not in ("greedy", "keep_best")}
    newest = Checkpoint(tmp_path, 2, {"eval": older}, {}, {})
    for same in ({}, {"every": 3}, {"keep_best": True}, {"temperature": 1.0}):
        assert (
            changed_evaluation(newest, replace(settings, eval=replace(evaluation, **same))) is None
        )
    other = replace(settings, eval=replace(evaluation, samples=8, greedy=True))
    assert changed_evaluation(newest, other) == (
        "scores before and after do not compare: eval.samples 4 -> 8, eval.greedy False -> True"
    )
    for off in ({}, {"eval": older | {"every": 0}}):
        assert changed_evaluation(Checkpoint(tmp_path, 2, off, {}, {}), other) is None


def test_more_steps_raise_a_rate_that_decays(config: Callable[..., TrainConfig]) -> None:
    """The schedule is a function of step and steps, so the log says what a longer run changes."""
    optim = replace(config().optim, schedule="linear", final_learning_rate=1e-4)
    settings = config(steps=2, save_every=1, optim=optim)
    assert [record["learning_rate"] for record in run(settings)] == pytest.approx([1e-3, 5.5e-4])
    more = replace(settings, steps=4, resume=True)
    higher = replace(optim, learning_rate=2e-3, schedule="constant", final_learning_rate=0.0)
    keys = ("optim.learning_rate", "optim.schedule", "optim.final_learning_rate")
    rates = [record["learning_rate"] for record in run(replace(more, steps=3))]
    assert rates == pytest.approx([1e-3, 5.5e-4, 4e-4])
    rates = [r["learning_rate"] for r in run(replace(more, optim=higher, allow_changes=keys))]
    assert rates == pytest.approx([1e-3, 5.5e-4, 4e-4, 2e-3])
    events = jsonl.read(settings.out / "events.jsonl")
    assert [(e["step"], e["message"]) for e in events if e["event"] == "settings"] == [
        (2, "learning rate changed from 0.0001 to 0.0004 at step 3: steps 2 -> 3"),
        (
            3,
            "learning rate changed from 0.0001 to 0.002 at step 4: optim.learning_rate 0.001 -> "
            "0.002, optim.schedule linear -> constant, optim.final_learning_rate 0.0001 -> 0.0, "
            "steps 3 -> 4",
        ),
    ]
    assert load_yaml(settings.out / "config.yaml")["allow_changes"] == []


def test_what_the_folder_describes_may_have_another_name(tmp_path: Path) -> None:
    """A policy with its checkpoint alone, which has its weights."""
    model = ModelConfig(policy="a", teacher="http://host:1", teacher_api="openai")
    settings = stopped_run(tmp_path, 4, model=model, teacher=TeacherConfig(name="a"))
    policy = replace(settings, model=replace(model, policy="b"))
    teacher = replace(settings, teacher=TeacherConfig(name="b"))
    changes = {"policy.json": (policy, r"model\.policy: a"), "teacher.json": (teacher, "name: a")}
    for file, (changed, message) in changes.items():
        with pytest.raises(ValueError, match=f"{message} before, b now"):
            open_folder(changed)
        (tmp_path / file).write_text("{}", encoding="utf-8")
        assert open_folder(changed) is not None
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"model\.policy: a before, b now"):
        open_folder(policy)


def test_a_setting_that_came_after_a_run_began_has_its_default_there(tmp_path: Path) -> None:
    settings = stopped_run(tmp_path, 4)
    path = tmp_path / "checkpoints" / "step_000004" / "meta.json"
    meta = json.loads(path.read_text(encoding="utf-8"))
    del meta["config"]["model"]["head_backward"], meta["config"]["keep_every"]
    path.write_text(json.dumps(meta), encoding="utf-8")
    assert open_folder(settings) is not None
    other = replace(settings, model=replace(settings.model, head_backward="sketch"))
    with pytest.raises(ValueError, match=r"model\.head_backward: exact before, sketch now"):
        open_folder(other)

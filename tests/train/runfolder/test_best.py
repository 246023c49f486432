"""best: the best checkpoint stays, best.json names it, and a resumed run goes on with both."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdrl_train import train
from kdrl_train.config import DataConfig, EvalConfig, SamplingConfig, TrainConfig
from kdrl_train.model.policy import HeadedModel
from kdrl_train.runfolder import best, checkpoint, jsonl
from kdrl_train.runfolder.best import METRIC, Best, BestSoFar, comparable, measures, resolved
from tests.train.test_train import run

MEASURED: dict[str, Any] = {"samples": 4}


def score(step: int, value: float | None) -> dict[str, Any]:
    return {"step": step} | ({} if value is None else {METRIC: value})


def saved(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / "checkpoints" / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)


def test_the_first_of_equal_scores_is_the_best(tmp_path: Path) -> None:
    so_far = BestSoFar(tmp_path, 0, MEASURED, SamplingConfig())
    scores = [None, 0.0, 0.25, 0.25, None, 0.5, 0.125]
    assert [so_far.add(score(step, value)) for step, value in enumerate(scores)] == [
        False, True, True, False, False, True, False,
    ]  # fmt: skip
    assert (so_far.now, so_far.previous) == (Best(6, 0.5), Best(3, 0.25))
    assert so_far.is_after(6)
    assert not so_far.is_after(7)


@pytest.mark.parametrize(
    ("steps", "first", "now"),
    [
        ((3, 6), 6, Best(6, 0.5)),
        ((3, 6), 9, Best(6, 0.5)),
        ((3,), 3, Best(3, 0.25)),  # killed before the checkpoint had its name
        ((3, 6), 5, Best(3, 0.25)),  # step 6 is measured again
        ((), 3, None),
    ],
)
def test_a_resumed_run_goes_on_with_the_best_that_is_there(
    tmp_path: Path, steps: tuple[int, ...], first: int, now: Best | None
) -> None:
    so_far = BestSoFar(tmp_path, 0, MEASURED, SamplingConfig())
    so_far.add(score(2, 0.25))
    so_far.add(score(5, 0.5))
    so_far.write()
    saved(tmp_path, *steps)
    again = BestSoFar(tmp_path, first, MEASURED, SamplingConfig())
    assert (again.now, again.changed) == (now, False)
    other = BestSoFar(tmp_path, first, {"samples": 5}, SamplingConfig())
    assert (other.now, other.changed) == (None, True)


def test_what_makes_scores_comparable(tmp_path: Path) -> None:
    config = TrainConfig(eval=EvalConfig(data=DataConfig(path="a.jsonl"), every=2))
    problems, training = {"count": 3, "sha256": "aa"}, SamplingConfig(temperature=0.7)

    def of(now: dict[str, Any], **changes: Any) -> dict[str, Any]:
        evaluation = replace(config.eval, **changes)
        return comparable(measures(replace(config, eval=evaluation), now), training)

    same, data = of(problems), config.eval.data
    moved = replace(data, path="b.parquet", prompt_column="problem", prompt_template="{prompt}!")
    shorter = replace(data, max_prompt_tokens=9, teacher_column="t", max_teacher_prompt_tokens=9)
    alike: list[dict[str, Any]] = [{"data": moved}, {"data": shorter}, {"every": 9}]
    alike += [{"keep_best": True}, {"sets": {"b": DataConfig(path="b.jsonl")}}]
    alike += [{"temperature": 0.7}, {"max_new_tokens": training.max_new_tokens}]
    for change in alike:
        assert of(problems, **change) == same, change
    others: list[dict[str, Any]] = [{"samples": 9}, {"greedy": True}, {"temperature": 1.0}]
    others += [{"data": replace(data, system_prompt="Brief.")}, {"max_new_tokens": 9}]
    for change in others:
        assert of(problems, **change) != same, change
    assert of(problems | {"sha256": "bb"}) != same
    assert of(problems, greedy=True, samples=9) == of(problems, greedy=True)
    # a best.json of an older version
    older = measures(config, problems) | {"data": {"max_prompt_tokens": 5, "system_prompt": None}}
    so_far = BestSoFar(tmp_path, 0, older, training)
    so_far.add(score(2, 0.25))
    so_far.write()
    for measured, changed in ((same, False), (of(problems, samples=9), True)):
        assert BestSoFar(tmp_path, 3, measured, training).changed == changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (None, "{"),
        (None, "[]"),
        ("checkpoint", "../../etc"),
        ("checkpoint", 3),
        ("best", None),
        ("best", {"step": "1", "score": 0.5}),
        ("best", {"step": 1}),
        ("previous", {"step": 1, "score": "much"}),
        ("measured", None),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, key: str | None, value: Any) -> None:
    so_far = BestSoFar(tmp_path, 0, MEASURED, SamplingConfig())
    so_far.add(score(2, 0.25))
    so_far.write()
    content = json.loads(so_far.path.read_text(encoding="utf-8"))
    text = value if key is None else json.dumps(content | {key: value})
    so_far.path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"best\.json must be as a run wrote it, got "):
        BestSoFar(tmp_path, 9, MEASURED, SamplingConfig())
    with pytest.raises(ValueError, match=r"best\.json must be as a run wrote it, got "):
        resolved(so_far.path)


def test_weights_are_named_by_a_checkpoint_or_by_the_best(tmp_path: Path) -> None:
    so_far = BestSoFar(tmp_path, 0, MEASURED, SamplingConfig())
    so_far.add(score(2, 0.25))
    so_far.write()
    with pytest.raises(ValueError, match=r"must name a checkpoint that is there, got .*best\.json"):
        resolved(tmp_path / "best.json")
    saved(tmp_path, 3)
    folder = tmp_path / "checkpoints" / "step_000003"
    assert resolved(tmp_path / "best.json") == resolved(folder) == folder


@pytest.mark.slow
def test_a_run_that_is_done_has_no_best_where_none_was_looked_for(
    config: Callable[..., TrainConfig],
) -> None:
    """It ended with an AssertionError."""
    settings = config(steps=1)
    run(settings)
    keeps = EvalConfig(data=settings.data, every=1, max_problems=1, keep_best=True)
    run(replace(settings, resume=True, eval=keeps))
    last = jsonl.read(settings.out / "events.jsonl")[-1]["message"]
    assert last.endswith("; no step of it was measured, so none is the best")
    assert not (settings.out / "model_best").exists()


def test_the_best_checkpoint_of_a_run_stays(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that is killed while it names the checkpoint, and resumed."""
    scores = iter([0.25, 0.5, 0.5, 0.125, 0.25, 0.75])

    def evaluation(_: train.Run) -> dict[str, float]:
        value = next(scores)
        ends = {f"{METRIC}{end}": value for end in ("", "_low", "_high")}
        return ends | {"eval_length": 1.0, "eval_truncated": 0.0}

    monkeypatch.setattr(train, "evaluation", evaluation)
    keeps = EvalConfig(data=config().data, every=1, max_problems=1, keep_best=True)
    settings = config(steps=5, save_every=9, keep_checkpoints=1, eval=keeps)
    run(settings)
    ends = [event["message"] for event in jsonl.read(settings.out / "events.jsonl")]
    assert ends[-1].endswith(f"of step 2, the best, the model is in {settings.out / 'model_best'}")
    policy = HeadedModel(AutoModelForCausalLM.from_pretrained(settings.out / "model_best"))
    exported = {name: weight.clone() for name, weight in policy.named_parameters()}
    checkpoint.load_weights(settings.out / "best.json", policy)
    last = AutoModelForCausalLM.from_pretrained(settings.out / "model")
    changed = dict(HeadedModel(last).named_parameters())
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, exported[name])
        assert not torch.equal(weight, changed[name])
    names = [path.name for path in checkpoint.checkpoints(settings.out / "checkpoints")]
    assert names == ["step_000002", "step_000005"]
    content = json.loads((settings.out / best.FILE).read_text(encoding="utf-8"))
    assert content["checkpoint"] == "checkpoints/step_000002"
    assert (content["best"], content["metric"]) == ({"step": 2, "score": 0.5}, METRIC)
    sync = checkpoint.sync

    def killed(*paths: Path) -> None:
        if paths[0].name == ".tmp_step_000006":
            raise SystemExit
        sync(*paths)

    more = replace(settings, steps=6, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sync", killed)
        with pytest.raises(SystemExit):
            run(more)
    assert BestSoFar(settings.out, 5, content["measured"], SamplingConfig()).now == Best(2, 0.5)
    scores = iter([0.75])
    run(more)
    assert resolved(settings.out / best.FILE).name == "step_000006"
    names = [path.name for path in checkpoint.checkpoints(settings.out / "checkpoints")]
    assert names == ["step_000006"]
    events = jsonl.read(settings.out / "events.jsonl")
    assert [event["step"] for event in events if event["event"] == "best"] == [1, 2, 6, 6]
    weights = replace(config("next", steps=1).model, weights=settings.out / best.FILE)
    run(config("next", steps=1, model=weights))

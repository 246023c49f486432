"""`check` finds each mistake before the first step, and its message says what to do."""

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdrl_train import cli
from kdrl_train.batch import Example, Verdicts
from kdrl_train.config import (
    OptimConfig,
    RewardConfig,
    SamplingConfig,
    TrainConfig,
)
from kdrl_train.errors import RankError
from kdrl_train.model.attention import Choice
from kdrl_train.model.policy import Teacher
from kdrl_train.ranks import ALONE, World
from kdrl_train.rollouts.problems import ProblemSet
from kdrl_train.rollouts.verifier import Verifier
from kdrl_train.runfolder import checkpoint
from kdrl_train.runfolder.checkpoint import Checkpoint
from kdrl_train.start import gold_answers, models, preflight
from kdrl_train.start.load import Loaded, load
from kdrl_train.start.open_run import pack_for
from tests.train.start.loaded import with_teacher


def options(settings: TrainConfig, **changes: str) -> list[str]:
    values = {
        "model.policy": settings.model.policy,
        "model.teacher": str(settings.model.teacher),
        "data.path": settings.data.path,
        "model.device": "cpu",
        "reward.workers": "1",
        "sampling.max-new-tokens": "32",
    } | changes
    return ["check", *(part for key, value in values.items() for part in (f"--{key}", value))]


def test_a_sound_run_passes(settings: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = {"method.kd": "rkl+fkl", "method.fkl-share": "0.3"}
    assert cli.main(options(settings, **mixture)) == 0
    out = capsys.readouterr().out
    assert "failed" not in out
    for text in ("the same 258 tokens", "20 right", "tied head", "untied head", "nats per prompt"):
        assert text in " ".join(out.split()), text


def test_a_wrong_run_exits_with_1(
    settings: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options(settings, **{"sampling.max-new-tokens": "300"})) == 1
    assert "failed" in capsys.readouterr().out
    assert cli.main(options(settings, **{"data.answer-column": "solution"})) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "data.answer_column must be a column" in out


def test_weights_to_start_from_must_be_a_checkpoint(
    settings: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(options(settings, **{"model.weights": str(tmp_path)})) == 1
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "first weights failed" in out
    assert "name one of a run's checkpoints/step_*" in out
    saved = Checkpoint(tmp_path, 7, {}, {}, {}, {})
    monkeypatch.setattr(checkpoint, "read", lambda _: saved)
    model = replace(settings.model, weights=tmp_path)
    assert preflight.check_start(model) == f"{tmp_path}, after 7 steps"
    saved.config["model"] = {"lora": {"rank": 2}}
    with pytest.raises(ValueError, match="must have the adapters of this run, rank 0, got"):
        preflight.check_start(model)


def test_a_token_without_a_column_is_refused(loaded: Loaded, tiny: Callable[..., Any]) -> None:
    small = with_teacher(loaded, model=Teacher(tiny("llama", vocab_size=250)))
    with pytest.raises(ValueError, match=r"model\.teacher must have a column .* got 250 columns"):
        models.check_vocabulary(small)
    padded = with_teacher(loaded, model=Teacher(tiny("llama", vocab_size=320)))
    detail = models.check_vocabulary(padded)
    assert (
        detail == "258 tokens; columns: policy 258, teacher 320; those from 258 on are not sampled"
    )


def test_gold_answers_must_be_right(settings: TrainConfig) -> None:
    examples = [Example(f"set:{i}", "", answer) for i, answer in enumerate(("1", "1/2", ""))]
    with Verifier(settings.reward) as verifier:
        detail = gold_answers.check_gold(settings, examples[:2], verifier)
        assert detail == "2 right; right: a reward above 0.5 (reward.right_above)"
        with pytest.raises(ValueError, match=r"2 right, 1 \w+; first: set:2, answer '', \w+"):
            gold_answers.check_gold(settings, examples, verifier)


def test_every_gold_answer_is_judged_and_a_bad_row_named_shortly(settings: TrainConfig) -> None:
    golds = [*(str(i) for i in range(80)), "1, 2, ..., n", "7 or more", "Since x > 1, we see " * 99]
    examples = [Example(f"set:{i}", "", gold) for i, gold in enumerate(golds, start=1)]
    with (
        Verifier(settings.reward) as verifier,
        pytest.raises(ValueError, match=r"80 right, 3 error; first: set:81, ") as error,
    ):
        gold_answers.check_gold(settings, examples, verifier)
    assert str(error.value).endswith("; also set:82, set:83")
    with Verifier(settings.reward) as verifier, pytest.raises(ValueError, match="set:83") as error:
        gold_answers.check_gold(settings, examples[-1:], verifier)
    assert len(str(error.value)) < 700
    with Verifier(settings.reward) as verifier:
        detail = gold_answers.check_gold(settings, examples[:80] * 5, verifier)
    assert detail.startswith("400 right; ")  # the equal ones are judged once


def test_held_out_gold_answers_are_judged(loaded: Loaded, settings: TrainConfig) -> None:
    with Verifier(settings.reward) as verifier:
        problem = Example("held:7", loaded.examples[0].prompt, "5 or more")
        held_out = ProblemSet("eval.sets.a", settings.data, [problem], loaded.prompts)
        held = replace(loaded, held_out=[held_out])
        results = preflight.preflight(settings, held, verifier)
    (failed,) = [result for result in results if not result.passed]
    assert "20 right, 1 error; first: held:7, answer '5 or more'" in failed.detail


def test_a_custom_reward_is_run_but_not_judged(
    settings: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Scripted:
        """Replies what a verifier with the user's own function may reply."""

        def __init__(self, outcome: Any, *rewards: float) -> None:
            self.outcome, self.rewards = outcome, list(rewards)

        inputs = frozenset({"completion", "answer"})

        def score(self, completions: list[str], _golds: list[str], more: object) -> Verdicts:
            assert more == [{}] * len(completions)
            errors = {0: "KeyError: 'x'"} if self.outcome == "error" else {}
            return Verdicts(self.rewards, [self.outcome] * len(completions), errors)

    custom = replace(settings, reward=RewardConfig(function="custom:reward"))
    examples, other = [Example("set:0", "", "1")], Example("set:1", "", "2")
    rule = (
        "right: as the function says, else a reward above 0.5 (reward.right_above); rewards from "
    )
    assert (
        gold_answers.check_gold(custom, examples, Scripted("wrong", 0.0))
        == f"1 wrong; {rule}0 to 0"
    )
    verdict = gold_answers.check_gold(custom, examples, Scripted("right", 0.1))
    assert verdict == f"1 right; {rule}0.1 to 0.1"
    with pytest.raises(
        UserWarning, match=r"^no gold answer in a box is right; .* to 0\.5: set rewa"
    ):
        gold_answers.check_gold(custom, examples, Scripted("wrong", 0.5))
    with pytest.raises(ValueError, match=r"^custom:reward must .* 'x': correct the f"):
        gold_answers.check_gold(custom, examples, Scripted("error", math.nan))
    with pytest.raises(UserWarning, match=r"from 2 to 10: set reward\.right_above .*, e\.g\. 5,"):
        gold_answers.check_gold(custom, [*examples, other], Scripted("right", 10.0, 2.0))
    monkeypatch.setattr(gold_answers, "OWN_REWARD_S", -1.0)
    monkeypatch.setattr(gold_answers, "GOLDS_AT_ONCE", 1)
    half = replace(custom, reward=replace(custom.reward, right_above=5.0))
    detail = gold_answers.check_gold(half, [*examples, other], Scripted("right", 10.0))
    assert detail.startswith("1 right of 2; right: as the function says, else a reward above 5 (")


def test_another_tokenizer_is_one_failure(
    settings: TrainConfig, loaded: Loaded, tiny: Callable[..., Any]
) -> None:
    """A teacher that lacks tokens of the prompts raised an IndexError of torch besides."""
    other = copy.deepcopy(loaded.tokenizer)
    other.add_tokens(["<extra>"])
    broken = with_teacher(loaded, model=Teacher(tiny("llama", vocab_size=10)), tokenizer=other)
    with Verifier(settings.reward) as verifier:
        results = preflight.preflight(settings, broken, verifier)
    assert [result.name for result in results if not result.passed] == ["tokenizers"]


def test_failures_are_listed_together(
    settings: TrainConfig, loaded: Loaded, tiny: Callable[..., Any]
) -> None:
    broken = with_teacher(loaded, model=Teacher(tiny("llama", vocab_size=250)))
    short = replace(settings, sampling=SamplingConfig(max_new_tokens=300))
    with Verifier(settings.reward) as verifier:
        results = preflight.preflight(short, broken, verifier)
    assert [result.name for result in results if not result.passed] == ["prompts", "vocabulary"]
    details = {result.name: result.detail for result in results}
    assert details["gold answers"].startswith("20 right; ")
    with pytest.raises(ValueError, match=r"(?s)pass its preflight, got:\n  prompts: .*\n  vocab"):
        preflight.require(results)


@pytest.mark.parametrize(
    "error",
    [AttributeError("no x"), IndexError()],
    ids=lambda error: type(error).__name__,
)
def test_what_a_models_code_raises_is_a_failed_line(
    settings: TrainConfig,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(models, "probe", fail)
    assert preflight.main(settings) == 1
    out = "".join(capsys.readouterr().out.replace("│", " ").split())
    text = f"{type(error).__name__}: {error} (".replace(" ", "")
    assert out.count(f"failed{text}") == 2  # policy and teacher; the other checks are made
    assert "test_preflight.py,line" in out
    assert out.count("ok") >= 5
    monkeypatch.setattr(preflight, "load", fail)
    assert preflight.main(settings) == 1
    out = "".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"loadingfailed{text}" in out


def test_another_ranks_end_is_no_failed_line(
    settings: TrainConfig, loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RankError("rank 1 stopped")

    monkeypatch.setattr(models, "probe", fail)
    with Verifier(settings.reward) as verifier, pytest.raises(RankError, match="rank 1 stopped"):
        preflight.preflight(settings, loaded, verifier)


def test_one_sequence_per_pack_needs_no_packing(settings: TrainConfig, loaded: Loaded) -> None:
    alone = replace(settings, optim=OptimConfig(micro_batch_tokens=1))
    with Verifier(settings.reward) as verifier:
        results = preflight.preflight(alone, loaded, verifier)
    details = {result.name: result.detail for result in results}
    assert details["policy head"].endswith("one sequence per pack")


def test_a_fall_back_is_a_warning_that_says_why(settings: TrainConfig, loaded: Loaded) -> None:
    loaded.policy.choice = Choice("sdpa", packs=False, reason="packs differ")
    with Verifier(settings.reward) as verifier:
        results = preflight.preflight(settings, loaded, verifier)
    (warning,) = preflight.require(results)  # `train` prints it
    assert warning.startswith("policy head: Qwen2ForCausalLM, tied head")
    assert warning.endswith("; sdpa attention, one sequence a row; packs differ")


def test_shards_run_one_sequence_a_pack_where_rows_hold_one(
    settings: TrainConfig, loaded: Loaded
) -> None:
    """Ranks must run the same number of rows: they gather a layer's weights together."""

    def budget(world: World) -> int:
        run = pack_for(settings, world, loaded.policy, loaded.teachers[0].model)
        return run.optim.micro_batch_tokens

    launched = replace(ALONE, launched=True)
    assert [budget(world) for world in (ALONE, launched)] == [8192, 8192]
    for choice in (Choice(packs=False), Choice(longest=64)):
        loaded.teachers[0].model.choice = choice
        assert [budget(world) for world in (ALONE, launched)] == [8192, 1]


def test_a_model_folder_without_a_model_is_named(settings: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(settings.model.policy, tmp_path / "half")
    (tmp_path / "half" / "model.safetensors").unlink()
    model = replace(settings.model, policy=str(tmp_path / "half"))
    with pytest.raises(ValueError, match=r"model\.policy must be a folder with a causal LM"):
        load(replace(settings, model=model))


def test_what_an_export_would_lack_is_a_warning(loaded: Loaded) -> None:
    policy, teacher = loaded.policy, loaded.teachers[0].model
    assert teacher is not None
    assert models.check_weights(policy, "model.policy").startswith("all read, float32 in its")
    for model in (policy.model, teacher.model):
        model.origin = replace(model.origin, parts={"visual": 1_200, "mtp": 3})
    with pytest.raises(UserWarning) as warning:
        models.check_weights(policy, "model.policy")
    assert str(warning.value) == (
        "model.policy: Qwen2ForCausalLM has no visual (1,200 tensors), mtp (3 tensors), which its "
        "files hold: the exported model will lack them"
    )
    assert models.check_weights(teacher, "model.teacher") == "all read, float32 in its files"
    teacher.model.origin = replace(teacher.model.origin, unused=["model.layers.0.mlp.bias"])
    with pytest.raises(
        UserWarning, match=r"LlamaForCausalLM does not use model\.layers\.0\.mlp\.b"
    ):
        models.check_weights(teacher, "model.teacher")

"""Prompts before the first step: whether they fit beside their completions."""

from dataclasses import replace

import pytest

from kdrl_train.config import SamplingConfig, TrainConfig
from kdrl_train.model.attention import Choice
from kdrl_train.rollouts.problems import TeacherPromptFacts
from kdrl_train.rollouts.rendering import PromptError
from kdrl_train.start import prompts
from kdrl_train.start.load import Loaded, load
from tests.train.start.loaded import warning


def test_prompts_must_fit(settings: TrainConfig, loaded: Loaded) -> None:
    assert prompts.check_prompts(settings, loaded).startswith("20 problems, 4 to 4 tokens, without")
    long = replace(settings, sampling=SamplingConfig(max_new_tokens=253))
    with pytest.raises(ValueError, match=r"a window of 256 tokens for 4 \+ 253: lower"):
        prompts.check_prompts(long, loaded)
    facts = TeacherPromptFacts(longest=200, too_long=[], first_too_long=None, count=20, sha256="")
    longer = replace(loaded, prompts=replace(loaded.prompts, teacher=facts))
    with pytest.raises(
        ValueError,
        match=r"teacher must .* 200 \+ 60: lower sampling\.max_new_tokens, or "
        r"data\.max_teacher_prompt_tokens, which",
    ):
        prompts.check_prompts(replace(settings, sampling=SamplingConfig(max_new_tokens=60)), longer)


def test_sampling_beyond_the_original_length_is_named(
    settings: TrainConfig, loaded: Loaded
) -> None:
    """Prompts have 4 tokens."""
    longest = replace(settings, sampling=replace(settings.sampling, max_new_tokens=60))
    loaded.policy.choice = Choice("packed", longest=63)
    assert "rotary factors beyond 63 tokens" in warning(prompts.check_prompts, longest, loaded)
    loaded.policy.choice = Choice("packed", longest=64)
    assert "at most 64 tokens with the completion" in prompts.check_prompts(longest, loaded)


def test_held_out_prompts_must_fit(held: TrainConfig) -> None:
    loaded = load(held)
    assert "20 problems, 4 to 4 tokens, 2 held out of at most 9," in prompts.check_prompts(
        held, loaded
    )
    long = replace(held, sampling=SamplingConfig(max_new_tokens=250))
    with pytest.raises(ValueError, match=r"model\.policy must .* 256 tokens for 9 \+ 250: lower"):
        prompts.check_prompts(long, loaded)
    sets = {"short": replace(held.eval.data, max_prompt_tokens=4)}
    longer = replace(held.eval, max_new_tokens=248, sets=sets)
    with pytest.raises(
        ValueError, match=r"9 \+ 248: lower eval\.max_new_tokens, or eval\.data\.max"
    ):
        prompts.check_prompts(replace(held, eval=longer), loaded)
    fits = replace(held, eval=replace(longer, max_new_tokens=247))
    of_sets = load(fits)
    assert prompts.longest_with_completion(fits, of_sets) == 9 + 247
    assert prompts.longest_with_completion(fits, replace(of_sets, held_out=[])) == 4 + 32
    doubt = warning(prompts.check_prompts, fits, of_sets)
    assert doubt.startswith("in eval.sets.short 1 of 2 problems are left out: ")
    assert "2 held out of at most 9, 1 held out in eval.sets.short of at most 4, " in doubt
    assert list(of_sets.data) == ["data", "eval.data", "eval.sets.short"]
    first = replace(held, eval=replace(held.eval, max_problems=1))
    assert [len(one.examples) for one in load(first).held_out] == [1]
    assert load(replace(held, eval=replace(held.eval, every=0))).held_out == []


def test_prompts_that_are_too_long_are_left_out_and_counted(held: TrainConfig) -> None:
    swapped = replace(  # one of two training prompts is too long, and one of two held-out ones
        held,
        data=replace(held.eval.data, max_prompt_tokens=4),
        eval=replace(held.eval, data=replace(held.eval.data, max_prompt_tokens=8)),
    )
    loaded = load(swapped)
    assert [one.id for one in loaded.all_examples] == ["held.jsonl:1"] * 2
    doubt = warning(prompts.check_prompts, swapped, loaded)
    left_out = "1 of 2 problems are left out: their prompts have more than max_prompt_tokens"
    assert doubt.startswith(left_out)
    assert f"in eval.data {left_out} tokens; the first is held.jsonl:2; 1 of 1 problems " in doubt
    assert "their accuracy says little of problems that are new; 1 problems, 4 to 4 tok" in doubt
    none = replace(held.data, max_prompt_tokens=3)
    with pytest.raises(PromptError, match=r"at least 50% of .*, got 3, and 20 of 20 with longer"):
        load(replace(held, data=none))
    with pytest.raises(PromptError, match=r"in eval\.data: .*2 of 2 with .*, held\.jsonl:1 first"):
        load(replace(held, eval=replace(held.eval, data=replace(none, path=held.eval.data.path))))


def test_records_that_an_evaluation_set_cannot_use_name_its_section(held: TrainConfig) -> None:
    other = replace(held.eval.data, answer_column="none")
    for name, evaluation in {
        "eval.data": replace(held.eval, data=other),
        "eval.sets.more": replace(held.eval, sets={"more": other}),
    }.items():
        with pytest.raises(ValueError, match=rf"^in {name}: data\.answer_column must be a column"):
            load(replace(held, eval=evaluation))

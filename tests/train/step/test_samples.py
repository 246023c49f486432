"""samples: the lines of a run say of each token what the models say of it."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from kdrl_train import train
from kdrl_train.batch import Batch
from kdrl_train.config import OptimConfig, SamplingConfig, TrainConfig
from kdrl_train.method.grpo import group_advantages
from kdrl_train.method.presets import PRESETS
from kdrl_train.model.load import load_policy, load_teacher
from kdrl_train.rollouts.rendering import completion_text
from kdrl_train.runfolder import jsonl
from kdrl_train.step.samples import token_chars
from kdrl_train.tools.report import token_colours
from tests.train.ranks import train_ranks
from tests.train.test_train import run


def lines(config: TrainConfig, step: int = 0) -> list[dict[str, Any]]:
    return jsonl.read(config.out / "samples" / f"step_{step:06d}.jsonl")


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """What the runs of a test have collected."""
    collected: list[Batch] = []
    collect = train.collect

    def spy(*arguments: Any, **more: Any) -> Batch:
        collected.append(collect(*arguments, **more))
        return collected[-1]

    monkeypatch.setattr(train, "collect", spy)
    return collected


def log_ratio_of(config: TrainConfig, batch: Batch, r: int) -> torch.Tensor:
    """[T] l of a completion at the weights of step 0, from whole logits."""
    teacher = load_teacher(config)
    assert teacher is not None
    prompt, completion = batch.rollouts.prompt_ids[r], batch.rollouts.completion_ids[r]
    ids = torch.cat([prompt, completion])[None]
    with torch.no_grad():
        p, q = (m.model(input_ids=ids).logits[0, len(prompt) - 1 : -1] for m in
                (load_policy(config, teacher.vocab_size), teacher))  # fmt: skip
    pick = completion[:, None]
    return (p.log_softmax(-1).gather(1, pick) - q.log_softmax(-1).gather(1, pick)).squeeze(1)


@pytest.mark.parametrize("name", ["kdrl", "kdrl_masked", "kd_rkl", "reward_shaping", "grpo"])
def test_a_line_says_what_the_step_saw(
    name: str, config: Callable[..., TrainConfig], batches: list[Batch]
) -> None:
    settings = config(steps=1, samples_per_step=16, method=PRESETS[name])
    run(settings)
    (batch,), samples = batches, lines(settings)
    assert len(samples) == 16
    advantages = group_advantages(batch.rewards, "grpo").flatten()
    for r, line in enumerate(samples):
        right = line["reward"] > 0
        assert line["outcome"] == ("right" if right else "wrong")
        assert line["id"] == batch.examples[r].id
        assert sum(line["token_chars"]) == len(line["completion"])
        assert len(line["token_chars"]) == line["tokens"]
        if name in ("kdrl", "grpo"):
            assert line["advantage"] == pytest.approx(advantages[r].item(), abs=1e-5)
        if name == "grpo" or (name == "kdrl_masked" and right):
            assert line["teacher_log_ratio"] is None
        else:
            assert line["teacher_log_ratio"] == pytest.approx(
                log_ratio_of(settings, batch, r).tolist(), abs=2e-4
            )
    if name == "kdrl":
        assert token_colours.sample(line, "kdrl", "k2").strongest
    if name == "kdrl_masked":
        assert 0 < sum(line["teacher_log_ratio"] is None for line in samples) < 16


def test_a_token_that_is_not_distilled_has_no_log_ratio(config: Callable[..., TrainConfig]) -> None:
    method = replace(PRESETS["kdrl"], kd_eos="mask")
    sampling = SamplingConfig(prompts_per_step=4, group_size=4, max_new_tokens=100)
    run(settings := config(steps=1, samples_per_step=16, method=method, sampling=sampling))
    ended = [line for line in lines(settings) if not line["truncated"]]
    assert ended
    for line in ended:
        assert line["teacher_log_ratio"][-1] is None
        assert None not in line["teacher_log_ratio"][:-1]


@pytest.mark.slow
def test_ranks_write_the_samples_of_one_process(config: Callable[..., TrainConfig]) -> None:
    optim = OptimConfig(learning_rate=1e-3, updates_per_rollout=2, micro_batch_tokens=32)
    same = {"steps": 2, "samples_per_step": 8, "method": PRESETS["kdrl"], "optim": optim}
    run(alone := config("alone", **same))
    train_ranks(two := config("two", **same), 2)
    for step in (0, 1):
        for a, b in zip(lines(alone, step), lines(two, step), strict=True):
            assert a.pop("teacher_log_ratio") == pytest.approx(b.pop("teacher_log_ratio"), abs=2e-3)
            assert a == b


def test_none_are_written_where_none_are_wanted(config: Callable[..., TrainConfig]) -> None:
    run(settings := config(steps=1, samples_per_step=0))
    assert not list((settings.out / "samples").iterdir())


@pytest.mark.parametrize("text", ["3+4=7", "ü", "aüb", "日本", "x\n\ny ", "🙂!"])
def test_characters_of_several_tokens(text: str, tokenizer: Any) -> None:
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    counts = token_chars(tokenizer, ids, text, truncated=False)
    assert counts is not None
    assert len(counts) == len(ids)
    assert counts[-1] == 0
    assert sum(counts) == len(text)
    if text == "aüb":
        assert counts == [1, 0, 1, 1, 0]


def test_special_tokens_are_characters_but_not_ends_and_padding(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<answer>"], special_tokens=True)
    ends, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = [258, *tokenizer("ü")["input_ids"], pad, 258, ends]
    text = completion_text(tokenizer, ids, truncated=False)
    assert text == "<answer>ü<answer>"
    assert token_chars(tokenizer, ids, text, truncated=False) == [8, 0, 1, 0, 8, 0]
    assert completion_text(tokenizer, ids[:-1], truncated=True) == text
    assert completion_text(tokenizer, ids[:-2], truncated=True) == "<answer>ü"
    plain = tokenizer("a#")["input_ids"]  # "#" ends sequences, and is a part of the text
    assert completion_text(tokenizer, plain, truncated=False) == "a#"
    assert token_chars(tokenizer, plain, "a#", truncated=False) == [1, 1]


def test_a_space_that_only_its_neighbours_show() -> None:
    """Sentencepiece: a first token has no leading space, the same token later has one."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    core.decoder = tokenizers.decoders.Metaspace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core)
    text = made.decode([0, 1, 0])
    assert text == "a b a"
    assert token_chars(made, [0, 1, 0], text, truncated=True) == [1, 2, 2]
    assert token_chars(made, [0, 1, 0], "another text", truncated=True) is None


def test_bytes_that_are_no_text(tokenizer: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        ids = torch.randint(2, 258, (12,), generator=draw).tolist()
        text = tokenizer.decode(ids)
        counts = token_chars(tokenizer, ids, text, truncated=True)
        assert counts is None or sum(counts) == len(text)

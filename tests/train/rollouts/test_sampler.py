"""rollout: what is recorded is what was sampled, from the plain softmax and nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig
from kdrl_train.model.eos import eos_ids
from kdrl_train.rollouts.sampler import Draw, generate_rollouts, uniforms
from kdrl_train.runfolder.signals import Stopped

PROMPTS = [[5], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32]]
HOSTILE = {
    "top_k": 2,
    "top_p": 0.5,
    "min_p": 0.4,
    "repetition_penalty": 1.7,
    "temperature": 3.0,
    "suppress_tokens": [40],
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 5,
}
"""What a model's generation_config.json may ask for; none of it may reach a rollout."""


def sampling(**settings: Any) -> SamplingConfig:
    return SamplingConfig(**{"group_size": 2, "max_new_tokens": 12, "batch_size": 4} | settings)


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Any:
    """A model of its own for each test, with a hostile generation config."""
    made = tiny("qwen2", tie_word_embeddings=True, initializer_range=0.1)
    made.generation_config.update(**HOSTILE)
    return made


def test_recorded_logprobs_are_the_models(model: Any, tokenizer: Any) -> None:
    found = generate_rollouts(model, tokenizer, PROMPTS, sampling(temperature=0.7), 0, 0)
    assert [p.tolist() for p in found.prompt_ids] == [p for p in PROMPTS for _ in range(2)]
    for prompt, ids, logprobs in zip(
        found.prompt_ids, found.completion_ids, found.logprobs, strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0] / 0.7
        expected = logits.log_softmax(dim=1)[len(prompt) - 1 : -1]
        expected = expected.gather(1, ids[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert found.texts == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in found.completion_ids
    ]


def test_draws_follow_the_plain_softmax(model: Any, tokenizer: Any) -> None:
    n = 20_000
    settings = sampling(group_size=n, batch_size=n, max_new_tokens=1, temperature=0.5)
    found = generate_rollouts(model, tokenizer, [[7, 8]], settings, 1, 0)
    drawn = torch.cat(found.completion_ids).bincount(minlength=258) / n
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([[7, 8]])).logits[0, -1] / 0.5).softmax(dim=0)
    deviation = (drawn - expected).abs() / (expected * (1 - expected) / n).sqrt()
    assert deviation.max() < 5  # standard deviations, over 258 tokens
    assert (drawn > 0).sum() > 100


def test_every_end_of_sequence_token_ends(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = [*range(100, 200)]
    model.config.eos_token_id = 99
    stops = eos_ids(model, tokenizer)
    assert stops == [0, *range(99, 200)]
    found = generate_rollouts(model, tokenizer, PROMPTS, sampling(group_size=8), 0, 0)
    for ids, logprobs, cut in zip(
        found.completion_ids, found.logprobs, found.truncated.tolist(), strict=True
    ):
        ends = [int(i) in stops for i in ids]
        assert len(ids) == len(logprobs)
        assert not any(ends[:-1])
        assert cut == (not ends[-1])
        assert not cut or len(ids) == 12
    assert 0 < found.lengths.float().mean() < 6  # a third of the vocabulary ends


def test_truncation_is_marked(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = 0
    found = generate_rollouts(model, tokenizer, [[5]], sampling(max_new_tokens=2), 0, 0)
    assert found.lengths.tolist() == [2, 2]
    assert found.truncated.tolist() == [True, True]


def test_a_draw_is_a_function_of_seed_and_step(model: Any, tokenizer: Any) -> None:
    def draw(seed: int, step: int) -> list[list[int]]:
        found = generate_rollouts(model, tokenizer, PROMPTS, sampling(), seed, step)
        return [ids.tolist() for ids in found.completion_ids]

    first = draw(0, 0)
    torch.rand(3)
    assert draw(0, 0) == first
    assert draw(0, 1) != first
    assert draw(1, 0) != first
    assert first[0] != first[1]  # two completions of one prompt


def test_nothing_of_the_caller_is_changed(model: Any, tokenizer: Any) -> None:
    config = model.generation_config
    before = config.to_dict()
    model.train()
    state = torch.get_rng_state()
    generate_rollouts(model, tokenizer, PROMPTS, sampling(), 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.generation_config is config
    assert config.to_dict() == before
    with pytest.raises(ValueError, match="at least one token each"):
        generate_rollouts(model, tokenizer, [[1], []], sampling(), 0, 0)


def test_it_is_restored_after_an_error(model: Any, tokenizer: Any) -> None:
    config = model.generation_config
    model.train()
    with pytest.raises(IndexError):
        generate_rollouts(model, tokenizer, [[10**6]], sampling(), 0, 0)
    assert model.training
    assert model.generation_config is config


def test_columns_beyond_the_vocabulary_are_never_drawn(model: Any, tokenizer: Any) -> None:
    settings = sampling(group_size=50, batch_size=50)
    found = generate_rollouts(model, tokenizer, [[5]], settings, 0, 0, vocab_size=20)
    assert max(int(ids.max()) for ids in found.completion_ids) < 20
    ids = found.completion_ids[0]
    with torch.no_grad():
        logits = model(input_ids=torch.cat([torch.tensor([5]), ids])[None]).logits[0, :, :20]
    expected = logits.log_softmax(dim=1)[:-1].gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(found.logprobs[0], expected, rtol=1e-5, atol=1e-5)


def test_draw_by_hand() -> None:
    third = torch.tensor(3.0).log().item()  # p = 1/4, 3/4 at temperature 2, and a column to ignore
    numbers = torch.tensor([[0.24, 0.26], [0.26, 0.0]], dtype=torch.float64)
    draw = Draw(numbers, temperature=2.0, vocab_size=2)
    logits = torch.tensor([[0.0, 2 * third, 50.0]] * 2)
    never = -torch.inf
    assert draw(torch.tensor([[9], [9]]), logits).tolist() == [[0, never, never], [never, 0, never]]
    second = torch.tensor([[0.0, 0.0, 9.0], [never, 1.0, 9.0]])  # p = 1/2, 1/2 and 0, 1
    assert draw(torch.tensor([[9, 0], [9, 1]]), second).argmax(dim=1).tolist() == [0, 1]
    expected = torch.tensor([[1 / 4, 1 / 2], [3 / 4, 1.0]]).log()
    torch.testing.assert_close(draw.recorded(), expected)


def test_broken_logits_stop_the_sampling(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits must be finite while it samples"):
        generate_rollouts(model, tokenizer, PROMPTS, sampling(), 0, 0)


def test_a_draw_depends_on_no_batch_and_no_part(model: Any, tokenizer: Any) -> None:
    """Neither on batch_size, nor on which prompts a rank has, nor on how many ranks there are."""
    whole = generate_rollouts(model, tokenizer, PROMPTS, sampling(batch_size=100), 3, 5)
    small = generate_rollouts(model, tokenizer, PROMPTS, sampling(batch_size=1), 3, 5)
    parts = [
        generate_rollouts(model, tokenizer, PROMPTS[a:b], sampling(), 3, 5, first=a)
        for a, b in ((0, 1), (1, 1), (1, 3))
    ]
    joined = Rollouts.join(parts)
    for other in (small, joined):
        assert other.texts == whole.texts
        assert torch.equal(other.truncated, whole.truncated)
        for name in ("prompt_ids", "completion_ids"):
            for ours, theirs in zip(getattr(other, name), getattr(whole, name), strict=True):
                assert torch.equal(ours, theirs)
        for ours, theirs in zip(other.logprobs, whole.logprobs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_poll_ends_the_generation(model: Any, tokenizer: Any) -> None:
    calls = []

    def poll() -> None:
        calls.append(0)
        if len(calls) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        generate_rollouts(model, tokenizer, PROMPTS, sampling(), 0, 0, poll=poll)
    assert len(calls) == 3


def test_uniforms_of_all_places_differ() -> None:
    places = [(s, t, p, g) for s in range(3) for t in range(3) for p in range(3) for g in range(3)]
    assert len({float(uniforms(*place, 4)[0]) for place in places}) == 81
    assert (uniforms(0, 0, 0, 0, 9)[:4] == uniforms(0, 0, 0, 0, 4)).all()


def test_a_model_without_an_end_is_refused(model: Any) -> None:
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    with pytest.raises(ValueError, match="eos_token_id must be set"):
        eos_ids(model, object())

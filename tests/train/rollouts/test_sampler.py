"""sampler: it draws from the plain softmax and nothing else, and records what it drew."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import SamplingConfig
from kdrl_train.model.eos import eos_ids
from kdrl_train.rollouts import sampler
from kdrl_train.rollouts.sampler import Draw, SampleRequest, generate_rollouts, uniforms
from kdrl_train.runfolder.signals import Stopped
from tests.families import make
from tests.train.conftest import EOS, PAD

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
"""Settings that a model's generation_config.json may hold; none may change a completion."""


def request(
    prompts: list[list[int]] = PROMPTS,
    seed: int = 0,
    step: int = 0,
    first: int = 0,
    **settings: Any,
) -> SampleRequest:
    """Make a request whose SamplingConfig has the settings, and small sizes elsewhere."""
    sampling = {"group_size": 2, "max_new_tokens": 12, "batch_size": 4} | settings
    return SampleRequest(
        prompts=prompts, sampling=SamplingConfig(**sampling), seed=seed, step=step, first=first
    )


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Any:
    """Make a new model for each test, with a hostile generation config."""
    made = tiny("qwen2", tie_word_embeddings=True, initializer_range=0.1)
    made.generation_config.update(**HOSTILE)
    return made


def test_recorded_logprobs_are_the_models(model: Any, tokenizer: Any) -> None:
    rollouts = generate_rollouts(model, tokenizer, request(temperature=0.7))
    assert [p.tolist() for p in rollouts.prompt_ids] == [p for p in PROMPTS for _ in range(2)]
    for prompt, ids, logprobs in zip(
        rollouts.prompt_ids, rollouts.completion_ids, rollouts.logprobs, strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0] / 0.7
        expected = logits.log_softmax(dim=1)[len(prompt) - 1 : -1]
        expected = expected.gather(1, ids[:, None]).squeeze(1)
        torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    assert rollouts.texts == [
        tokenizer.decode(ids, skip_special_tokens=True) for ids in rollouts.completion_ids
    ]


def test_draws_follow_the_plain_softmax(model: Any, tokenizer: Any) -> None:
    n = 8_000
    settings = {"group_size": n, "batch_size": n, "max_new_tokens": 1, "temperature": 0.5}
    rollouts = generate_rollouts(model, tokenizer, request([[7, 8]], seed=1, **settings))
    drawn = torch.cat(rollouts.completion_ids).bincount(minlength=258) / n
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([[7, 8]])).logits[0, -1] / 0.5).softmax(dim=0)
    deviation = (drawn - expected).abs() / (expected * (1 - expected) / n).sqrt()
    assert deviation.max() < 4.5  # standard deviations, over 258 tokens; 4.8 at temperature 0.57
    assert (drawn > 0).sum() > 100


def test_greedy_takes_the_most_probable_token(model: Any, tokenizer: Any) -> None:
    """Of those that may be drawn, whatever the seed, the temperature and the generation config."""
    columns = 200
    one, other = (
        generate_rollouts(
            model,
            tokenizer,
            replace(request(seed=seed, temperature=0.7 + seed), greedy=True),
            sampled_vocab_size=columns,
        )
        for seed in (0, 1)
    )
    for prompt, ids, same in zip(
        one.prompt_ids, one.completion_ids, other.completion_ids, strict=True
    ):
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, :, :columns]
        assert ids.tolist() == logits[len(prompt) - 1 : -1].argmax(dim=1).tolist()
        assert ids.tolist() == same.tolist()
    drawn = generate_rollouts(model, tokenizer, request(), sampled_vocab_size=columns)
    assert [ids.tolist() for ids in drawn.completion_ids] != [
        ids.tolist() for ids in one.completion_ids
    ]


def test_every_end_of_sequence_token_ends(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = [*range(100, 200)]
    model.config.eos_token_id = 99
    stops = eos_ids(model, tokenizer)
    assert stops == [0, *range(99, 200)]
    rollouts = generate_rollouts(model, tokenizer, request(group_size=8))
    for ids, logprobs, cut in zip(
        rollouts.completion_ids, rollouts.logprobs, rollouts.truncated.tolist(), strict=True
    ):
        ends = [int(i) in stops for i in ids]
        assert len(ids) == len(logprobs)
        assert not any(ends[:-1])
        assert cut == (not ends[-1])
        assert not cut or len(ids) == 12
    assert 0 < rollouts.lengths.float().mean() < 6  # a third of the vocabulary ends


def test_progress_is_counted(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each report equals a count over the finished completions, cut where it was made."""
    monkeypatch.setattr(sampler, "REPORT_S", 0.0)  # at every token
    model.generation_config.eos_token_id = [*range(100, 115)]
    seen: list[tuple[int, int]] = []
    small = replace(request(group_size=8, batch_size=5), report=lambda *now: seen.append(now))
    rollouts = generate_rollouts(model, tokenizer, small)
    lengths, cut = rollouts.lengths.tolist(), rollouts.truncated.tolist()
    expected = []
    for start in range(0, len(lengths), 5):
        batch = list(zip(lengths[start : start + 5], cut[start : start + 5], strict=True))
        for drawn in range(max(length for length, _ in batch) + 1):
            ended = sum(length <= drawn and not is_cut for length, is_cut in batch)
            tokens = sum(min(length, drawn) for length, _ in batch)
            expected.append((start + ended, sum(lengths[:start]) + tokens))
    assert seen == expected
    assert 0 < sum(cut) < len(cut)


def test_truncation_is_marked(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = 0
    rollouts = generate_rollouts(model, tokenizer, request([[5]], max_new_tokens=2))
    assert rollouts.lengths.tolist() == [2, 2]
    assert rollouts.truncated.tolist() == [True, True]


@pytest.mark.parametrize("name", ["<answer>", EOS, PAD])
def test_a_reward_sees_special_tokens_but_ends_and_padding(
    model: Any, tokenizer: Any, name: str
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<answer>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    head = torch.nn.Linear(32, len(tokenizer))
    torch.nn.init.zeros_(head.weight)
    head.bias.data[tokenizer.convert_tokens_to_ids(name)] = 50  # the only token that is drawn
    model.lm_head = head
    rollouts = generate_rollouts(model, tokenizer, request([[5]], group_size=1, max_new_tokens=3))
    assert rollouts.texts == ["<answer>" * 3 if name == "<answer>" else ""]


def test_a_draw_is_a_function_of_seed_and_step(model: Any, tokenizer: Any) -> None:
    def draw(seed: int, step: int) -> list[list[int]]:
        rollouts = generate_rollouts(model, tokenizer, request(seed=seed, step=step))
        return [ids.tolist() for ids in rollouts.completion_ids]

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
    generate_rollouts(model, tokenizer, request())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert model.generation_config is config
    assert config.to_dict() == before
    with pytest.raises(ValueError, match="at least one token each"):
        generate_rollouts(model, tokenizer, request([[1], []]))


def test_it_is_restored_after_an_error(model: Any, tokenizer: Any) -> None:
    config = model.generation_config
    model.train()
    with pytest.raises(IndexError):
        generate_rollouts(model, tokenizer, request([[10**6]]))
    assert model.training
    assert model.generation_config is config


def test_columns_beyond_the_vocabulary_are_never_drawn(model: Any, tokenizer: Any) -> None:
    one = request([[5]], group_size=50, batch_size=50)
    rollouts = generate_rollouts(model, tokenizer, one, sampled_vocab_size=20)
    assert max(int(ids.max()) for ids in rollouts.completion_ids) < 20
    ids = rollouts.completion_ids[0]
    with torch.no_grad():
        logits = model(input_ids=torch.cat([torch.tensor([5]), ids])[None]).logits[0, :, :20]
    expected = logits.log_softmax(dim=1)[:-1].gather(1, ids[:, None]).squeeze(1)
    torch.testing.assert_close(rollouts.logprobs[0], expected, rtol=1e-5, atol=1e-5)


def test_draw_by_hand() -> None:
    third = torch.tensor(3.0).log().item()  # p = 1/4, 3/4 at temperature 2, and a column to ignore
    numbers = torch.tensor([[0.24, 0.26], [0.26, 0.0]], dtype=torch.float64)
    draw = Draw(numbers, temperature=2.0, sampled_vocab_size=2)
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
        generate_rollouts(model, tokenizer, request())


def test_a_draw_depends_on_no_batch_and_no_part(model: Any, tokenizer: Any) -> None:
    """It depends neither on batch_size, nor on a rank's prompts, nor on the number of ranks."""
    whole = generate_rollouts(model, tokenizer, request(seed=3, step=5, batch_size=100))
    small = generate_rollouts(model, tokenizer, request(seed=3, step=5, batch_size=1))
    parts = [
        generate_rollouts(model, tokenizer, request(PROMPTS[a:b], seed=3, step=5, first=a))
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
        generate_rollouts(model, tokenizer, request(), poll)
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


@pytest.mark.parametrize("family", ["recurrent_gemma", "rwkv", "xlstm", "llama"])
def test_a_longer_prompt_beside_it_changes_no_completion(family: str, tokenizer: Any) -> None:
    settings = {"qk_dim_factor": 1.0} if family == "xlstm" else {}  # transformers' cache needs it
    model, prompts = make(family, **settings), PROMPTS[1:]
    together = generate_rollouts(model, tokenizer, request(prompts, batch_size=4))
    alone = generate_rollouts(model, tokenizer, request(prompts, batch_size=1))
    for name in ("completion_ids", "logprobs"):
        for ours, theirs in zip(getattr(together, name), getattr(alone, name), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)

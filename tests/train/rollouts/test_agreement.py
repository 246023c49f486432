"""agreement: a sampler whose batches or earlier calls change a completion is noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdrl_train.config import SamplingConfig
from kdrl_train.errors import EngineError
from kdrl_train.rollouts import agreement as module
from kdrl_train.rollouts.agreement import Agreement
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts
from tests.families import make

PROMPTS = [[5], [20, 21, 22, 23, 24, 25, 26], [30, 31, 32]]
COLUMNS = 200


@pytest.fixture
def model(tiny: Callable[..., Any]) -> Any:
    return tiny("llama", initializer_range=0.1)


def draw(model: Any, tokenizer: Any, agreement: Agreement, size: int = 4) -> Any:
    sampling = SamplingConfig(group_size=2, max_new_tokens=12, batch_size=size, temperature=0.7)
    request = SampleRequest(prompts=PROMPTS, sampling=sampling, seed=0, step=0)
    return generate_rollouts(
        model, tokenizer, request, sampled_vocab_size=COLUMNS, agreement=agreement
    )


def test_it_compares_with_the_models_own_logits(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "COMPARED", 9)
    agreement = Agreement(model, 0.7, COLUMNS, 1e-3)
    rollouts = draw(model, tokenizer, agreement)
    drawn = [*zip(rollouts.prompt_ids, rollouts.completion_ids, strict=True)]
    for prompt, ids in drawn:
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, ids])[None]).logits[0, :, :COLUMNS] / 0.7
        expected = logits[len(prompt) - 1 : -1].log_softmax(dim=1).gather(1, ids[:, None])
        torch.testing.assert_close(agreement.alone(prompt, ids), expected.squeeze(1))
    lengths = rollouts.lengths.clamp(max=9).tolist()  # of batches of 4 and 2
    assert agreement.tokens == lengths[0] + lengths[2] + lengths[4]
    assert agreement.total / agreement.tokens < 1e-5
    wrong = [logprobs + 0.02 for logprobs in rollouts.logprobs]
    prompts, completions = zip(*drawn, strict=True)
    count = lengths[0] + lengths[2]
    strict = Agreement(model, 0.7, COLUMNS, 7e-4)
    with pytest.raises(EngineError, match=rf"to 0\.001 nats .* of 0\.02 over {count} tokens"):
        strict.add(prompts, completions, wrong)
    monkeypatch.setattr(module, "FEW", count)
    with pytest.raises(EngineError, match=r"to 0\.01 nats"):
        Agreement(model, 0.7, COLUMNS, 7e-3).add(prompts, completions, wrong)


def test_prompts_that_change_each_other_are_noticed(model: Any, tokenizer: Any) -> None:
    def mix(_module: Any, _inputs: Any, states: Tensor) -> Tensor:
        return states + 0.5 * states.roll(1, dims=0)  # those of another prompt

    model.model.layers[0].register_forward_hook(mix)
    with pytest.raises(EngineError, match=r"drawn from; set sampling\.batch_size to 1$"):
        draw(model, tokenizer, Agreement(model, 0.7, COLUMNS, 1e-3))
    draw(model, tokenizer, Agreement(model, 0.7, COLUMNS, 1e-3), size=1)


def test_state_of_an_earlier_call_is_noticed(model: Any, tokenizer: Any) -> None:
    calls: list[int] = []

    def remember(_module: Any, _inputs: Any, states: Tensor) -> Tensor:
        calls.append(0)
        return states * (1 + 0.01 * len(calls))

    model.model.layers[0].register_forward_hook(remember)
    with pytest.raises(EngineError, match=r"a call before it .*; name another model$"):
        draw(model, tokenizer, Agreement(model, 0.7, COLUMNS, 1e-3), size=1)


def test_a_prompt_of_one_token_begins_anew(tokenizer: Any) -> None:
    """RecurrentGemma's layers keep the state of the completion before."""
    model = make("recurrent_gemma", num_hidden_layers=3)
    sampling = SamplingConfig(group_size=2, max_new_tokens=4)
    request = SampleRequest(prompts=[[5]], sampling=sampling, seed=0, step=0)
    rollouts = generate_rollouts(model, tokenizer, request)
    agreement = Agreement(model, 1.0, None, 1e-3)
    for r in (0, 1):
        expected = agreement.alone(rollouts.prompt_ids[r], rollouts.completion_ids[r])
        torch.testing.assert_close(rollouts.logprobs[r], expected, rtol=0, atol=1e-4)


def test_factors_of_a_longer_sequence_are_forgotten(tokenizer: Any) -> None:
    """Dynamic rotary factors stay those of the longest sequence before."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = make("llama", rope_parameters=rope, max_position_embeddings=10)
    prompts = [[20 + i for i in range(12)], [20 + i for i in range(25)]]
    sampling = SamplingConfig(group_size=1, max_new_tokens=1, batch_size=1)
    first, _, again = (
        generate_rollouts(
            model, tokenizer, SampleRequest(prompts=one, sampling=sampling, seed=0, step=0)
        )
        for one in (prompts[:1], prompts[1:], prompts[:1])
    )
    assert torch.equal(first.logprobs[0], again.logprobs[0])


def test_factors_that_change_while_a_completion_grows_are_no_fault(tokenizer: Any) -> None:
    """They are one where another prompt of the batch is longer."""
    model = make("phi3", num_hidden_layers=2)  # whose factors change after 64 tokens
    prompts = [list(range(20, 82)), list(range(20, 90))]

    def compared(prompts: list[list[int]]) -> int:
        agreement = Agreement(model, 1.0, None, 1e-4)
        sampling = SamplingConfig(group_size=1, max_new_tokens=8)
        request = SampleRequest(prompts=prompts, sampling=sampling, seed=0, step=0)
        generate_rollouts(model, tokenizer, request, agreement=agreement)
        return agreement.tokens

    assert compared(prompts[:1]) == 3
    assert compared(prompts[1:]) == 1
    with pytest.raises(EngineError, match="lets the prompts of a batch"):
        compared(prompts)

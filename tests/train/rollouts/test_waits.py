"""Where sampling waits for a GPU: every wait is listed here with its reason, and there is no other.

On a pretended GPU. The loop over the tokens is that of transformers, and so are its waits.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kdrl_train.config import SamplingConfig
from kdrl_train.rollouts import sampler
from kdrl_train.rollouts.sampler import SampleRequest, generate_rollouts
from tests.pretended_gpu import move, pretend

Waits = Counter[str]
TRANSFORMERS = "kdrl_train/rollouts/sampler.py _generate: _local_scalar_dense"
TOKEN = Waits({TRANSFORMERS: 1})
"""Of each token: whether some completion has not ended."""
PADDED = Waits({TRANSFORMERS: 1})
"""Of each token, and once more at the start: whether the mask of the prompts has no padding."""
BATCH = Waits(
    {
        # whether the mask has padding, on which side, and whether the special tokens are sound
        TRANSFORMERS: 5,
        "kdrl_train/rollouts/sampler.py _generate: tensor": 2,  # the special tokens
        # the tokens and their log-probabilities
        "kdrl_train/rollouts/sampler.py _generate: to": 1,
        "kdrl_train/rollouts/sampler.py Draw.recorded: to": 1,
    }
)
"""Of each batch of completions."""
REPORT = Waits({"kdrl_train/rollouts/sampler.py Tally.add: _local_scalar_dense": 2})
"""Of each report, one a second where somebody watches: what has ended, and what was drawn."""


def _times(count: int, waits: Waits) -> Waits:
    return Waits({what: count * number for what, number in waits.items()})


@pytest.mark.parametrize(
    ("prompts", "reported"), [([[5, 6]], False), ([[5, 6], [7]], False), ([[5, 6]], True)]
)
def test_waits_of_a_batch(
    prompts: list[list[int]],
    reported: bool,
    tiny: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is drawn on the GPU is what the CPU draws."""
    monkeypatch.setattr(sampler, "REPORT_S", 0.0)  # at every token
    sampling = SamplingConfig(group_size=2, max_new_tokens=5, batch_size=8)
    request = SampleRequest(prompts=prompts, sampling=sampling, seed=0, step=0)
    model = tiny("qwen2", seed=1)
    expected = generate_rollouts(model, tokenizer, request)
    with pretend(monkeypatch) as gpu:
        watched = replace(request, report=lambda *_: None) if reported else request
        rollouts = generate_rollouts(move(model), tokenizer, watched)
    for ours, theirs in (
        (rollouts.completion_ids, expected.completion_ids),
        (rollouts.logprobs, expected.logprobs),
    ):
        assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    tokens = int(rollouts.lengths.max())
    waits = BATCH + _times(tokens, TOKEN)
    if len(prompts) > 1:
        waits += _times(tokens + 1, PADDED)
    assert gpu.waits == (waits + _times(tokens, REPORT) if reported else waits)

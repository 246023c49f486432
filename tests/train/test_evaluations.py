"""Evaluations during a run: when, on which sets, and how they sample."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kdrl_train.config import EvalConfig, TrainConfig
from kdrl_train.rollouts.engines.generate import GenerateEngine
from kdrl_train.rollouts.sampler import SampleRequest
from tests.train.test_train import run, without_times


def test_held_out_problems_are_measured_at_their_steps(
    config: Callable[..., TrainConfig],
) -> None:
    base = config()
    sets = {"same": base.data, "one": replace(base.data, max_prompt_tokens=9)}
    evaluation = EvalConfig(data=base.data, every=2, samples=2, max_problems=3, sets=sets)
    with_evaluation = run(replace(base, eval=evaluation))
    assert ["eval_avg_at_k" in row for row in with_evaluation] == [False, True, True]
    assert 0 <= with_evaluation[1]["eval_avg_at_k"] <= with_evaluation[1]["eval_pass_at_k"] <= 1
    for record in with_evaluation[1:]:
        kinds = [f"{kind}_at_k{end}" for kind in ("avg", "pass") for end in ("", "_low", "_high")]
        names = [*kinds, "length", "truncated"]
        for name in sets:
            assert [record[f"eval/{name}/{k}"] for k in names] == [
                record[f"eval_{k}"] for k in names
            ]
    without = run(config("without"))
    for row, plain in zip(without_times(with_evaluation), without_times(without), strict=True):
        assert {k: v for k, v in row.items() if not k.startswith(("eval_", "eval/"))} == plain


def test_an_evaluation_samples_in_its_own_way(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[SampleRequest] = []
    generate = GenerateEngine.generate

    def note(engine: GenerateEngine, request: SampleRequest, *more: Any) -> Any:
        requests.append(request)
        return generate(engine, request, *more)

    monkeypatch.setattr(GenerateEngine, "generate", note)
    base = config(steps=1)
    evaluation = EvalConfig(
        data=base.data, every=1, max_problems=2, greedy=True, max_new_tokens=3, samples=9
    )
    (record,) = run(replace(base, eval=evaluation))
    assert [request.greedy for request in requests] == [False, True]
    assert [len(request.prompts) for request in requests] == [4, 2]
    sampling = [request.sampling for request in requests]
    assert sampling[0] == base.sampling
    assert (sampling[1].group_size, sampling[1].max_new_tokens) == (1, 3)
    assert record["eval_length"] <= 3

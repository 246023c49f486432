"""The estimate of memory where the policy is measured during its training."""

from dataclasses import replace

from kdrl_train.config import DataConfig, EvalConfig
from kdrl_train.start.estimate.memory import memory_terms
from tests.train.estimate_cases import case_of
from tests.train.start.test_estimate import values


def test_an_evaluation_may_sample_longer_than_the_training(models: dict[str, str]) -> None:
    """Its prompts and completions are held while it samples, and change no pack."""
    case = case_of(models, "untied")
    longer = EvalConfig(
        every=1,
        data=DataConfig(path="a.jsonl", max_prompt_tokens=9),
        sets={"b": DataConfig(path="b.jsonl", max_prompt_tokens=12)},
        max_new_tokens=30,
    )
    measured = replace(case, run=replace(case.run, eval=longer))
    before, after = values(case), values(measured)
    per_token = before["keys and values"] / 16
    changed = {name for name in before if before[name] != after[name]}
    assert after["keys and values"] == 42 * per_token
    assert after["keys and values of the prompts"] == 12 * per_token
    assert changed == {
        "keys and values of the prompts",
        "a layer of the prompts",
        "mask of padded prompts",
        "keys and values",
        "a layer's keys, copied to grow",
    }
    (term,) = [term for term in memory_terms(measured) if term.name == "keys and values"]
    assert term.remedy == "lower sampling.batch_size or eval.max_new_tokens"

"""teacher_prompts: what a template may show the teacher, and what is refused."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdrl_train.batch import Rollouts
from kdrl_train.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from kdrl_train.method.presets import PRESETS
from kdrl_train.rollouts.problems import example_of, load_examples
from kdrl_train.rollouts.rendering import PromptError
from kdrl_train.rollouts.teacher_prompts import (
    as_teacher_reads,
    encode_teacher_prompt,
    shown_to_teacher,
    teacher_prompts,
    teacher_text,
)
from kdrl_train.start.load import read_problems

RECORD = {
    "question": "6*7?",
    "answer": "6*7 = \\frac{42}{1}\n#### 42",
    "hint": 3.0,
    "meta": {"source": "book"},
}


def text(template: str, record: dict[str, Any] = RECORD, **data: Any) -> str:
    config = DataConfig(teacher_template=template, prompt_template="Q: {prompt}", **data)
    return teacher_text(example_of("a.jsonl:1", record, config), config)


def test_a_template_shows_problem_answer_solution_and_columns() -> None:
    assert text("{prompt}|{answer}") == "6*7?|42"  # without prompt_template
    assert text("{solution}, {prompt}") == "6*7 = \\frac{42}{1}\n#### 42, 6*7?"
    assert text("{prompt} {solution}", RECORD | {"solution": "by heart"}) == "6*7? by heart"
    assert text("{prompt} {hint}") == "6*7? 3"
    assert text("{prompt} {meta.source}") == "6*7? book"
    assert text("{prompt} \\boxed{answer} {{answer}} {} {1} \\frac{{a}}{2}") == (
        "6*7? \\boxed42 {answer} {} {1} \\frac{a}{2}"
    )


def test_a_value_is_no_template() -> None:
    record = RECORD | {"hint": "{answer} {prompt}"}
    assert text("{prompt} {hint}", record) == "6*7? {answer} {prompt}"


@pytest.mark.parametrize(
    ("template", "value", "message"),
    [
        (
            "{prompt} {hunt}",
            "x",
            r"\{hunt\} in data\.teacher_template must be a column of a\.jsonl:1.*mean hint\?",
        ),
        ("{prompt} {hint}", "", r"'hint' of a\.jsonl:1 must hold text or a number, got ''"),
        ("{prompt} {hint}", None, r"'hint' of a\.jsonl:1 must hold text or a number, got None"),
        ("{prompt} {hint}", ["a"], r"must hold text or a number, got \['a'\]"),
    ],
)
def test_what_is_no_text_is_named(template: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text(template, RECORD | {"hint": value})


def test_settings_that_teach_nothing_are_refused() -> None:
    for template in ("{answer}", "{{prompt}} {answer}"):
        with pytest.raises(ValueError, match=r"^teacher_template must contain \{prompt\}"):
            DataConfig(teacher_template=template)
    live = ModelConfig(teacher="self", self_teacher="live")
    with pytest.raises(
        ValueError, match=r'^data\.teacher_template must be set with .* "live", got N'
    ):
        TrainConfig(model=live, method=PRESETS["kdrl"])
    TrainConfig(model=live, method=PRESETS["grpo"])  # without a teacher
    TrainConfig(model=ModelConfig(teacher="self"), method=PRESETS["kdrl"])  # a KL to step 0
    with pytest.raises(ValueError, match=r"^eval\.data\.teacher_template must be None"):
        TrainConfig(eval=EvalConfig(data=DataConfig(teacher_template="{prompt}")))
    with pytest.raises(ValueError, match=r'^teacher must be self with self_teacher "ema", got a/b'):
        ModelConfig(teacher="a/b", self_teacher="ema")
    with pytest.raises(
        ValueError, match=r'^self_teacher must be "ema" with ema_decay 0\.5, got "liv'
    ):
        ModelConfig(teacher="self", self_teacher="live", ema_decay=0.5)
    with pytest.raises(ValueError, match=r"^offload_teacher must be off with self_teacher"):
        ModelConfig(teacher="self", self_teacher="live", offload_teacher=True)


def task(folder: Path, sizes: list[int]) -> DataConfig:
    """Problems whose hints have so many characters, which are tokens."""
    rows = [{"question": f"{i}+1=", "answer": "2", "hint": "h" * n} for i, n in enumerate(sizes)]
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return DataConfig(
        path=str(path), teacher_template="{hint}{prompt}", max_teacher_prompt_tokens=10
    )


def test_problems_with_a_long_prompt_of_the_teacher_are_left_out(
    tokenizer: Any, tmp_path: Path
) -> None:
    data = task(tmp_path, [6, 7, 1])
    examples, facts = read_problems(data, tokenizer)
    assert [example.prompt for example in examples] == ["0+1=", "2+1="]
    assert facts.count == 2
    assert facts.teacher is not None
    assert facts.teacher.longest == 10
    assert facts.teacher.left_out == (
        "1 of 3 problems are left out: their teacher's prompts have more than "
        "max_teacher_prompt_tokens tokens; the first is task.jsonl:2"
    )
    other, same = (replace(data, teacher_template=t) for t in ("{prompt}{hint}", "{hint}{prompt}"))
    identity = facts.identity["sha256"]
    assert read_problems(other, tokenizer)[1].identity["sha256"] != identity
    assert read_problems(same, tokenizer)[1].identity["sha256"] == identity
    (tmp_path / "more").mkdir()
    with pytest.raises(PromptError, match=r"max_teacher_prompt_tokens must leave at least 50%"):
        read_problems(task(tmp_path / "more", [7, 7, 1]), tokenizer)


def test_the_teacher_reads_the_chat_template_too(tokenizer: Any) -> None:
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "<{% for m in messages %}{{ m['content'] }}|{% endfor %}>"
    data = DataConfig(teacher_template="{prompt}!{answer}", prompt_template="Q: {prompt}")
    example = example_of("a:1", RECORD, data)
    assert chat.decode(encode_teacher_prompt(chat, example, data)) == "<6*7?!42|>"
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "7*6?"}]
    example = example_of("a:1", RECORD | {"question": messages}, data)
    assert chat.decode(encode_teacher_prompt(chat, example, data)) == "<Be brief|7*6?!42|>"
    assert example.prompt == "system: Be brief\n\nuser: Q: 7*6?"
    assert shown_to_teacher(example, data) == "system: Be brief\n\nuser: 7*6?!42"


def test_completions_follow_the_prompt_of_their_problem(tokenizer: Any, tmp_path: Path) -> None:
    data = task(tmp_path, [1, 2])
    one, other = load_examples(data)
    examples = [one, one, other, other]
    ids = [torch.tensor([5 + r]) for r in range(4)]
    rollouts = Rollouts(
        prompt_ids=ids,
        completion_ids=ids,
        logprobs=[torch.zeros(1)] * 4,
        truncated=torch.zeros(4, dtype=torch.bool),
        texts=[""] * 4,
    )
    prompts = teacher_prompts(tokenizer, examples, data)
    assert prompts is not None
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    assert texts == ["h0+1=", "h0+1=", "hh1+1=", "hh1+1="]
    read = as_teacher_reads(tokenizer, examples, data, rollouts)
    assert [tokenizer.decode(prompt) for prompt in read.prompt_ids] == texts
    assert read.completion_ids is rollouts.completion_ids
    plain = replace(data, teacher_template=None)
    assert as_teacher_reads(tokenizer, examples, plain, rollouts) is rollouts

"""problems: records from every source, an order without state, prompts that are never cut."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from kdrl_train.batch import Example
from kdrl_train.config import DataConfig
from kdrl_train.rollouts import records
from kdrl_train.rollouts.problems import (
    encode_all,
    encode_prompt,
    gold_answer,
    load_examples,
    step_indices,
)
from kdrl_train.rollouts.rendering import PromptError

RECORDS = [
    {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    {"question": "What is 2 + 2?", "answer": "4"},
]
EXPECTED = [("What is 1 + 1?", "2"), ("What is 2 + 2?", "4")]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def contents(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.prompt, example.gold) for example in examples]


def test_jsonl(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", RECORDS)
    path.write_text("\n" + path.read_text(), encoding="utf-8")
    examples = load_examples(DataConfig(path=str(path)))
    assert contents(examples) == EXPECTED
    assert [example.id for example in examples] == ["set.jsonl:2", "set.jsonl:3"]  # as in an editor


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    examples = load_examples(DataConfig(path=str(path)))
    assert contents(examples) == EXPECTED
    assert [example.id for example in examples] == ["set.parquet:1", "set.parquet:2"]


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-1.jsonl", RECORDS[:1])
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(RECORDS[1:]), tmp_path / "train-2.parquet"
    )
    write_jsonl(tmp_path / "test.jsonl", RECORDS[1:])
    (tmp_path / "LICENSE").write_text("MIT")
    assert contents(load_examples(DataConfig(path=str(tmp_path)))) == EXPECTED
    assert contents(load_examples(DataConfig(path=str(tmp_path), split="test"))) == EXPECTED[1:]
    expected = r"data\.split must start .* got 'dev' with test\.jsonl, train-1\.jsonl, train-2"
    with pytest.raises(FileNotFoundError, match=expected):
        load_examples(DataConfig(path=str(tmp_path), split="dev"))


def test_a_folder_without_splits_gives_all_its_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part-0.jsonl", RECORDS[:1])
    write_jsonl(tmp_path / "part-1.jsonl", RECORDS[1:])
    assert contents(load_examples(DataConfig(path=str(tmp_path)))) == EXPECTED


def test_a_hub_id_goes_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(records, "unreachable", str)  # the hub is there

    def load_dataset(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        calls.append((name, configuration, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert contents(load_examples(DataConfig(path="someone/set", split="test"))) == EXPECTED
    examples = load_examples(DataConfig(path="openai/gsm8k:main"))
    assert [example.id for example in examples] == ["openai/gsm8k:main:1", "openai/gsm8k:main:2"]
    assert calls == [("someone/set", None, "test"), ("openai/gsm8k", "main", "train")]


def test_numbers_of_32_bits_on_the_hub_are_decimals(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {"question": datasets.Value("string"), "answer": datasets.Value("float32")}
    rows = datasets.Dataset.from_list(
        [{"question": "1/10", "answer": 0.1}], features=datasets.Features(features)
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert [example.gold for example in load_examples(DataConfig(path="someone/set"))] == ["0.1"]


def test_a_hub_id_that_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, configuration: str | None, split: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"no {name} {configuration} {split}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(records, "unreachable", str)
    expected = r"data\.path must be .* 'train', got 'someone/sett': no someone/sett None train"
    with pytest.raises(ValueError, match=expected):
        load_examples(DataConfig(path="someone/sett"))
    monkeypatch.setattr(records, "unreachable", lambda: "X: no reply within 10 s")
    why = r"'someone/sett': the hub cannot be reached \(X: no reply within 10 s\), and its cache "
    with pytest.raises(ValueError, match=why + "has no such set: name a file"):
        load_examples(DataConfig(path="someone/sett"))


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (27.0, "27"),
        (-1.0, "-1"),
        (0.5, "0.5"),
        (1e22, "10000000000000000000000"),
        (12, "12"),
        ("025", "025"),
        (" 1,234 ", "1,234"),
        ("a #### b #### -3\n", "-3"),
    ],
)
def test_gold_answers_become_text(tmp_path: Path, value: float | str, answer: str) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [{"question": "?", "answer": value}])
    assert load_examples(DataConfig(path=str(path)))[0].gold == answer


def test_gold_answer_without_marker_is_the_text() -> None:
    assert gold_answer(" 18 # 4 ") == "18 # 4"


def test_the_only_box_of_a_worked_solution_holds_the_gold_answer() -> None:
    solution = "We see that $x > 1$. " * 80 + r"So $x = \boxed{\frac{1}{2}}$ of it."
    assert gold_answer(solution) == r"\frac{1}{2}"
    assert gold_answer(r"\boxed{5} is the sum #### 7") == "7"
    two = r"\boxed{5} or \boxed{7}"
    assert gold_answer(two) == two  # which one counts is not known: math refuses it


def test_columns_and_template_come_from_the_config(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [{"problem": "1 {x}", "gold": 1}])
    template = "Q: {prompt}\nAnswer in \\boxed{}."  # other braces stay as they are
    config = DataConfig(
        path=str(path), prompt_column="problem", answer_column="gold", prompt_template=template
    )
    assert load_examples(config) == [
        Example("set.jsonl:1", "Q: 1 {x}\nAnswer in \\boxed{}.", "1"),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?"}, r"data\.answer_column must be a column of set\.jsonl:2, which has"),
        ({"answer": "1"}, r"has \['answer'\], got 'question': name one of these"),
        ({"question": "?", "answer": None}, r"data\.answer_column 'answer' .* got None: correct"),
        ({"question": "?", "answer": float("nan")}, "must hold text or a number, got nan"),
        ({"question": "?", "answer": True}, "must hold text or a number, got True"),
        (
            {"question": "?", "answer": "so ####"},
            "must hold a gold answer, got 'so ####': correct",
        ),
        ({"question": " ", "answer": "1"}, r"data\.prompt_column 'question' .* got ' ': correct"),
        ({"question": ["?"], "answer": "1"}, r"or a list of messages, each with role .* got '\?'"),
        ({"question": {"a": 1}, "answer": "1"}, r"must hold text or a number, got \{'a': 1\}"),
        ({"question": "\ud800", "answer": "1"}, r"set\.jsonl:2 must be valid Unicode, got"),
        ([1], r"set\.jsonl:2 in .* must be a JSON object, got \[1\]"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, record: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "set.jsonl", [RECORDS[0], record])
    with pytest.raises(ValueError, match=message):
        load_examples(DataConfig(path=str(path)))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"question": 1', "Expecting ',' delimiter at column 15: correct the line"),
        (b'{"question": "\xff"}', "'utf-8' codec can't decode byte"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(json.dumps(RECORDS[0]).encode() + b"\n" + line)
    message = rf"set\.jsonl:2 in .* must be one JSON object in UTF-8, got {said}"
    with pytest.raises(ValueError, match=message):
        load_examples(DataConfig(path=str(path)))


def test_no_path_is_refused() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^data\.path must .* got nothing: set data\.path$"
    ):
        load_examples(DataConfig())


@pytest.mark.parametrize("name", ["set.jsonl", "set.parquet"])
def test_an_empty_set_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".jsonl":
        path.write_text("\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"question": [], "answer": []}), path)
    expected = rf"data\.path must hold at least one record, got 0 in .*{name}.*check the file"
    with pytest.raises(ValueError, match=expected):
        load_examples(DataConfig(path=str(path)))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")  # of `datasets`
    expected = r"'train' with no \.jsonl, \.json, \.csv or \.parquet file"
    with pytest.raises(FileNotFoundError, match=expected):
        load_examples(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("path", ["missing.jsonl", "/no/such/folder", "a/b/c"])
def test_a_missing_file_is_named(path: str) -> None:
    expected = rf"data\.path must be an existing .* got '{path}' \(looked in .*correct data\.path"
    with pytest.raises(FileNotFoundError, match=expected):
        load_examples(DataConfig(path=path))


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "set.txt"
    path.write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"must end in .* or \.parquet, got .*convert the"):
        load_examples(DataConfig(path=str(path)))


def test_a_template_without_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.prompt_template must contain \{prompt\}.*'Q:'"):
        load_examples(DataConfig(path="set.jsonl", prompt_template="Q:"))


@pytest.mark.parametrize(("n", "per_step"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 2)])
def test_every_example_once_per_epoch(n: int, per_step: int) -> None:
    steps = [step_indices(n, 0, step, per_step) for step in range(4 * n)]
    assert {len(indices) for indices in steps} == {per_step}
    order = [index for indices in steps for index in indices]
    epochs = [order[start : start + n] for start in range(0, len(order) - n + 1, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_the_order_is_a_function_of_seed_and_step() -> None:
    steps = [step_indices(100, 3, step, 8) for step in range(40)]
    assert [step_indices(100, 3, step, 8) for step in reversed(range(40))] == steps[::-1]
    assert step_indices(100, 3, 5, 8) == [9, 23, 59, 47, 92, 87, 5, 69]  # on any machine
    assert step_indices(100, 4, 5, 8) != steps[5]
    first, second = ([i for s in steps for i in s][e * 100 : e * 100 + 100] for e in (0, 1))
    assert first != second
    assert Counter(first) == Counter(second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 0, 1), "n_examples must be at least 1, got 0"),
        ((5, 0, 0, 0), "prompts_per_step must be at least 1, got 0"),
        ((5, 0, -1, 1), "step must be at least 0, got -1"),
    ],
)
def test_step_indices_refuses(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_indices(*arguments)


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<s>", "<unk>", "what", "is", "1", "be", "brief", "user", "system", "assistant"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)
EXAMPLE = Example("set.jsonl:7", "what is 1", "1")


def test_a_prompt_without_template_is_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(tokenizer, EXAMPLE, DataConfig()) == [0, 2, 3, 4]
    tokenizer.chat_template = TEMPLATE
    assert encode_prompt(tokenizer, EXAMPLE, DataConfig(chat_template=False)) == [0, 2, 3, 4]


def test_a_prompt_in_its_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    assert encode_prompt(tokenizer, EXAMPLE, DataConfig()) == [7, 2, 3, 4, 9]
    config = DataConfig(system_prompt="be brief")
    assert encode_prompt(tokenizer, EXAMPLE, config) == [8, 5, 6, 7, 2, 3, 4, 9]


def test_a_prompt_that_is_too_long_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(encode_prompt(tokenizer, EXAMPLE, DataConfig(max_prompt_tokens=4))) == 4
    expected = r"prompt set\.jsonl:7 must .* data\.max_prompt_tokens = 3 tokens, got 4: raise data"
    with pytest.raises(ValueError, match=expected):
        encode_prompt(tokenizer, EXAMPLE, DataConfig(max_prompt_tokens=3))


def test_all_prompts_are_encoded_to_see_which_are_too_long(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    texts = ["what is", "1", "what is 1 1", "is <s> 1"]  # 3, 2, 5 and 4 tokens with <s>
    examples = [Example(f"set.jsonl:{i}", text, "1") for i, text in enumerate(texts)]
    facts = encode_all(tokenizer, examples, DataConfig(max_prompt_tokens=4))
    assert (facts.count, facts.shortest, facts.longest, facts.too_long) == (3, 2, 4, [2])
    assert (facts.last, facts.started_twice) == (Counter({4: 2, 3: 1}), 1)
    assert facts.kept(examples) == [examples[0], examples[1], examples[3]]
    assert facts.left_out.startswith("1 of 4 problems are left out: ")
    assert facts.left_out.endswith("; the first is set.jsonl:2")
    assert encode_all(tokenizer, examples, DataConfig()).left_out is None
    half = encode_all(tokenizer, examples, DataConfig(max_prompt_tokens=3))
    assert half.too_long == [2, 3]
    expected = r"at least 50% of the problems, got 2, and 3 of 4 with longer prompts, set\.jsonl:0"
    with pytest.raises(PromptError, match=expected):
        encode_all(tokenizer, examples, DataConfig(max_prompt_tokens=2))


def test_a_hash_tells_problems_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    """By what is learnt and in which order, not by where it was read."""
    config = DataConfig(max_prompt_tokens=4)
    first, second = Example("a:1", "what", "1"), Example("a:2", "is 1", "2")
    long = Example("a:3", "what is 1 1", "3")

    def sha256(*examples: Example, config: DataConfig = config) -> str:
        return encode_all(tokenizer, list(examples), config).sha256

    same = sha256(first, second)
    assert sha256(replace(first, id="b:5"), replace(second, id="b:7")) == same
    assert sha256(first, long, second) == same  # it is left out
    others = [
        sha256(second, first),
        sha256(first),
        sha256(first, second, first),
        sha256(replace(first, gold="12"), replace(second, gold="")),
        sha256(replace(first, prompt="1"), second),
    ]
    tokenizer.chat_template = TEMPLATE
    others.append(sha256(first, second))
    assert sha256(first, second, config=replace(config, chat_template=False)) == same
    tokenizer.chat_template = TEMPLATE.replace("assistant", "user")
    others.append(sha256(first, second))
    for value in (True, False):
        arguments = {"enable_thinking": value}
        others.append(sha256(first, second, config=replace(config, template_arguments=arguments)))
    messages = ({"role": "user", "content": "what"},)
    others.append(sha256(replace(first, messages=messages), second))
    assert len({same, *others}) == 11


def test_the_prompt_at_which_a_template_fails_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "messages[0]['content']"
    tokenizer.chat_template = (
        f"{{% if '1' in {text} %}}{{{{ 1 // 0 }}}}{{% endif %}}{{{{ {text} }}}}"
    )
    examples = [Example("a:1", "what", "1"), Example("a:2", "is 1", "1")]
    with pytest.raises(PromptError, match=r"^prompt a:2: the chat template must render"):
        encode_all(tokenizer, examples, DataConfig())


def test_a_prompt_of_no_tokens_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(ValueError, match=r"prompt set\.jsonl:7 must have at least one token"):
        encode_prompt(tokenizer, EXAMPLE, DataConfig())


def test_a_system_prompt_needs_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    expected = r"data\.system_prompt must be None where no chat template is applied, got 'be brief'"
    with pytest.raises(ValueError, match=expected):
        encode_prompt(tokenizer, EXAMPLE, DataConfig(system_prompt="be brief"))

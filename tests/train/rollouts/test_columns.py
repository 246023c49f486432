"""columns: nested values by dotted names, as text and as messages."""

from typing import Any

import numpy as np
import pytest

from kdrl_train.rollouts.columns import column_names, column_value, plain, text_of

RECORD = {
    "reward_model": {"ground_truth": "7", "a.b": {"c": 1}},
    "reward_model.style": "literal",
    "answers": [{"text": "x"}, 5],
    "x": {"y": 0},
    "x.y": {"z": 2},
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("answers", RECORD["answers"]),
        ("reward_model.ground_truth", "7"),
        ("reward_model.style", "literal"),
        ("reward_model.a.b.c", 1),
        ("answers.0.text", "x"),
        ("answers.1", 5),
        ("x.y", {"z": 2}),  # a name that holds the dots comes first
        ("x.y.z", 2),
    ],
)
def test_dots_lead_into_nested_columns(key: str, value: Any) -> None:
    assert column_value(RECORD, key) == value


@pytest.mark.parametrize(
    "key", ["", "reward_model.", "answers.2", "answers.-1", "x.y.q", "b.a", "."]
)
def test_a_column_that_is_not_there_is_a_key_error(key: str) -> None:
    with pytest.raises(KeyError):
        column_value(RECORD, key)


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    with pytest.raises(ValueError, match=r"must be a column of set:1, which has \['x', 'x\.y'\], "):
        text_of("set:1", {"x": {"y": 0}}, "data.answer_column", "y")
    assert column_names(RECORD)[2:4] == ["reward_model.a.b", "reward_model.a.b.c"]


def test_values_become_plain() -> None:
    arrays = {"a": np.array([[1, 2]]), "b": (np.float32(0.5), None), 3: "x"}
    assert plain(arrays) == {"a": [[1, 2]], "b": [0.5, None], "3": "x"}


@pytest.mark.parametrize("value", ["nan", " NaN\n", "<NA>", " "])
def test_what_programs_write_for_a_missing_value_is_no_text(value: str) -> None:
    """A .csv file of pandas has it, and `math` would read it as a word that is never right."""
    with pytest.raises(ValueError, match=r"^k 'a' of set:1 must hold text or a number, got '"):
        text_of("set:1", {"a": value}, "k", "a")
    assert text_of("set:1", {"a": "Nan"}, "k", "a") == "Nan"


@pytest.mark.parametrize("value", [1e23, 2.0**61])
def test_a_float_that_may_stand_for_another_whole_number_is_refused(value: float) -> None:
    """10^23 has no float: the next one is 99999999999999991611392."""
    with pytest.raises(ValueError, match=rf"^k 'a' of set:1 must hold .* rounds to {int(value)}: "):
        text_of("set:1", {"a": value}, "k", "a")
    assert text_of("set:1", {"a": 1e22}, "k", "a") == "1" + "0" * 22
    assert text_of("set:1", {"a": int(value)}, "k", "a") == str(int(value))

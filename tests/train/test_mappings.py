"""Settings that map names to values: in a file, as an option, and what is refused."""

from dataclasses import field
from pathlib import Path

import pytest

from kdrl_train import cli
from kdrl_train.config_file import load_yaml, save_yaml, update
from kdrl_train.settings import PositiveInt, settings


@settings
class Part:
    """A value of a mapping."""

    size: PositiveInt = 1
    """Its size."""


@settings
class Whole:
    """Settings with mappings."""

    words: dict[str, str] = field(default_factory=dict)
    """Names and words."""
    parts: dict[str, Part] = field(default_factory=dict)
    """Names and parts."""
    part: Part | None = None
    """A part, or none."""


def parse(*options: str) -> Whole:
    return cli.parse(Whole(), options, "whole", "does nothing")


def test_a_mapping_is_read_from_files_and_options(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    whole = parse("--words", "{a: x, b: 'http://y:1'}", "--parts", "{c: {size: 3}, d: {}}")
    assert whole == Whole(
        words={"a": "x", "b": "http://y:1"}, parts={"c": Part(size=3), "d": Part()}
    )
    save_yaml(whole, file)
    assert update(Whole(), load_yaml(file)) == whole == parse("--config", str(file))
    other = parse("--config", str(file), "--words", "{b: z}")  # the whole mapping is replaced
    assert other == Whole(words={"b": "z"}, parts=whole.parts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("words: {a: 1}", r"^words\.a must be a valid string, got 1$"),
        ("words: {1: a}", r"^words\[1\] must have names as keys, got 1$"),
        ("parts: {a: 3}", r"^parts\.a must hold keys and values, got 3$"),
        ("parts: {a: {size: 0}}", r"^parts\.a\.size must be at least 1, got 0$"),
        (
            "parts: {a: {siz: 1}}",
            r"^unknown key parts\.a\.siz \(did you mean size\?\); parts\.a has",
        ),
        ("part: {siz: 1}", r"^unknown key part\.siz \(did you mean size\?\); part has size$"),
    ],
)
def test_a_wrong_mapping_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        parse("--config", str(file))


@pytest.mark.parametrize("text", ["[a]", "a", "{a: 1, a: 2}", "{a: &b 1, c: *b}", "{a"])
def test_an_option_must_be_a_mapping(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--words", text)
    assert stop.value.code == 2
    assert "Error parsing --words" in capsys.readouterr().err

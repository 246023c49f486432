"""README: its records are read, its reward runs, and its settings exist."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import kdrl_train
from kdrl_train.config import DataConfig, RewardConfig, TrainConfig
from kdrl_train.rollouts.problems import load_examples
from kdrl_train.rollouts.verifier import Verifier

ROOT = Path(kdrl_train.__file__).parent
READMES = (ROOT / "rollouts" / "README.md", ROOT / "model" / "teacher" / "README.md")
SETTING = re.compile(
    r"\b(?:data|sampling|engine|reward|method|model|teacher)\.(?!py\b|json\b)[a-z_-]+"
)


def block(language: str) -> str:
    """Return the one block of a language in the README of the rollouts."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", READMES[0].read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 1
    return blocks[0]


def test_the_records_are_read(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(block("json"), encoding="utf-8")
    examples = load_examples(DataConfig(path=str(path)))
    assert [example.gold for example in examples] == ["2", "3", r"\frac{1}{6}"]


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verifier]:
    """Write the README's reward to a file, and open a Verifier that uses it."""
    (tmp_path / "json_reward.py").write_text(block("python"), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with Verifier(RewardConfig(function="json_reward:reward", workers=1)) as opened:
        yield opened


def test_the_reward_runs(verifier: Verifier) -> None:
    completions = ['{"answer": 6}', '{"answer": "7"}', "6", "{}"]
    verdicts = verifier.score(completions, ["6"] * 4)
    assert verdicts.rewards == [1.0, 0.0, 0.0, 0.0]
    assert verdicts.outcomes == ["right", "wrong", "unparseable", "unparseable"]
    assert verdicts.answers == ["6", "7", None, None]
    assert not any(math.isnan(reward) for reward in verdicts.rewards)


@pytest.mark.parametrize("readme", READMES, ids=["rollouts", "teacher"])
def test_the_settings_exist(readme: Path) -> None:
    text = re.sub(r"^```python.*?^```$", "", readme.read_text("utf-8"), flags=re.M | re.S)
    names = set(SETTING.findall(text))
    assert len(names) >= 8
    for name in names:
        value: object = TrainConfig()
        for part in name.split("."):
            assert hasattr(value, part.replace("-", "_")), name
            value = getattr(value, part.replace("-", "_"))

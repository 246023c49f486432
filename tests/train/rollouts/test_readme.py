"""README: its records are read and its reward runs; the settings in all of them exist."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import kdrl_train
from kdrl_train.config import DataConfig, RewardConfig, TrainConfig
from kdrl_train.config_file import update
from kdrl_train.rollouts.problems import load_examples
from kdrl_train.rollouts.rewards import call, load_reward
from kdrl_train.rollouts.verifier import Verifier

ROOT = Path(kdrl_train.__file__).parent
README = ROOT / "rollouts" / "README.md"
READMES = sorted(ROOT.rglob("*.md"))
SECTIONS = "data|sampling|engine|reward|method|optim|model|teacher|log|ranks"
SETTING = re.compile(
    rf"(?<![\w./-])(?:--)?((?:{SECTIONS})\.(?!py\b|json\b|yaml\b)[a-z_-]+(?:\.[a-z_-]+)*)"
)


def block(language: str, place: int = 0, count: int = 1) -> str:
    """Return one of the blocks of a language in the README of the rollouts; there are `count`."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == count
    return blocks[place]


def test_the_records_are_read(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(block("json"), encoding="utf-8")
    examples = load_examples(DataConfig(path=str(path)))
    assert [example.gold for example in examples] == ["2", "3", r"\frac{1}{6}"]


@pytest.fixture
def verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Verifier]:
    """Write the README's reward to a file, and open a Verifier that uses it."""
    (tmp_path / "json_reward.py").write_text(block("python", 0, 2), encoding="utf-8")
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


def test_a_reward_of_trl_is_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = "def their_reward(prompts, completions, level, **kwargs):\n"
    theirs += "    return [level[0] * (completions[0] in prompts[0]) for _ in completions]\n"
    (tmp_path / "theirs.py").write_text(theirs, encoding="utf-8")
    (tmp_path / "trl_reward.py").write_text(block("python", 1, 2), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward("trl_reward:reward")
    inputs = {"completion": "a", "prompt": "abc", "columns": {"level": 3, "answer": "5"}}
    assert call(reward, inputs) == 3


def test_several_rewards_are_settings() -> None:
    reward = update(TrainConfig(), yaml.safe_load(block("yaml"))).reward
    assert [(part.label, part.weight) for part in reward.parts] == [("math", 1.0), ("format", 0.1)]
    assert (reward.overlong_buffer, reward.overlong_penalty) == (256, 0.5)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_settings_exist(readme: Path) -> None:
    text = re.sub(r"^```python.*?^```$", "", readme.read_text("utf-8"), flags=re.M | re.S)
    for name in set(SETTING.findall(text)):
        value: object = TrainConfig()
        for part in name.split("."):
            attribute = part.replace("-", "_").removeprefix("no_")  # --model.lora.no-merge
            assert hasattr(value, attribute), name
            value = getattr(value, attribute)

"""The READMEs: the size of the first one, its example, its command, its data, and every link."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from kdrl_train.cli import parse
from kdrl_train.commands import COMMANDS
from kdrl_train.config import DataConfig, TrainConfig
from kdrl_train.rollouts.problems import load_examples

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = sorted(
    path for path in ROOT.rglob("*.md") if not {"runs", ".venv", "build"} & {*path.parts}
)


def blocks(language: str) -> list[str]:
    """Read the code blocks of the first README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_readme_is_short() -> None:
    assert len(README.encode()) <= 9_000


def prose(path: Path) -> str:
    """Read a README without its code blocks."""
    return re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Name the headings of a README as GitHub does in links: small, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[tuple[Path, str]]:
    """Return the file and the heading of each link that stays in the repository."""
    targets = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", prose(path))
    return [(path.parent / file if file else path, to) for file, to in targets if "://" not in file]


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path: Path) -> None:
    broken = [(str(file), to) for file, to in links(path) if not file.exists()]
    broken += [
        (str(file), to)
        for file, to in links(path)
        if to and file.suffix == ".md" and file.exists() and to not in anchors(file)
    ]
    assert broken == []


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = blocks("python")
    names: dict[str, torch.Tensor] = {}
    exec(code, names)
    assert names["hidden"].grad.abs().max() > 0
    assert "kd_flip_fraction" in capsys.readouterr().out


def test_the_problems_are_read(tmp_path: Path) -> None:
    (lines,) = blocks("json")
    path = tmp_path / "problems.jsonl"
    path.write_text(lines, encoding="utf-8")
    golds = [example.gold for example in load_examples(DataConfig(path=str(path)))]
    assert golds == ["72", r"\frac{5}{6}"]


def test_the_training_command_is_accepted() -> None:
    (command,) = [block for block in blocks("bash") if "torchrun" in block]
    words = shlex.split(command.replace("\\\n", " "))
    options = words[words.index("train") + 1 :]
    config = parse(TrainConfig(), options, "train", COMMANDS["train"].help)
    assert config.method.kd_coef.kind == "linear"
    assert "7B" in str(config.model.teacher)

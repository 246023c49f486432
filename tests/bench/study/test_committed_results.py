"""Tests that the committed write-up of the study is what its results.json gives."""

import re
from pathlib import Path

import pytest

from bench.study import write_up

BENCH = Path(__file__).parents[3] / "bench"
FOLDERS = [BENCH / "results" / name for name in ("study", "study-sketch", "study-successors")]


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_committed_tables_are_those_of_the_committed_results(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_bytes((folder / "results.json").read_bytes())
    write_up.again(tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == (folder / "README.md").read_text("utf-8")
    plots = {path.name for path in tmp_path.glob("*.svg")}
    assert plots == {path.name for path in folder.glob("*.svg")}


def test_every_interval_of_the_readme_is_in_the_committed_tables() -> None:
    text = (BENCH / "study/README.md").read_text("utf-8")
    table = "".join((folder / "README.md").read_text("utf-8") for folder in FOLDERS)
    mean = r"[-+]?\d+\.\d+"
    intervals = re.findall(rf"{mean} \({mean}(?:-| to ){mean}\)", " ".join(text.split()))
    assert len(intervals) > 30
    assert [interval for interval in intervals if interval not in table] == []

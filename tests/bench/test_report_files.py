"""Tests the files of the report: a page that loads nothing, plots, tables, and what is dropped."""

import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

import bench.reporting
from bench import report
from bench.reporting import figures, page
from bench.results_file import OURS
from bench.shapes import CPU_SMALL, Shape
from tests.bench.test_report import (
    FLOOR_MS,
    ROOT,
    make_run,
    save,
    scaled,
    speed,
)


class Loads(HTMLParser):
    """A parser that collects what a page loads, and checks that every open tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    run = make_run()
    run["records"][4]["status"] = "failed: <script>alert(1)</script>"
    (tmp_path / "time.png").write_bytes(b"PNG")
    text = page.as_html(page.make(run), tmp_path)
    parser = Loads()
    parser.feed(text)
    assert parser.open == []
    assert [load for load in parser.loads if not load.startswith("#")] == [
        "data:image/png;base64,UE5H"
    ]
    for token in ("<script", "<link", "@import", "url(", "http:", "https:"):
        assert token not in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def _images(text: str) -> int:
    return text.count("data:image/png;base64,iVBOR")


def test_writes_all_files_and_drops_old_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run()
    run["records"] += scaled(OURS, "N", 1.0) + scaled("slow", "V", 1.0)
    text = report.write(save(run, tmp_path))
    plots = ["time.png", "memory.png", "accuracy.png", "scaling.png"]
    names = ["short.md", "table.md", *plots, "report.html"]
    assert text.endswith(f"{tmp_path}: {', '.join(names)}")
    assert "| GRPO | 220 | 200 |" in text
    assert all((tmp_path / name).stat().st_size for name in names)
    assert _images((tmp_path / "report.html").read_text()) == 4
    for name in plots:
        header = (tmp_path / name).read_bytes()[:24]
        assert int.from_bytes(header[16:20], "big") <= 1600  # wide
    report.write(save(make_run(), tmp_path))
    assert not (tmp_path / "scaling.png").exists()
    assert _images((tmp_path / "report.html").read_text()) == 3


def test_without_matplotlib_there_are_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("axes", "curves", "plots"):
        monkeypatch.delitem(sys.modules, f"bench.reporting.{name}", raising=False)
        monkeypatch.delattr(bench.reporting, name, raising=False)
    assert "matplotlib is not installed: no plots" in report.write(save(make_run(), tmp_path))
    assert "**220 (165-330)**" in (tmp_path / "table.md").read_text()
    assert _images((tmp_path / "report.html").read_text()) == 0


def _tick_distances(limits: tuple[float, float], apart: float) -> list[float]:
    axes = pytest.importorskip("bench.reporting.axes", exc_type=ImportError)
    ticks = axes.log_ticks(limits, apart)
    assert len(ticks) >= 2
    span = math.log(limits[1] / limits[0])
    return [math.log(b / a) / span for a, b in pairwise(ticks)]


@pytest.mark.parametrize("limits", [(90.0, 110.0), (700.0, 2300.0), (1e-9, 3e-2), (0.1, 2e5)])
def test_tick_labels_never_touch(limits: tuple[float, float]) -> None:
    assert min(_tick_distances(limits, 0.2)) >= 0.2


def test_plots_show_the_shape_with_the_most_records() -> None:
    run = make_run()
    small: Shape = replace(CPU_SMALL, N=64)
    run["records"] = [speed(OURS, FLOOR_MS, shape=small), *run["records"]]
    assert [group.shape for group in figures.groups(run)] == ["cpu", "cpu-small"]


@pytest.mark.parametrize(
    "how",
    [["bench/report.py"], pytest.param(["-m", "bench.report"], marks=pytest.mark.slow)],
    ids=["file", "-m"],
)
def test_command_runs_from_the_repository(how: list[str], tmp_path: Path) -> None:
    folder = save(make_run(), tmp_path)
    done = subprocess.run(
        [sys.executable, *how, str(folder), "--short"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| GRPO | 220 | 200 | 1.10 | 1.15 | fast | 198 | 0.90 ▼ | 50.0 | 400 |" in done.stdout
    assert [path.name for path in folder.iterdir()] == ["results.json"]

"""report in a real browser: an empty console, nothing wider than a phone, both colour schemes."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kdrl_train.tools.report import Figure, Note, Table, charts, write
from tests.train.run_folders import record, run_folder, sample

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs chromium or google-chrome")
FRAME = """<!doctype html><iframe id="f" src="report.html"
style="border:0;height:2000px;width:{}px"></iframe><script>
f.onload = () => setTimeout(() => {{
  const d = f.contentDocument, root = d.documentElement, w = root.clientWidth;
  d.querySelectorAll("details").forEach(one => one.open = true);
  const inside = e => e.closest(".scroll, svg, .skip");
  const wide = [...d.body.querySelectorAll("*")].filter(e => !inside(e) &&
    e.getBoundingClientRect().right > w + 1).map(e => e.tagName + "." + e.className);
  const small = [...d.querySelectorAll("figure svg")].map(e => e.getBoundingClientRect().width);
  document.title = "MEASURED" + JSON.stringify({{
    width: w, scroll: root.scrollWidth, wide: wide.slice(0, 5), narrowest: Math.min(...small),
    page: getComputedStyle(d.body).backgroundColor, ink: getComputedStyle(d.body).color,
    sheets: d.styleSheets.length, charts: small.length,
  }}) + "END";
}}, 200);
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes report.html with long names, long words, many steps and every kind of block."""
    root = tmp_path_factory.mktemp("browser")
    groups = {}
    for i, name in enumerate(("grpo", "an_arm_with_quite_a_long_name_without_any_space_in_it")):
        records = [record(step, seed=i, level=0.1 * i) for step in range(400)]
        lines = {0: [sample(0)], 399: [sample(399, completion="x" * 999, token_chars=None)]}
        groups[name] = [run_folder(root / f"{name}-s0", records, samples=lines)]
    svg = charts.point_chart([charts.Point("kdrl", 0.5, 0.4, 0.6)], title="avg@4")
    extra = [Note("w" * 300), Table("t", ["a" * 90, "b" * 90], [["c" * 90, 1.0]]), Figure("f", svg)]
    write(groups, root / "report.html", title="A title " + "y" * 80, extra=extra)
    return root


def browse(folder: Path, page: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Opens a page; what it has on its console goes to stderr."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=5000", f"--user-data-dir={folder / 'profile'}"]
    command += [*more, (folder / page).as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measure(folder: Path, width: int, *more: str) -> dict[str, Any]:
    """Measures the page in a frame that is `width` pixels wide."""
    (folder / "frame.html").write_text(FRAME.format(width), encoding="utf-8")
    done = browse(folder, "frame.html", "--dump-dom", *more)
    assert "CONSOLE" not in done.stderr
    (measured,) = re.findall(r"<title>MEASURED(.*)END</title>", done.stdout)
    return json.loads(measured)


def brightness(color: str) -> float:
    return sum(map(int, re.findall(r"\d+", color)[:3])) / 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_both_schemes(folder: Path, scheme: str) -> None:
    more = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    measured = measure(folder, 360, *more)
    assert measured["width"] == 360
    assert measured["scroll"] == 360, measured["wide"]
    assert measured["wide"] == []
    assert measured["sheets"] == 1
    assert measured["charts"] > 15
    assert measured["narrowest"] >= 300  # text of 11 units is at least 9 pixels high
    page, ink = brightness(measured["page"]), brightness(measured["ink"])
    assert (page < 60 and ink > 200) if scheme == "dark" else (page > 240 and ink < 60)


def test_a_screenshot_shows_something(folder: Path) -> None:
    shot = folder / "shot.png"
    done = browse(folder, "report.html", f"--screenshot={shot}", "--window-size=1280,3000")
    assert "CONSOLE" not in done.stderr
    assert shot.stat().st_size > 100_000  # an empty page of this size has 15 kB

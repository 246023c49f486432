"""report: what the page says about invented runs, and that its HTML is correct."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from kdrl_train import cli
from kdrl_train.config import OptimConfig
from kdrl_train.tools.report import (
    Figure,
    Folded,
    Note,
    Table,
    by_settings,
    charts,
    token_colours,
    write,
)
from kdrl_train.tools.report.runs import RunGroup, read
from kdrl_train.tools.report.statistics import difference, final_interval, mean_interval
from tests.train.run_folders import record, run_folder, sample

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """Parses a page: texts, attributes, and that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, name: str) -> list[str]:
        return [value for _, key, value in self.attributes if key == name]


def check(path: Path) -> Page:
    """Parses a page and checks its links, ids, headings and charts."""
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    for name in ("href", "src"):
        assert all(v.startswith(("#", "data:")) for v in page.values(name))
    assert {v[1:] for v in page.values("href") if v.startswith("#")} <= set(ids)
    assert set(page.values("aria-labelledby")) <= set(ids)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert "@import" not in html
    assert not page.tags["script"]
    drawn = page.tags["svg"] - page.values("aria-hidden").count("true")
    assert html.count('role="img"') == html.count("<desc>") == drawn
    assert page.tags["h1"] == page.tags["main"] == 1
    headings = re.findall(r"<h2 id=", html)
    assert len(headings) == page.tags["section"]
    return page


@pytest.fixture
def arms(tmp_path: Path) -> dict[str, list[Path]]:
    """Writes grpo and kdrl, two seeds each; kdrl's reward is 0.2 and 0.3 higher."""
    folders: dict[str, list[Path]] = {"grpo": [], "kdrl": []}
    for seed in (0, 1):
        for name, level in (("grpo", 0.0), ("kdrl", 0.2 + 0.1 * seed)):
            records = [record(step, seed=0, level=level) for step in range(20)]
            lines = {step: [sample(step)] for step in (0, 10, 19)}
            optim = OptimConfig(learning_rate=1e-3 if name == "grpo" else 2e-3)
            folder = tmp_path / f"{name}-s{seed}"
            folders[name].append(run_folder(folder, records, seed=seed, samples=lines, optim=optim))
    return folders


def test_runs_that_differ_in_their_seed_are_one_group(arms: dict[str, list[Path]]) -> None:
    folders = [folder for runs in arms.values() for folder in runs]
    assert by_settings(folders) == arms
    with pytest.raises(ValueError, match="each run must be named once"):
        by_settings([folders[0], folders[0]])


def test_the_whole_page(arms: dict[str, list[Path]], tmp_path: Path) -> None:
    page = check(write(arms, tmp_path / "sub" / "report.html"))
    for words in (
        "learning_rate",
        "tokens per second",
        "teacher log-ratio l, last 10% of the steps",
        "verifier timeouts",
        "step 20",
        "Largest |l|",
    ):
        assert words.lower() in page.text.lower(), words
    assert "brand_new_number" in page.text  # a key that the report does not know
    assert "The same at every step of every run" in page.text
    settings = [t for t in page.texts if t == "optim.learning_rate"]
    assert len(settings) == 2  # what differs, and all settings
    assert "sampling.max_new_tokens" not in page.text.split("All settings")[0]


def test_differences_are_paired_by_seed(arms: dict[str, list[Path]], tmp_path: Path) -> None:
    groups = [
        RunGroup(name, i, [read(f) for f in runs]) for i, (name, runs) in enumerate(arms.items())
    ]
    paired = difference(*groups, "reward")
    assert paired.count == 2
    assert paired.value == pytest.approx(0.25)
    half = 12.7062047 * 0.05  # t of one degree of freedom, times 0.1 / sqrt(2) / sqrt(2)
    assert (paired.low, paired.high) == pytest.approx((0.25 - half, 0.25 + half))
    other = run_folder(tmp_path / "other", [record(s, level=0.5) for s in range(20)], seed=7)
    unpaired = difference(groups[0], RunGroup("other", 2, [read(other)]), "reward")
    assert unpaired.value == pytest.approx(0.5)
    assert (unpaired.low, unpaired.count) == (None, 0)


def test_intervals_by_hand() -> None:
    mean = mean_interval([1.0, 2.0, 3.0])
    assert (mean.value, mean.count) == (2.0, 3)
    assert mean.high == pytest.approx(2 + 4.303 / 3**0.5, rel=1e-3)
    assert mean_interval([]).value is None
    assert mean_interval([5.0]).low is None


def test_one_run_has_the_interval_of_its_evaluation(tmp_path: Path) -> None:
    records = [record(0), record(1) | {f"eval_avg_at_k{end}": v for end, v in EVALUATION.items()}]
    group = RunGroup("a", 0, [read(run_folder(tmp_path / "a", records))])
    mean = final_interval(group, "eval_avg_at_k")
    assert (mean.value, mean.low, mean.high) == (0.5, 0.4, 0.6)


def test_sets_are_drawn_and_tabled_beside_the_first_one(tmp_path: Path) -> None:
    records = [record(step) for step in range(3)]
    for step, low in ((0, 0.1), (2, 0.2)):
        for key in ("eval_avg_at_k", "eval/aime/avg_at_k"):
            scores = {f"{key}{end}": v + low for end, v in EVALUATION.items()}
            records[step] |= scores | {"eval/aime/length": 9.0 + step}
    runs = {"a": [run_folder(tmp_path / "a", records)]}
    page = check(write(runs, tmp_path / "r.html"))
    assert "held-out avg@k: aime" in page.text
    assert "held-out response length, tokens: aime" in page.text
    assert "avg@k: aime" in page.text
    assert "eval/aime" not in page.text  # as a number that the report does not know
    mean = final_interval(RunGroup("a", 0, [read(tmp_path / "a")]), "eval/aime/avg_at_k")
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.7, 0.6, 0.8))


EVALUATION = {"": 0.5, "_low": 0.4, "_high": 0.6}


def test_the_noise_of_a_sketch_is_drawn_and_tabled(tmp_path: Path) -> None:
    records = [record(s) | {"sketch_noise": 0.01 * s, "sketch_entries": 12.0 + s} for s in (1, 2)]
    page = check(write({"a": [run_folder(tmp_path / "a", records)]}, tmp_path / "r.html"))
    assert "noise of the sketch" in page.text
    assert "relative noise of the sketched gradient" in page.text
    assert "entries of the sketch a token" in page.text
    assert "0.1 is normal and adds 1%" in page.text
    plain = check(write({"a": [run_folder(tmp_path / "b", [record(0)])]}, tmp_path / "p.html"))
    assert "of the sketch" not in plain.text


@pytest.mark.parametrize("steps", [0, 1])
def test_a_run_that_has_just_begun(steps: int, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [record(step) for step in range(steps)], steps=10)
    page = check(write({"run": [folder]}, tmp_path / "report.html"))
    assert f"{steps} of 10" in page.text
    assert "no end recorded: still running, or killed" in page.text
    assert ("No steps yet." in page.text) == (steps == 0)


def test_without_a_teacher_nothing_about_it_is_drawn(tmp_path: Path) -> None:
    records = [record(step, teacher=False) for step in range(5)]
    lines = {0: [sample(0, teacher_log_ratio=None, kd_weight=0.0)]}
    folder = run_folder(tmp_path / "run", records, samples=lines)
    page = check(write({"run": [folder]}, tmp_path / "report.html"))
    assert "KL to the teacher, nats per token" not in page.text
    assert "Largest |l|" not in page.text
    assert not re.search(r'class="[pn][123]', (tmp_path / "report.html").read_text("utf-8"))


def test_null_interrupts_a_line_and_is_counted(tmp_path: Path) -> None:
    records = [record(step) for step in range(9)]
    records[4]["loss"] = None
    records[5]["loss"] = float("nan")
    path = write({"run": [run_folder(tmp_path / "run", records)]}, tmp_path / "report.html")
    page = check(path)
    assert "loss is null (was not finite)" in page.text
    chart = path.read_text("utf-8").split("<title>loss</title>")[1].split("</svg>")[0]
    assert chart.count("<polyline") == 2


def test_a_crash_is_shown(tmp_path: Path) -> None:
    events = [
        {"time": "2026-01-01T00:00:00+00:00", "step": 0, "event": "started", "message": "go"},
        {"time": "2026-01-01T00:01:00+00:00", "step": 7, "event": "teacher", "message": "away"},
        {"time": "2026-01-01T00:02:00+00:00", "step": 5, "event": "resumed", "dropped": 2},
        {"time": "2026-01-01T00:03:00+00:00", "step": 6, "event": "failed", "message": "Boom: <b>"},
    ]
    folder = run_folder(tmp_path / "run", [record(s) for s in range(6)], steps=50, events=events)
    text = check(write({"run": [folder]}, tmp_path / "report.html")).text
    assert "6 of 50 failed" in text
    assert "away (a resume dropped this step)" in text
    assert "2 steps after the checkpoint were dropped" in text
    assert "Boom: <b>" in text


def test_what_models_wrote_is_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)></p>"
    lines = {
        0: [sample(0, completion=evil, prompt=evil, answer=evil, token_chars=[9, len(evil) - 9])]
    }
    folder = run_folder(tmp_path / "evil", [record(0)], samples=lines)
    extra = [Note(evil, evil), Table(evil, [evil], [[evil]], evil)]
    page = check(write({evil: [folder]}, tmp_path / "r.html", title=evil, extra=extra))
    assert not page.tags["img"]
    assert not page.values("onerror")
    assert page.texts.count(evil[:9]) == 1  # the first token


def test_tokens_joined_are_the_text(tmp_path: Path) -> None:
    long = "ab" * 900
    lines = [sample(0), sample(0, prompt="long", completion=long, token_chars=[2] * 900)]
    lines += [sample(0, prompt="uncut", token_chars=None)]
    path = write(
        {"a": [run_folder(tmp_path / "a", [record(0)], samples={0: lines})]}, tmp_path / "r"
    )
    shown = re.findall(r'<p class="tokens">(.*?)</p>', path.read_text("utf-8"), re.DOTALL)
    assert [re.sub("<[^>]*>", "", one) for one in shown] == ["1+2=3 ü", long, "1+2=3 ü"]
    first = re.findall(r'<span class="(.*?)" title="(.*?)">', shown[0], re.DOTALL)
    # push = 0.6 - 0.3 l: 0.585, 0.69, 0.3, -0.3, then A alone, then 1.8
    assert [c for c, _ in first] == ["u2", "n1 u2", "p2 u1", "p3 d1", "u2 empty", "n3 u2"]
    assert "l +3\nA +0.6\npush -0.3" in first[3][1]


def test_the_colour_of_a_sample_is_its_verdict() -> None:
    lines = [sample(0, reward=0.1, outcome="wrong"), sample(0, reward=-1.0, outcome="right")]
    older = sample(0)
    del older["outcome"]
    shown = [token_colours.sample(line, "run", "k2") for line in [*lines, older]]
    assert [one.right for one in shown] == [False, True, True]


def test_extra_sections_come_first(arms: dict[str, list[Path]], tmp_path: Path) -> None:
    svg = charts.point_chart([charts.Point("kdrl", 0.5, 0.4, 0.6)], title="avg@4")
    table = Table("Answers", ["question", "number"], [["joint?", 0.123456], ["mask?", None]])
    extra = [table, Figure("", svg, "caption"), Folded("More", [Note("inside")])]
    page = check(write(arms, tmp_path / "r.html", title="Study", extra=extra))
    assert (
        page.text.index("Answers") < page.text.index("Runs grpo") if "Runs grpo" in page.text else 1
    )
    assert "0.123 mask? -" in page.text
    assert page.texts.index("Results") < page.texts.index("Runs")


def test_ten_thousand_steps(tmp_path: Path) -> None:
    records = [record(step) for step in range(10_000)]
    lines = {0: [sample(0)], 9_999: [sample(9_999)]}
    folders = [run_folder(tmp_path / "long", records, samples=lines)]
    start = time.process_time()
    path = write({"long": folders}, tmp_path / "report.html")
    assert time.process_time() - start < 3
    assert path.stat().st_size < 5e6
    assert "Each point is the mean of 67 steps." in check(path).text


def test_command(
    arms: dict[str, list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    folders = [str(folder) for runs in arms.values() for folder in runs]
    assert cli.main(["report", *folders, "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    assert "Difference from grpo" in check(out).text
    assert cli.main(["report", str(tmp_path), "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert f"got {tmp_path}, which has none; it holds the runs grpo-s0" in message
    assert cli.main(["report"]) == 1


@pytest.mark.parametrize("groups", [{}, {"a": []}])
def test_nothing_to_report_is_an_error(groups: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each group must have a run"):
        write(groups, tmp_path / "r.html")


def test_older_runs_have_fewer_files(tmp_path: Path, arms: dict[str, list[Path]]) -> None:
    """Reads samples without tokens and a run without events, as an older version left them."""
    names = ("step", "prompt", "completion", "answer", "reward", "tokens", "truncated")
    old = {name: sample(0)[name] for name in names}
    folder = run_folder(tmp_path / "old", [record(0)], samples={0: [old]})
    page = check(write({"old": [folder]} | arms, tmp_path / "r.html"))
    assert "1+2=3 ü" in page.texts


@pytest.mark.fault("flipped or cut file")
def test_a_damaged_row_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_folder(tmp_path / "run", [record(i) for i in range(6)], samples={5: [sample(5)]})
    for name, number in (("metrics.jsonl", 3), ("samples/step_000005.jsonl", 0)):
        lines = (folder / name).read_bytes().splitlines()
        lines[number] = lines[number][1:]
        (folder / name).write_bytes(b"\n".join(lines) + b"\n")
    out = tmp_path / "report.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert f"left out: line 4 of {folder / 'metrics.jsonl'} must be a record" in said
    assert "; 1 more" in said
    assert [one["step"] for one in read(folder).records] == [0, 1, 2, 4, 5]
    assert "6 of 6" in Page(out.read_text("utf-8")).text


ODD: tuple[Any, ...] = (None, "x", 10**400, -1, True, [], [1], {}, [None], [[1]], 1e308, "\x1b[31m")
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "metrics.jsonl": ("metrics.jsonl", {k: v for k, v in record(1).items() if k != "step"}),
    "samples": ("samples/step_000000.jsonl", sample(0)),
    "events": (
        "events.jsonl",
        {"time": "2026", "step": 1, "event": "resumed", "message": "m", "dropped": 1, "ranks": 2,
         "versions": {"torch": "2"}},
    ),
}  # fmt: skip


@pytest.mark.fault("flipped or cut file")
@pytest.mark.parametrize("kind", FILES)
def test_odd_values_are_left_out_and_named(
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    file, good = FILES[kind]
    keys = [key for key in good if key not in ("seconds_verify", "seconds_sync", "seconds_update")]
    rows = [{**good, key: value} for key in keys for value in ODD]
    rows += [{k: v for k, v in good.items() if k != key} for key in keys]
    record_property("tried", len(rows))
    if kind == "metrics.jsonl":
        rows = [{**row, "step": step} for step, row in enumerate(rows)]
    run = run_folder(tmp_path / "run", [record(0)], samples={0: [sample(0)]}, events=[])
    (run / "samples" / "step_x.jsonl").write_text("{}\n", encoding="utf-8")
    (run / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    check(write({"a": [run]}, tmp_path / "page.html"))
    error = capsys.readouterr().err
    assert re.search(rf"left out: a record of \S*{file}, whose '\w+' is wrong: .*; \d+ more", error)

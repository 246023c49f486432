"""Makes the sections of the page, except samples and events."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from kdrl_train.method.histogram import EDGES, LENGTH_INTERVALS
from kdrl_train.tools.report.blocks import Block, Cell, Figure, Folded, Legend, Note, Section, Table
from kdrl_train.tools.report.charts import (
    Bars,
    Reference,
    Series,
    histogram_chart,
    line_chart,
    stacked_chart,
)
from kdrl_train.tools.report.runs import APART, RunData, RunGroup
from kdrl_train.tools.report.statistics import (
    FINAL,
    MeanInterval,
    curve,
    difference,
    final,
    final_interval,
    steps_per_point,
)
from kdrl_train.tools.report.svg import number
from kdrl_train.tools.report.titles import CAPTIONS, CURVES, TABLED, base_of, with_names


def overview(groups: Sequence[RunGroup]) -> Section:
    """Lists the runs, how many steps they made, and how they ended."""
    lines = []
    for group in groups:
        for run in group.runs:
            resumes = sum(e.get("event") == "resumed" for e in run.events)
            total = run.settings.get("steps")
            done = f"{run.steps:,} of {total:,}" if isinstance(total, int) else f"{run.steps:,}"
            seed = "-" if run.seed is None else str(run.seed)
            lines.append([str(run.folder), group.name, seed, done, run.status, resumes])
    columns = ("run", "group", "seed", "steps done", "status", "resumes")
    note = "" if any(run.records for group in groups for run in group.runs) else "No steps yet."
    return Section("runs", "Runs", [Table("", columns, lines, note)])


def differences(groups: Sequence[RunGroup]) -> Section:
    """Shows final values, and how each group differs from the first one."""
    tabled = with_names(TABLED, _keys(groups))
    keys = [key for key in tabled if any(group.having(key) for group in groups)]
    if not keys:
        return Section("values", "Final values", [Note("No values yet.")])
    names = ["group", *(tabled[key] for key in keys)]
    lines = [[g.name, *(_interval(final_interval(g, key)) for key in keys)] for g in groups]
    note = (
        f"A run's value is the mean over the last {FINAL:.0%} of the steps that it made, or its "
        "last evaluation; a group's value is the mean over its runs. Brackets hold 95% intervals: "
        "Student's t over the runs, or, for the evaluation of a single run, a bootstrap over its "
        "problems."
    )
    blocks: list[Block] = [Table("", names, lines, note)]
    if len(groups) > 1:
        base = groups[0]
        lines = [
            [other.name, *(_paired(difference(base, other, key)) for key in keys)]
            for other in groups[1:]
        ]
        note = (
            "Means over pairs of runs with the same seed. Brackets hold the 95% t-interval and n, "
            "the number of pairs. With fewer than two pairs: difference of the means, no interval."
        )
        blocks.append(Table(f"Difference from {base.name}", names, lines, note))
    return Section("values", "Final values", blocks)


def _interval(mean: MeanInterval) -> str:
    if mean.low is None or mean.high is None:
        return number(mean.value)
    return f"{number(mean.value)}\n({number(mean.low)} to {number(mean.high)})"


def _paired(mean: MeanInterval) -> str:
    value = number(mean.value, sign="+")
    if mean.low is None or mean.high is None:
        return value
    bounds = f"{number(mean.low, sign='+')} to {number(mean.high, sign='+')}"
    return f"{value}\n({bounds}, n = {mean.count})"


def curves(groups: Sequence[RunGroup]) -> Section:
    """Draws every number of metrics.jsonl over the steps; lists those that never change."""
    every = steps_per_point(groups)
    several = any(len(group.runs) > 1 for group in groups)
    words = "Each point is one step." if every == 1 else f"Each point is the mean of {every} steps."
    if several:
        words += (
            " A line is the mean over the runs of a group; its band goes from the lowest to the "
            "highest run."
        )
    if every > 1:
        words += " The band of a single run goes from the lowest to the highest step of each point."
    blocks: list[Block] = [Note(words)]
    keys = _keys(groups)
    known = {key for part in CURVES.values() for key in with_names(part, keys)}
    rest = {k: k for k in keys if k not in known if not k.startswith(("seconds_", "tokens_per_s_"))}
    rest = {k: k for k in rest if not k.endswith(("_low", "_high")) and not _is_quantile(k)}
    for heading, named in CURVES.items():
        titles = with_names(named, keys)
        charts = [*_charts(groups, titles, every)]
        if heading == "Teacher":
            charts += _log_ratio_curves(groups, every)
        if charts:
            charts.sort(key=lambda block: block.kind != "figure")  # notes last
            blocks += [Note("", heading), Legend([g.name for g in groups]), *charts]
    charts = _charts(groups, rest, every)
    if charts:
        blocks.append(Folded("Other numbers", [Legend([g.name for g in groups]), *charts]))
    return Section("curves", "Curves", blocks)


def _keys(groups: Sequence[RunGroup]) -> list[str]:
    """Lists the keys of all runs, each once."""
    return list(dict.fromkeys(key for g in groups for run in g.runs for key in run.columns))


def _is_quantile(key: str) -> bool:
    return key.startswith("teacher_log_ratio_p")


def _charts(groups: Sequence[RunGroup], titles: dict[str, str], every: int) -> list[Block]:
    """Draws a figure for each key that some run has; a note lists keys that never change."""
    blocks: list[Block] = []
    constant = []
    for key, title in titles.items():
        series = [one for group in groups if (one := curve(group, key, every))]
        values = {y for one in series for y in (*one.y, *(one.low or ())) if y is not None}
        steps = {x for one in series for x in one.x}
        if len(values) == 1 and len(steps) > 1:
            constant.append(f"{title}: {number(values.pop())}")
        elif values:
            references = _mismatch_bounds(groups) if key == "sampler_mismatch_mean" else ()
            svg = line_chart(series, title=title, references=references, legend=False)
            blocks.append(Figure("", svg, CAPTIONS.get(base_of(key)[0], "")))
    if constant:
        blocks.append(Note(f"The same at every step of every run: {'; '.join(constant)}."))
    return blocks


def _mismatch_bounds(groups: Sequence[RunGroup]) -> list[Reference]:
    """Returns each value of engine.max_sampler_mismatch that a run has."""
    key = "engine.max_sampler_mismatch"
    values = {run.settings.get(key) for group in groups for run in group.runs}
    return [Reference(key, float(v)) for v in values if isinstance(v, (int, float))]


def _log_ratio_curves(groups: Sequence[RunGroup], every: int) -> list[Block]:
    """Draws quantiles of l: the median as a line, 10% to 90% as a band."""
    series = []
    for group in groups:
        parts = [curve(group, f"teacher_log_ratio_p{q}", every) for q in (10, 50, 90)]
        low, middle, high = parts
        if low and middle and high:
            series.append(Series(group.name, middle.x, middle.y, group.look, low.y, high.y))
    if not series:
        return []
    svg = line_chart(series, title="teacher log-ratio l = log p - log q, nats", legend=False)
    return [
        Figure(
            "",
            svg,
            "The line is the median over distilled tokens; the band holds 10% to 90% of them.",
        )
    ]


def settings(groups: Sequence[RunGroup]) -> Section:
    """Lists the settings that differ between the groups; folds all settings and versions."""
    runs = [run for group in groups for run in group.runs]
    keys = [k for k in dict.fromkeys(k for run in runs for k in run.settings) if k not in APART]
    names = [group.name for group in groups]
    differ: list[list[Cell]] = []
    for key in keys:
        values = {repr(run.settings.get(key, "absent")) for run in runs}
        if len(values) > 1:
            differ.append([key, *(_settings(group, key) for group in groups)])
    blocks: list[Block] = [Table("", ["setting", *names], differ)]
    if not differ:
        blocks = [Note(f"All settings are equal, apart from {', '.join(APART)}.")]
    every = [[key, *(_settings(group, key) for group in groups)] for key in keys]
    versions = _versions(runs)
    more: list[Block] = [Table("Settings", ["setting", *names], every)]
    if versions:
        more.insert(0, versions)
    blocks.append(Folded("All settings and versions", more))
    return Section("settings", "Settings that differ", blocks)


def _settings(group: RunGroup, key: str) -> str:
    values = dict.fromkeys(_plain(run.settings.get(key, "absent")) for run in group.runs)
    return " | ".join(values)


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _versions(runs: Sequence[RunData]) -> Table | None:
    """Lists the software versions of each run at its last start."""
    versions = {}
    for run in runs:
        starts = [event["versions"] for event in run.events if event.get("versions")]
        if starts:
            changed = len({repr(one) for one in starts}) > 1
            versions[f"{run.folder}{' (changed when it was resumed)' if changed else ''}"] = starts[
                -1
            ]
    if not versions:
        return None
    names = list(dict.fromkeys(name for one in versions.values() for name in one))
    lines = [[name, *(one.get(name, "-") for one in versions.values())] for name in names]
    return Table("Versions", ["package", *versions], lines)


def stages(groups: Sequence[RunGroup]) -> Section:
    """Shows the seconds of a step by stage."""
    bars, lines = [], []
    for group in groups:
        keys = [k for run in group.runs for k in run.columns if k.startswith("seconds_")]
        means = {}
        for key in dict.fromkeys(keys):
            means[key.removeprefix("seconds_")] = sum(_per_step(r, key) for r in group.runs) / len(
                [run for run in group.runs if run.records]
            )
        if means:
            bars.append((group.name, means))
            speeds = [v for run in group.runs if (v := final(run, "tokens_per_s")) is not None]
            speed = sum(speeds) / len(speeds) if speeds else None
            lines.append([group.name, *_filled(means, groups), sum(means.values()), speed])
    if not bars:
        return Section("stages", "Stage times", [Note("No steps yet.")])
    names = _stage_names(groups)
    columns = ["group", *(f"{name}, s" for name in names), "sum, s", "tokens/s"]
    note = "Means over all steps; the seconds of evaluations are spread over all steps too."
    svg = stacked_chart(bars, title="seconds per step", unit="s")
    return Section("stages", "Stage times", [Figure("", svg), Table("", columns, lines, note)])


def _stage_names(groups: Sequence[RunGroup]) -> list[str]:
    keys = [k for g in groups for run in g.runs for k in run.columns if k.startswith("seconds_")]
    return [key.removeprefix("seconds_") for key in dict.fromkeys(keys)]


def _filled(means: dict[str, float], groups: Sequence[RunGroup]) -> list[Cell]:
    return [means.get(name) for name in _stage_names(groups)]


def _per_step(run: RunData, key: str) -> float:
    """Returns the mean seconds of a stage over all steps, also those without the stage."""
    column = run.columns.get(key)
    return 0.0 if column is None else float(column.values.sum()) / len(run.records)


def histograms(groups: Sequence[RunGroup]) -> Section:
    """Draws the distributions of l and of response lengths, early and late in the runs."""
    log_ratios = [
        f"<{EDGES[0]:g}",
        *(f"{a:g}…{b:g}" for a, b in pairwise(EDGES)),
        f">{EDGES[-1]:g}",
    ]
    blocks = _early_and_late(
        groups, "teacher_log_ratio_counts", "teacher log-ratio l", "nats", log_ratios
    )
    longest = {run.settings.get("sampling.max_new_tokens") for g in groups for run in g.runs}
    most = longest.pop() if len(longest) == 1 else None
    unit = "tokens, up to" if isinstance(most, int) else "% of max_new_tokens, up to"
    most = most if isinstance(most, int) else 100
    lengths = [f"{most * (i + 1) / LENGTH_INTERVALS:.0f}" for i in range(LENGTH_INTERVALS)]
    blocks += _early_and_late(groups, "response_length_counts", "response length", unit, lengths)
    if not blocks:
        return Section("histograms", "Histograms", [Note("These runs recorded no histograms.")])
    legend = Legend([group.name for group in groups])
    note = Note(
        "l = log p - log q of distilled tokens, in intervals of different widths, and lengths of "
        "completions."
    )
    return Section("histograms", "Histograms", [note, legend, *blocks])


def _early_and_late(
    groups: Sequence[RunGroup], key: str, what: str, unit: str, labels: list[str]
) -> list[Block]:
    """Draws a histogram of the first and one of the last steps, if some run has the counts."""
    blocks: list[Block] = []
    for late in (False, True):
        bars = [one for group in groups if sum((one := _bars(group, key, late=late)).values)]
        if bars:
            title = f"{what}, {'last' if late else 'first'} {FINAL:.0%} of the steps"
            svg = histogram_chart(bars, labels, title=title, x_label=unit, legend=False)
            blocks.append(Figure("", svg))
    return blocks


def _bars(group: RunGroup, key: str, *, late: bool) -> Bars:
    parts = [counts for run in group.runs if (counts := run.counts(key, FINAL, late=late))]
    return Bars(group.name, [sum(counts) for counts in zip(*parts, strict=True)], group.look)

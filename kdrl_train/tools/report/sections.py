"""The sections of a page about runs, but for samples and events."""

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
from kdrl_train.tools.report.runs import APART, Group, RunData
from kdrl_train.tools.report.statistics import (
    FINAL,
    Estimate,
    curve,
    difference,
    estimate,
    final,
    width,
)
from kdrl_train.tools.report.svg import number

CURVES = {
    "Reward": {
        "reward": "reward, mean",
        "accuracy": "right completions, share",
        "eval_avg_at_k": "held-out avg@k",
        "eval_pass_at_k": "held-out pass@k",
        "eval_maj_at_k": "held-out maj@k",
        "groups_with_signal": "groups with signal, share",
    },
    "Teacher": {
        "kl_teacher": "KL to the teacher, nats per token",
        "k2": "k2 = l²/2, mean",
        "kd_coef": "beta (kd_coef)",
        "policy_coef": "weight of the policy gradient",
        "kd_share": "distilled tokens, share",
        "kd_flip_share": "tokens whose sign distillation turns, share",
        "rl_grad_norm": "norm of the policy gradient",
        "kd_grad_norm": "norm of the distillation gradient",
        "rl_kd_cosine": "cosine of the two gradients",
    },
    "Responses": {
        "response_length": "response length, tokens",
        "truncated": "cut at the limit, share",
        "entropy": "entropy, nats per token",
        "eval_length": "held-out response length, tokens",
        "eval_truncated": "held-out, cut at the limit, share",
    },
    "Optimisation": {
        "loss": "loss",
        "grad_norm": "gradient norm, before clipping",
        "clip_fraction": "clipped tokens, share",
        "learning_rate": "learning rate",
    },
    "Health": {
        "sampler_mismatch_mean": "engine gap, mean |Δ log p|, nats",
        "sampler_mismatch_max": "engine gap, largest",
        "sampler_weight_mean": "sampler correction, mean weight",
        "sampler_limited": "sampler correction, tokens at the bound, share",
        "verifier_timeout": "verifier timeouts",
        "verifier_unparseable": "unparseable answers",
        "verifier_error": "failed rewards",
        "tokens_per_s": "tokens per second",
        "seconds": "seconds per step",
        "peak_memory_bytes": "peak memory, bytes",
    },
}
"""Key of metrics.jsonl -> title, by heading."""
TABLED = {
    "eval_avg_at_k": "avg@k",
    "eval_pass_at_k": "pass@k",
    "accuracy": "right",
    "reward": "reward",
    "kl_teacher": "KL to teacher",
    "response_length": "length",
    "truncated": "cut",
    "entropy": "entropy",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
}


def overview(groups: Sequence[Group]) -> Section:
    """Which runs, how far they came, how they ended."""
    rows = []
    for group in groups:
        for run in group.runs:
            resumes = sum(e.get("event") == "resumed" for e in run.events)
            total = run.settings.get("steps")
            done = f"{run.steps:,} of {total:,}" if isinstance(total, int) else f"{run.steps:,}"
            seed = "-" if run.seed is None else str(run.seed)
            rows.append([str(run.folder), group.name, seed, done, run.status, resumes])
    columns = ("run", "group", "seed", "steps", "end", "resumes")
    note = "" if any(run.rows for group in groups for run in group.runs) else "No steps yet."
    return Section("runs", "Runs", [Table("", columns, rows, note)])


def differences(groups: Sequence[Group]) -> Section:
    """Final values, and how each group differs from the first one."""
    keys = [key for key in TABLED if any(group.having(key) for group in groups)]
    if not keys:
        return Section("values", "Final values", [Note("No values yet.")])
    names = ["group", *(TABLED[key] for key in keys)]
    rows = [[g.name, *(_estimated(estimate(g, key)) for key in keys)] for g in groups]
    note = (
        f"Means over the last {FINAL:.0%} of a run's own steps, however far it came; of its "
        "evaluations the last. Then the mean over the runs of a group. In brackets 95% "
        "intervals: t over runs; of one run, bootstrap over the held-out problems "
        "where it was evaluated."
    )
    blocks: list[Block] = [Table("", names, rows, note)]
    if len(groups) > 1:
        base = groups[0]
        rows = [
            [other.name, *(_paired(difference(base, other, key)) for key in keys)]
            for other in groups[1:]
        ]
        note = (
            "Means over pairs of runs with the same seed, in brackets their 95% t-interval and n, "
            "the number of pairs. Without two such pairs: difference of the means, no interval."
        )
        blocks.append(Table(f"Difference from {base.name}", names, rows, note))
    return Section("values", "Final values", blocks)


def _estimated(one: Estimate) -> str:
    if one.low is None or one.high is None:
        return number(one.value)
    return f"{number(one.value)}\n({number(one.low)} to {number(one.high)})"


def _paired(one: Estimate) -> str:
    value = number(one.value, sign="+")
    if one.low is None or one.high is None:
        return value
    bounds = f"{number(one.low, sign='+')} to {number(one.high, sign='+')}"
    return f"{value}\n({bounds}, n = {one.count})"


def curves(groups: Sequence[Group]) -> Section:
    """Every number of the rows over the steps, by heading; constants in words."""
    every = width(groups)
    several = any(len(group.runs) > 1 for group in groups)
    words = "Each point is one step." if every == 1 else f"Each point is the mean of {every} steps."
    if several:
        words += (
            " Lines are means over the seeds of a group, bands go from the lowest to the highest."
        )
    if every > 1:
        words += (
            " Of a single run, the band goes from its lowest to its highest step in each point."
        )
    blocks: list[Block] = [Note(words)]
    known = {key for part in CURVES.values() for key in part}
    others = [k for g in groups for r in g.runs for k in r.columns if k not in known]
    rest = {k: k for k in dict.fromkeys(others) if not k.startswith(("seconds_", "tokens_per_s_"))}
    rest = {k: k for k in rest if not k.endswith(("_low", "_high")) and not _is_quantile(k)}
    for heading, titles in CURVES.items():
        found = [*_charts(groups, titles, every)]
        if heading == "Teacher":
            found += _gap_curves(groups, every)
        if found:
            found.sort(key=lambda block: block.kind != "figure")  # figures side by side, notes last
            blocks += [Note("", heading), Legend([g.name for g in groups]), *found]
    found = _charts(groups, rest, every)
    if found:
        blocks.append(Folded("Other numbers", [Legend([g.name for g in groups]), *found]))
    return Section("curves", "Curves", blocks)


def _is_quantile(key: str) -> bool:
    return key.startswith("log_ratio_p")


def _charts(groups: Sequence[Group], titles: dict[str, str], every: int) -> list[Block]:
    """A figure for each key that some run has; those that never change in a note."""
    found: list[Block] = []
    constant = []
    for key, title in titles.items():
        series = [one for group in groups if (one := curve(group, key, every))]
        values = {y for one in series for y in (*one.y, *(one.low or ())) if y is not None}
        steps = {x for one in series for x in one.x}
        if len(values) == 1 and len(steps) > 1:
            constant.append(f"{title}: {number(values.pop())}")
        elif values:
            marks = _limits(groups) if key == "sampler_mismatch_mean" else ()
            svg = line_chart(series, title=title, references=marks, legend=False)
            found.append(Figure("", svg))
    if constant:
        found.append(Note(f"The same at every step of every run: {'; '.join(constant)}."))
    return found


def _limits(groups: Sequence[Group]) -> list[Reference]:
    """engine.max_sampler_mismatch where it is set."""
    key = "engine.max_sampler_mismatch"
    found = {run.settings.get(key) for group in groups for run in group.runs}
    return [Reference(key, float(v)) for v in found if isinstance(v, (int, float))]


def _gap_curves(groups: Sequence[Group], every: int) -> list[Block]:
    """Quantiles of l: the median as line, 10% to 90% as band."""
    series = []
    for group in groups:
        parts = [curve(group, f"teacher_log_ratio_p{q}", every) for q in (10, 50, 90)]
        low, middle, high = parts
        if low and middle and high:
            series.append(Series(group.name, middle.x, middle.y, group.look, low.y, high.y))
    if not series:
        return []
    svg = line_chart(series, title="gap l = log p - log q, nats", legend=False)
    return [Figure("", svg, "Line: median over tokens; band: from 10% to 90% of them.")]


def settings(groups: Sequence[Group]) -> Section:
    """What differs between the groups; all settings and versions on request."""
    runs = [run for group in groups for run in group.runs]
    keys = [k for k in dict.fromkeys(k for run in runs for k in run.settings) if k not in APART]
    names = [group.name for group in groups]
    differ: list[list[Cell]] = []
    for key in keys:
        found = {repr(run.settings.get(key, "absent")) for run in runs}
        if len(found) > 1:
            differ.append([key, *(_settings(group, key) for group in groups)])
    blocks: list[Block] = [Table("", ["setting", *names], differ)]
    if not differ:
        blocks = [Note(f"None but {', '.join(APART)}.")]
    every = [[key, *(_settings(group, key) for group in groups)] for key in keys]
    versions = _versions(runs)
    more: list[Block] = [Table("Settings", ["setting", *names], every)]
    if versions:
        more.insert(0, versions)
    blocks.append(Folded("All settings and versions", more))
    return Section("settings", "Settings that differ", blocks)


def _settings(group: Group, key: str) -> str:
    found = dict.fromkeys(_plain(run.settings.get(key, "absent")) for run in group.runs)
    return " | ".join(found)


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def _versions(runs: Sequence[RunData]) -> Table | None:
    """Software of each run, as of its last start."""
    found = {}
    for run in runs:
        starts = [event["versions"] for event in run.events if event.get("versions")]
        if starts:
            changed = len({repr(one) for one in starts}) > 1
            found[f"{run.folder}{' (changed when it was resumed)' if changed else ''}"] = starts[-1]
    if not found:
        return None
    names = list(dict.fromkeys(name for one in found.values() for name in one))
    rows = [[name, *(one.get(name, "-") for one in found.values())] for name in names]
    return Table("Versions", ["package", *found], rows)


def stages(groups: Sequence[Group]) -> Section:
    """Seconds of a step by stage."""
    bars, rows = [], []
    for group in groups:
        keys = [k for run in group.runs for k in run.columns if k.startswith("seconds_")]
        means = {}
        for key in dict.fromkeys(keys):
            means[key.removeprefix("seconds_")] = sum(_per_step(r, key) for r in group.runs) / len(
                [run for run in group.runs if run.rows]
            )
        if means:
            bars.append((group.name, means))
            speeds = [v for run in group.runs if (v := final(run, "tokens_per_s")) is not None]
            speed = sum(speeds) / len(speeds) if speeds else None
            rows.append([group.name, *_filled(means, groups), sum(means.values()), speed])
    if not bars:
        return Section("stages", "Stage times", [Note("No steps yet.")])
    names = _stage_names(groups)
    columns = ["group", *(f"{name}, s" for name in names), "sum, s", "tokens/s"]
    note = "Means over all steps; an evaluation's seconds are spread over the steps between two."
    svg = stacked_chart(bars, title="seconds per step", unit="s")
    return Section("stages", "Stage times", [Figure("", svg), Table("", columns, rows, note)])


def _stage_names(groups: Sequence[Group]) -> list[str]:
    keys = [k for g in groups for run in g.runs for k in run.columns if k.startswith("seconds_")]
    return [key.removeprefix("seconds_") for key in dict.fromkeys(keys)]


def _filled(means: dict[str, float], groups: Sequence[Group]) -> list[Cell]:
    return [means.get(name) for name in _stage_names(groups)]


def _per_step(run: RunData, key: str) -> float:
    """Seconds of a stage over all steps of a run, those without it included."""
    column = run.columns.get(key)
    return 0.0 if column is None else float(column.values.sum()) / len(run.rows)


def histograms(groups: Sequence[Group]) -> Section:
    """Distributions of l and of response lengths, early and late."""
    gaps = [f"<{EDGES[0]:g}", *(f"{a:g}…{b:g}" for a, b in pairwise(EDGES)), f">{EDGES[-1]:g}"]
    blocks = _early_and_late(groups, "teacher_log_ratio_counts", "gap l", "nats", gaps)
    limits = {run.settings.get("sampling.max_new_tokens") for g in groups for run in g.runs}
    most = limits.pop() if len(limits) == 1 else None
    unit = "tokens, up to" if isinstance(most, int) else "% of max_new_tokens, up to"
    most = most if isinstance(most, int) else 100
    lengths = [f"{most * (i + 1) / LENGTH_INTERVALS:.0f}" for i in range(LENGTH_INTERVALS)]
    blocks += _early_and_late(groups, "response_length_counts", "response length", unit, lengths)
    if not blocks:
        return Section("histograms", "Histograms", [Note("These runs have recorded none.")])
    legend = Legend([group.name for group in groups])
    note = Note(
        "l of distilled tokens; the bins of l are not equally wide. Lengths of completions."
    )
    return Section("histograms", "Histograms", [note, legend, *blocks])


def _early_and_late(
    groups: Sequence[Group], key: str, what: str, unit: str, labels: list[str]
) -> list[Block]:
    """A histogram of the first and one of the last steps; none where nobody has the counts."""
    blocks: list[Block] = []
    for late in (False, True):
        bars = [one for group in groups if sum((one := _bars(group, key, late=late)).values)]
        if bars:
            title = f"{what}, {'last' if late else 'first'} {FINAL:.0%} of the steps"
            svg = histogram_chart(bars, labels, title=title, x_label=unit, legend=False)
            blocks.append(Figure("", svg))
    return blocks


def _bars(group: Group, key: str, *, late: bool) -> Bars:
    parts = [counts for run in group.runs if (counts := run.counts(key, FINAL, late=late))]
    return Bars(group.name, [sum(counts) for counts in zip(*parts, strict=True)], group.look)

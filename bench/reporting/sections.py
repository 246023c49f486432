"""Makes the tables of the report from its figures."""

from collections.abc import Sequence
from itertools import product

from bench.ops import FLOOR
from bench.reporting.figures import (
    Line,
    ProviderFigures,
    ShapeFigures,
    ratios,
    samples,
    scaling,
    spread,
)
from bench.reporting.tables import (
    Cell,
    FigureTable,
    TableRow,
    describe,
    error,
    holds_less,
    is_less,
    kind_of,
    label,
    law,
    median,
    megabytes,
    misses,
    name_of,
    number,
    one_line,
    percent,
    quartiles,
    ratio_text,
    scientific,
    target,
    times,
)
from bench.results_file import BOTH_OURS, OURS, SKETCH, Record, Run

COLUMNS = (
    "provider",
    "total ms (quartiles)",
    "forward ms",
    "backward ms",
    "/ floor",
    "/ ours",
    "TFLOP/s",
    "share of floor",
    "tokens/s",
    "extra MB",
    "log-prob error max",
    "99.9%",
    "dX max",
    "dW max",
)
SHORT_COLUMNS = (
    "operation",
    "ours ms",
    "floor ms",
    "ratio",
    "target",
    "best peer",
    "its ms",
    "peer / ours",
    "ours MB",
    "peer MB",
)


def full(group: ShapeFigures) -> FigureTable:
    """Tabulate all providers of all operations of a shape and profile."""
    rows = [row for cases in group.cases.values() for row in _rows(group, cases)]
    title = f"Shape {group.shape}, profile {group.profile}"
    notes = (f"Shape {group.shape}: {describe(group.sizes, group.dtype)}.", *_settings(group))
    return FigureTable(title, COLUMNS, tuple(rows), notes, "operation")


def _rows(group: ShapeFigures, cases: Sequence[ProviderFigures]) -> list[TableRow]:
    """Make the rows of one operation; peers without figures for the same reason share a row."""
    rows = []
    absent: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        kind = kind_of(case.provider)
        if case.total is not None:
            rows.append(_row(group, case))
            continue
        held = f"; extra MB {megabytes(case.extra_bytes)}" if case.extra_bytes is not None else ""
        key = one_line(case.status) + held, kind
        absent.setdefault(key, []).append(label(case.provider, case.version))
    for (status, kind), names in absent.items():
        rows.append(TableRow((Cell(", ".join(names)),), status, kind, cases[0].op))
    return rows


def _row(group: ShapeFigures, case: ProviderFigures) -> TableRow:
    ours = group.find(case.op, OURS)
    name, kind = Cell(label(case.provider, case.version)), kind_of(case.provider)
    peer = kind == "peer"
    memory = Cell(
        megabytes(case.extra_bytes),
        peer and holds_less(case.extra_bytes, ours.extra_bytes if ours else None),
    )
    if not memory.text and case.memory_status:
        memory = Cell(one_line(case.memory_status))
    dx, own_dx = (error(one, "dhidden", "max") for one in (case, ours))
    faster = peer and case.per_ours is not None and case.per_ours.median < 1
    return TableRow(
        (
            name,
            Cell(quartiles(case.total)),
            Cell(median(case.forward)),
            Cell(median(case.backward)),
            Cell(ratio_text(case.per_floor) if case.provider != FLOOR else "", misses(group, case)),
            Cell(ratio_text(case.per_ours) if case.provider != OURS else "", faster),
            Cell(number(case.tflop_per_s)),
            Cell(percent(case.floor_share) if case.provider != FLOOR else ""),
            Cell(number(case.tokens_per_s)),
            memory,
            Cell(scientific(error(case, "logprobs", "max"))),
            Cell(scientific(error(case, "logprobs", "p999"))),
            Cell(scientific(dx), peer and is_less(dx, own_dx)),
            Cell(scientific(error(case, "dweight", "max"))),
        ),
        kind=kind,
        group=case.op,
    )


def _settings(group: ShapeFigures) -> list[str]:
    """Say which setting was kept, for providers with several."""
    kept: dict[str, dict[str, list[str]]] = {}
    for op, cases in group.cases.items():
        for case in cases:
            if case.tried > 1 and case.total:
                text = ", ".join(f"{name} = {value}" for name, value in case.setting.items())
                text = f"{text or 'its default'}, the fastest of {case.tried}"
                kept.setdefault(case.provider, {}).setdefault(text, []).append(op)
    return [
        f"{provider}: {text}, in {'; '.join(ops)}."
        for provider, choices in kept.items()
        for text, ops in choices.items()
    ]


def short(group: ShapeFigures) -> FigureTable:
    """Tabulate an operation in one row for each of ours: the floor, and the fastest peer."""
    rows = tuple(_short_row(group, *case) for case in product(group.cases, BOTH_OURS))
    note = f"Shape {group.shape}: {describe(group.sizes, group.dtype)}."
    return FigureTable(
        f"In short: shape {group.shape}, profile {group.profile}",
        SHORT_COLUMNS,
        tuple(row for row in rows if row),
        (note,),
    )


def _short_row(group: ShapeFigures, op: str, provider: str) -> TableRow | None:
    ours, floor = group.find(op, provider), group.find(op, FLOOR)
    if provider == SKETCH and (ours is None or ours.status.startswith("not supported")):
        return None
    best = next(iter(group.peers(op)), None)
    name = Cell(name_of(op, provider))
    per_ours = best.per(provider) if best else None
    peer_bytes, own_bytes = (one.extra_bytes if one else None for one in (best, ours))
    return TableRow(
        (
            name,
            Cell(median(ours.total) if ours and ours.total else one_line(_why_not(ours))),
            Cell(median(floor.total) if floor else ""),
            Cell(ratio_text(ours.per_floor) if ours else "", misses(group, ours)),
            Cell(times(target(group, op, provider))),
            Cell(best.provider if best else ""),
            Cell(median(best.total) if best else ""),
            Cell(ratio_text(per_ours), per_ours is not None and per_ours.median < 1),
            Cell(megabytes(own_bytes)),
            Cell(megabytes(peer_bytes), holds_less(peer_bytes, own_bytes)),
        )
    )


def _why_not(case: ProviderFigures | None) -> str:
    return "not run" if case is None else case.status


def scaling_tables(run: Run) -> list[FigureTable]:
    """Make a table of each operation, shape, profile and axis."""
    return [_scaling_table(*key, lines) for key, lines in scaling(run).items()]


def _scaling_table(
    op: str, shape: str, profile: str, axis: str, lines: Sequence[Line]
) -> FigureTable:
    values = sorted({one["value"] for line in lines for one in line.points})
    rows = []
    for line in lines:
        cells = {one["value"]: _point(one) for one in line.points}
        texts = [line.provider, *(cells.get(value, "") for value in values), _fit(line, axis)]
        rows.append(TableRow(tuple(Cell(text) for text in texts), kind=kind_of(line.provider)))
    columns = ("provider", *(axis_value(axis, value) for value in values), "fit")
    return FigureTable(
        f"{op} against {axis}: shape {shape}, profile {profile}",
        columns,
        tuple(rows),
        ("Median ms, extra MB. Fit: least squares of the logarithms.",),
    )


def _point(one: Record) -> str:
    if one["status"] != "ok":
        return one_line(one["status"])
    figures = f"{median(spread(samples(one.get('total_ms'))))} ms"
    extra = one.get("extra_bytes")
    return figures if extra is None else f"{figures}, {megabytes(extra)} MB"


def axis_value(axis: str, value: float) -> str:
    """Write a value of an axis: tokens, entries of the vocabulary, or MB of a workspace."""
    return f"{megabytes(value)} MB" if axis == "workspace" else f"{axis} = {value:,}"


def _fit(line: Line, axis: str) -> str:
    powers = (("time", line.time_power), ("memory", line.memory_power))
    return ", ".join(f"{name} ~ {law(axis, p)}" for name, p in powers if p is not None)


def step_table(run: Run) -> FigureTable | None:
    """Tabulate a whole training step, and the head's share of it."""
    rows: list[tuple[float, TableRow]] = []
    models: dict[str, dict[str, None]] = {}
    for one in run["records"]:
        if one["kind"] != "step":
            continue
        where = f"{one['op']}, shape {one['shape']}"
        names, kind = (Cell(label(one["provider"], one.get("version"))),), kind_of(one["provider"])
        if one["status"] != "ok":
            rows.append((float("inf"), TableRow(names, one_line(one["status"]), kind, where)))
            continue
        step, head = (spread(samples(one[name])) for name in ("step_ms", "head_ms"))
        part = spread(ratios(one["head_ms"], one["step_ms"]))
        cells = (
            Cell(quartiles(step)),
            Cell(quartiles(head)),
            Cell(percent(part.median if part else None)),
        )
        rows.append((step.median if step else 0.0, TableRow(names + cells, kind=kind, group=where)))
        model = ", ".join(f"{name} {value}" for name, value in (one.get("model") or {}).items())
        models.setdefault(model, dict.fromkeys([where]))[where] = None
    columns = ("provider", "step ms (quartiles)", "head ms (quartiles)", "head's share")
    notes = tuple(f"Model of {'; '.join(whole)}: {model}." for model, whole in models.items())
    return _by_group("A whole training step", columns, rows, "step", notes)


def rows_table(run: Run) -> FigureTable | None:
    """Tabulate the row kernels against a copy of as many bytes."""
    rows = []
    for one in run["records"]:
        if one["kind"] != "rows":
            continue
        where = f"shape {one['shape']}, profile {one['profile']}, {one['dtype']}"
        names = (Cell(one["op"] if one["provider"] == OURS else f"{one['op']}, {one['provider']}"),)
        if one["status"] != "ok":
            rows.append((0.0, TableRow(names, one_line(one["status"]), group=where)))
            continue
        total = spread(samples(one["total_ms"]))
        part = spread(ratios(one["copy_ms"], one["total_ms"]))
        rate = one["bytes"] / total.median / 1e6 if total else None
        texts = (megabytes(one["bytes"]), quartiles(total), number(rate))
        cells = (*(Cell(text) for text in texts), Cell(percent(part.median if part else None)))
        rows.append((0.0, TableRow(names + cells, group=where)))
    columns = ("kernel", "MB moved", "ms (quartiles)", "GB/s", "share of a copy's rate")
    note = "Share: the median over rounds of copy time / time, for a copy of as many bytes."
    return _by_group("Row kernels", columns, rows, "shape", (note,))


def _by_group(
    title: str,
    columns: tuple[str, ...],
    rows: list[tuple[float, TableRow]],
    name: str,
    notes: tuple[str, ...],
) -> FigureTable | None:
    """Sort rows by group, in order of appearance, then by the number beside them."""
    order = list(dict.fromkeys(row.group for _, row in rows))
    rows.sort(key=lambda pair: (order.index(pair[1].group), pair[0]))
    return FigureTable(title, columns, tuple(row for _, row in rows), notes, name) if rows else None

"""Writes the page: one HTML file that loads nothing from the network."""

import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from kdrl_train.errors import written
from kdrl_train.output import presentable
from kdrl_train.tools.report import events_section, sections, token_colours
from kdrl_train.tools.report.blocks import Block, Section
from kdrl_train.tools.report.runs import RunGroup, read


def write(
    groups: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    title: str = "Training report",
    extra: Sequence[Block] = (),
) -> Path:
    """Writes one self-contained HTML page about training runs.

    Damaged lines of their files are left out; stderr says of each run which.

    Args:
        groups: name -> run folders of `train`. The runs of a group have the same settings but for
            their seed and are drawn as one line with a band. The other groups are compared with
            the first one. A run may still be running, or may have crashed: the page says so.
        out: the file; its folder is made if absent.
        title: heading of the page, as plain text.
        extra: blocks of the first section, "Results": Table, Figure, Note or Folded of this
            package. Texts are escaped; svgs are not, so they must come from charts.py.
    Returns: out.
    Raises: ValueError if there is no group, a group has no run, or a folder is not a run.
    """
    if not groups or not all(groups.values()):
        empty = [name for name, folders in groups.items() if not folders] or "no groups"
        raise ValueError(f"each group must have a run, got {empty}: name at least one run folder")
    run_groups = [
        RunGroup(name, look, [read(Path(folder)) for folder in folders])
        for look, (name, folders) in enumerate(groups.items())
    ]
    parts = [Section("results", "Results", extra)] if extra else []
    parts += [
        sections.overview(run_groups),
        sections.differences(run_groups),
        sections.curves(run_groups),
        sections.settings(run_groups),
        sections.stages(run_groups),
        sections.histograms(run_groups),
        token_colours.section(run_groups),
        events_section.section(run_groups),
    ]
    for run in (run for group in run_groups for run in group.runs if run.damaged):
        more = len(run.damaged) - 1
        message = f"{run.folder}: left out: {run.damaged[0]}" + f"; {more} more" * bool(more)
        print(presentable(message), file=sys.stderr)
    html = presentable(render(title, parts))
    with written(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(html, encoding="utf-8")
    return out


def render(title: str, parts: Sequence[Section]) -> str:
    """Renders sections by the template."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    time = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("page.html.j2").render(title=title, parts=parts, time=time)

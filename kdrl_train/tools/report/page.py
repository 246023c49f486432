"""The page: sections through the template, in one file that loads nothing."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from kdrl_train.tools.report import events_section, sections, token_colours
from kdrl_train.tools.report.blocks import Block, Section
from kdrl_train.tools.report.runs import Group, read


def write(
    groups: Mapping[str, Sequence[Path]],
    out: Path,
    *,
    title: str = "Training report",
    extra: Sequence[Block] = (),
) -> Path:
    """Write one self-contained HTML page about training runs.

    Args:
        groups: name -> run folders of `train`: runs of one setting that differ in their seed, drawn
            as one line with a band. The first group is the one the others are compared with. A run
            may be at any stage, or have crashed: the page says so.
        out: the file; its folder is made if absent.
        title: of the page, as plain text.
        extra: what stands first, under "Results": Table, Figure, Note or Folded of this package.
            Texts are escaped; svgs are taken as they are, so let them come from charts.py.
    Returns: out.
    Raises: ValueError for no groups, a group without runs, or a folder that is no run.
    """
    if not groups or not all(groups.values()):
        empty = [name for name, folders in groups.items() if not folders] or "no groups"
        raise ValueError(f"each group must have a run, got {empty}: leave it out")
    made = [
        Group(name, look, [read(Path(folder)) for folder in folders])
        for look, (name, folders) in enumerate(groups.items())
    ]
    parts = [Section("results", "Results", extra)] if extra else []
    parts += [
        sections.overview(made),
        sections.differences(made),
        sections.curves(made),
        sections.settings(made),
        sections.stages(made),
        sections.histograms(made),
        token_colours.section(made),
        events_section.section(made),
    ]
    html = render(title, parts)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out


def render(title: str, parts: Sequence[Section]) -> str:
    """The HTML of sections."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return environment.get_template("page.html.j2").render(title=title, parts=parts, made=made)

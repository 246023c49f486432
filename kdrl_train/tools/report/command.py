"""Implements `python -m kdrl_train report`."""

from pathlib import Path

from rich.console import Console
from rich.text import Text
from tyro.conf import Positional

from kdrl_train.output import guarded_console
from kdrl_train.runfolder.writable import require_writable_file
from kdrl_train.settings import settings
from kdrl_train.tools.report.page import write
from kdrl_train.tools.report.runs import by_settings


@settings
class ReportConfig:
    """One HTML page about runs. Runs that differ only in their seed are drawn as one group."""

    runs: Positional[tuple[Path, ...]] = ()
    """Run folders. Other groups are compared with the group of the first folder."""
    out: Path = Path("report.html")
    """File to write; an older one is replaced."""
    title: str = "Training report"
    """Heading of the page."""


def main(config: ReportConfig, console: Console | None = None) -> int:
    """Writes the page and prints its path; returns 0.

    Raises: ValueError if no run folder is named, or a folder is not a run.
    """
    if not config.runs:
        raise ValueError("report must get run folders, got none: name at least one")
    require_writable_file(config.out)
    path = write(by_settings(config.runs), config.out, title=config.title)
    console = guarded_console(console)
    console.print(Text(f"{path}: {path.stat().st_size / 1e6:.1f} MB"), soft_wrap=True)
    return 0

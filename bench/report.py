"""Makes short.md, table.md, plots and report.html in the folder of a results.json.

python bench/report.py DIR [MORE_JSON...]    more files: of the same machine; a later case wins
python bench/report.py DIR --short           print one row an operation instead, for README
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: what is imported is the package, not its neighbours
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import results_file
from bench.machine import one_line
from bench.reporting import figures, page
from bench.reporting.tables import markdown
from bench.results_file import Run

SHORT = "short.md"


def read(paths: list[Path]) -> Run:
    """Read runs of one machine as one, which is finished if all of them are.

    Raises: ValueError where a file is no run, or the machines differ.
    """
    runs = [results_file.load(path) for path in paths]
    for index, run in enumerate(runs):
        for one in run["records"]:
            one["run"] = index  # samples align by round within a run only
    merged = results_file.merge(runs)
    ends = [run.get("finished") for run in runs]
    commits = dict.fromkeys(str(run["machine"].get("commit"))[:7] for run in runs)
    return {
        **merged,
        "command": "; ".join(dict.fromkeys(str(run.get("command")) for run in runs)),
        "started": min((run["started"] for run in runs if run.get("started")), default=None),
        "finished": None if None in ends else max(str(end) for end in ends),
        "commits": list(commits) if len(commits) > 1 else [],
    }


def write(folder: Path, more: Sequence[Path] = ()) -> str:
    """Write all files of the report into a run's folder; returns the short tables and their names.

    Without matplotlib there are no plots, and the text says so.
    Raises: as read.
    """
    run = read([folder, *more])
    content = page.make(run)
    for name in page.PLOTS:
        (folder / name).unlink(missing_ok=True)  # of an earlier run
    lines = [write_short(folder, more)]
    try:
        draw(run, folder)
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        lines.append("matplotlib is not installed: no plots")
    (folder / "table.md").write_text(page.as_markdown(content))
    (folder / "report.html").write_text(page.as_html(content, folder))
    names = [
        name for name in (SHORT, "table.md", *page.PLOTS, "report.html") if (folder / name).exists()
    ]
    return "\n\n".join([*lines, f"{folder}: {', '.join(names)}"])


def write_short(folder: Path, more: Sequence[Path] = ()) -> str:
    """Write short.md, the tables with one row an operation, into a run's folder, and return it."""
    text = short(page.make(read([folder, *more])))
    (folder / SHORT).write_text(text + "\n", encoding="utf-8")
    return text


def short(content: page.Report) -> str:
    """Write the short tables, with one row an operation."""
    return "\n\n".join([content.machine, *(markdown(table) for table in content.short)])


def draw(run: Run, folder: Path) -> None:
    """Draw the plots of the shape with the most records."""
    from bench.reporting import curves, plots  # noqa: PLC0415  slow, and not everywhere: matplotlib

    machine = one_line(run["machine"])
    shape_figures = figures.groups(run)
    if shape_figures:
        plots.time_plot(shape_figures[0], machine, folder / "time.png")
        plots.memory_plot(shape_figures[0], machine, folder / "memory.png")
        plots.accuracy_plot(shape_figures[0], machine, folder / "accuracy.png")
    scaling = figures.scaling(run)
    if scaling:
        curves.scaling_plot(scaling, machine, folder / "scaling.png")


def main() -> None:
    """Run the command: read the runs, then print or write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="holds results.json")
    parser.add_argument("more", type=Path, nargs="*", metavar="MORE_JSON", help="further files")
    parser.add_argument("--short", action="store_true", help="print the short table, write nothing")
    args = parser.parse_args()
    try:
        if args.short:
            print(short(page.make(read([args.folder, *args.more]))))
        else:
            print(write(args.folder, args.more))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

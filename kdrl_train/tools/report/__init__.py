"""Writes a page about training runs: `python -m kdrl_train report RUN [RUN ...]`, or from code:

from kdrl_train.tools.report import Figure, Note, Table, charts, write

svg = charts.point_chart([charts.Point("kdrl", 0.57, 0.55, 0.59)], title="avg@4")
write({"kdrl": [Path("runs/kdrl-0"), Path("runs/kdrl-1")], "grpo": [Path("runs/grpo-0")]},
      Path("report.html"), title="A study", extra=[Figure("", svg)])
charts.save(svg, Path("avg.svg"))
"""

from kdrl_train.tools.report import charts
from kdrl_train.tools.report.blocks import Block, Figure, Folded, Legend, Note, Table
from kdrl_train.tools.report.command import ReportConfig, main
from kdrl_train.tools.report.page import write
from kdrl_train.tools.report.runs import by_settings

__all__ = [
    "Block",
    "Figure",
    "Folded",
    "Legend",
    "Note",
    "ReportConfig",
    "Table",
    "by_settings",
    "charts",
    "main",
    "write",
]

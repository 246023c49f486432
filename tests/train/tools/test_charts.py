"""charts: what is drawn where, and what is written about it."""

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kdrl_train.tools.report.charts import (
    Bars,
    Point,
    Reference,
    Series,
    histogram_chart,
    line_chart,
    point_chart,
    save,
    stacked_chart,
)
from kdrl_train.tools.report.svg import PALETTE, Axis, Look, log_ticks, number, ticks

SVG = "{http://www.w3.org/2000/svg}"


def luminance(color: str) -> float:
    """Returns the relative luminance that WCAG defines."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def points(svg: str, name: str = "polyline") -> list[list[tuple[float, float]]]:
    shapes = ET.fromstring(svg).iter(f"{SVG}{name}")
    pairs = [re.findall(r"([-\d.]+),([-\d.]+)", one.get("points", "")) for one in shapes]
    return [[(float(x), float(y)) for x, y in one] for one in pairs]


def texts(svg: str, name: str = "text") -> list[str]:
    return [one.text or "" for one in ET.fromstring(svg).iter(f"{SVG}{name}")]


@pytest.mark.parametrize("color", PALETTE)
@pytest.mark.parametrize("page", ["#ffffff", "#14171c"])
def test_colours_read_on_both_pages(color: str, page: str) -> None:
    a, b = sorted((luminance(color), luminance(page)))
    assert (b + 0.05) / (a + 0.05) >= 3


def test_groups_are_told_apart_without_colour() -> None:
    looks = [Look(i) for i in range(24)]
    assert len({(one.color, one.dash, one.marker) for one in looks}) == 24
    assert len({(one.dash, one.marker) for one in looks[:8]}) == 8


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.31, 0.42, [0.32, 0.34, 0.36, 0.38, 0.4, 0.42]),
        (-3e-7, 5e-7, [-2e-7, 0, 2e-7, 4e-7]),
        (1, 10_000, [2000, 4000, 6000, 8000, 10000]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 6) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (1.7e-7, 2.45e-7, ["1.8e-7", "2e-7", "2.2e-7", "2.4e-7"]),
        (4.9e-6, 2.1e-5, ["5e-6", "1e-5", "1.5e-5", "2e-5"]),
        (-2e-4, 2e-4, ["-2e-4", "-1e-4", "0", "1e-4", "2e-4"]),
        (1.2e6, 2.1e6, ["1.2e6", "1.4e6", "1.6e6", "1.8e6", "2e6"]),
        (0.99999991, 1.00000001, ["0.99999992", "0.99999994", "0.99999996", "0.99999998", "1"]),
        (9.5e11, 1.06e12, ["9.5e11", "1e12", "1.05e12"]),
    ],
)
def test_labels_of_small_and_large_numbers_differ(
    low: float, high: float, labels: list[str]
) -> None:
    axis = Axis(low, high, 0, 100)
    assert [axis.label(tick) for tick in axis.ticks] == labels


def test_ticks_of_a_logarithmic_axis() -> None:
    assert log_ticks(0.9, 60, 6) == [1, 2, 5, 10, 20, 50]
    assert log_ticks(0.9, 60, 4) == [1, 3, 10, 30]
    assert log_ticks(1e-6, 1e6, 5) == pytest.approx([1e-6, 1e-3, 1, 1e3, 1e6])
    axis = Axis.fit([1, 100], 0, 200, log=True)
    assert axis(10) == pytest.approx(100)


def test_an_axis_of_one_value_has_a_range() -> None:
    for value in (0.0, 3.0, -2e-9):
        axis = Axis.fit([value], 0, 100)
        assert axis(value) == pytest.approx(50)
        assert axis.ticks


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.51234, "0.512"),
        (12345.6, "12,346"),
        (2.5e-6, "2.5e-6"),
        (0.0, "0"),
        (-0.0, "0"),
        (None, "-"),
        (math.nan, "-"),
        (-1.0, "-1"),
        (7e11, "7e11"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_line_goes_through_its_points() -> None:
    one = Series("a", [0, 5, 10], [0.0, 1.0, 0.0], low=[0, 0, 0], high=[1, 1, 1])
    svg = line_chart([one], title="t")
    (line, *_), (band, *_) = points(svg), points(svg, "polygon")
    (x0, y0), (x1, y1), (x2, y2) = line
    assert (x0 + x2) / 2 == pytest.approx(x1, abs=0.1)
    assert y0 == y2 > y1  # downwards is more in a drawing
    assert {y for _, y in band} == {y0, y1}


def test_a_value_that_is_not_finite_interrupts_the_line() -> None:
    one = Series("a", [1, 2, 3, 4, 5], [1.0, 2.0, math.nan, 3.0, None])
    lines = points(line_chart([one], title="t", legend=False))
    assert [len(line) for line in lines] == [2, 1]
    two = Series("a", [1, 0, 3], [1.0, -1.0, 2.0])
    svg = line_chart([two], title="t", log_x=True, legend=False)
    assert [len(line) for line in points(svg)] == [1, 1]
    assert "step (x logarithmic)" in texts(svg)


def test_a_point_without_neighbours_has_a_mark() -> None:
    values = [1.0] * 20 + [None, 7.0, None] + [1.0] * 80  # no regular mark is near
    svg = line_chart([Series("a", range(103), values)], title="t", legend=False)
    circles = list(ET.fromstring(svg).iter(f"{SVG}circle"))
    marks = [(float(c.get("cx", "0")), float(c.get("cy", "0"))) for c in circles]
    assert points(svg)[1][0] in marks
    assert len(marks) == 6


def test_a_line_without_numbers_says_so() -> None:
    svg = line_chart([Series("a", [1], [None])], title="t")
    assert "a: no values" in texts(svg, "desc")[0]
    assert texts(line_chart([], title="t"), "desc")


def test_the_pointer_shows_all_values() -> None:
    some = [Series(name, range(100), range(100), i) for i, name in enumerate("ab")]
    titles = texts(line_chart(some, title="t"), "title")
    assert len(titles) <= 40
    assert "step 4\na: 4\nb: 4" in titles


def test_legend_names_each_group_once() -> None:
    some = [Series(name, [1, 2], [1, 2], i) for i, name in enumerate("ab")]
    assert {"a", "b"} <= set(texts(line_chart(some, title="t")))
    assert not {"a", "b"} & set(texts(line_chart(some, title="t", legend=False)))


def test_intervals_span_their_bounds() -> None:
    some = [Point("a", 0.5, 0.25, 0.75), Point("b", 1.0), Point("c", None)]
    svg = point_chart(some, title="t", references=[Reference("teacher", 0.0)], x_label="x")
    path = next(p.get("d", "") for p in ET.fromstring(svg).iter(f"{SVG}path"))
    low, high = map(float, re.findall(r"[MH]([\d.]+)", path))
    circle = next(ET.fromstring(svg).iter(f"{SVG}circle"))
    assert float(circle.get("cx", "0")) == pytest.approx((low + high) / 2, abs=0.1)
    assert {"0.5 (0.25 to 0.75)", "1", "-", "teacher"} <= set(texts(svg))


def test_bars_are_shares() -> None:
    svg = histogram_chart([Bars("a", [1, 3, 0])], ["low", "mid", "high"], title="t", x_label="nats")
    assert "nats mid\na 75.0%" in texts(svg, "title")
    assert "a: most in mid" in texts(svg, "desc")[0]
    assert histogram_chart([Bars("a", [0, 0])], ["x", "y"], title="t")


def test_parts_add_up() -> None:
    bars = [("grpo", {"rollout": 3.0, "update": 1.0}), ("kdrl", {"rollout": 2.0, "teacher": 2.0})]
    svg = stacked_chart(bars, title="t")
    boxes = [b for b in ET.fromstring(svg).iter(f"{SVG}rect") if b.get("class") == "part"]
    wide = [float(box.get("width", "0")) for box in boxes]
    assert wide[0] == pytest.approx(3 * wide[1], rel=0.01)
    assert wide[2] == pytest.approx(wide[3], abs=0.2)
    assert "kdrl, teacher: 2 s" in texts(svg, "title")


def test_a_chart_is_saved_as_a_file(tmp_path: Path) -> None:
    save(line_chart([Series("<a> & b", [1, 2], [1, 2])], title="<t>"), tmp_path / "a.svg")
    root = ET.parse(tmp_path / "a.svg").getroot()
    assert root.tag == f"{SVG}svg"
    assert root.findtext(f"{SVG}title") == "<t>"

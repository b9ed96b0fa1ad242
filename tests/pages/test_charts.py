import math
from xml.etree import ElementTree

import pytest

from srpo_cli.pages.charts import SERIES, Line, Mark, axis_of, curve, interval_plot, shape, stacked_bars, zero_bar

HOSTILE = "</svg><script>x</script>\"'&\x00\x1b"
SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg):
    return ElementTree.fromstring(str(svg))


def all_of(tree, tag, kind):
    return [each for each in tree.iter(SVG + tag) if kind in (each.get("class") or "").split()]


def x_of(line):
    return float(line.get("x1")), float(line.get("x2"))


def test_estimates_and_ends_lie_on_one_linear_scale():
    rows = [("base", [Mark(1.0, 0.5, 2.0)]), ("tuned", [Mark(3.0, 2.5, 3.5, series=0)])]
    tree = parsed(interval_plot(rows, "title", digits=2))
    whiskers = [line for line in all_of(tree, "line", "whisker") if line.get("y1") == line.get("y2")]
    dots = [float(dot.get("cx")) for dot in all_of(tree, "circle", "dot")]
    (low, high), (low_2, high_2) = map(x_of, whiskers)
    pixels = (dots[1] - dots[0]) / 2  # of 1
    assert dots[0] - low == pytest.approx(0.5 * pixels, abs=0.2)
    assert high - dots[0] == pytest.approx(pixels, abs=0.2)
    assert (low_2 - low, high_2 - high) == pytest.approx((2 * pixels, 1.5 * pixels), abs=0.2)
    assert [text.text for text in all_of(tree, "text", "value")] == ["1.00", "3.00"]


def test_the_reference_is_where_the_baseline_is():
    tree = parsed(interval_plot([("base", [Mark(1.0, 0.5, 2.0)]), ("b", [Mark(9.0)])], "title", reference=1.0))
    assert x_of(all_of(tree, "line", "reference")[0])[0] == float(all_of(tree, "circle", "dot")[0].get("cx"))


def test_a_chart_says_its_figures_aloud():
    label = parsed(interval_plot([("anime", [Mark(1.0, 0.5, 2.0, title="base")])], "HPS", digits=1)).get("aria-label")
    assert label == "HPS. anime, base: 1.0 [0.5, 2.0]"
    label = parsed(stacked_bars([("ours", [3, 1])], ["Excellent", "Good"], "Detail")).get("aria-label")
    assert label == "Detail. ours: Excellent 3 of 4 (75.0 %); ours: Good 1 of 4 (25.0 %)"


def test_bars_are_shares_from_the_best_at_the_left():
    tree = parsed(stacked_bars([("base", [1, 2, 3, 4]), ("ours", [40, 0, 0, 0])], ["E", "G", "P", "F"], "title"))
    bars = [part.find(f"{SVG}rect") for part in tree.iter(f"{SVG}g")]
    widths = [float(bar.get("width")) for bar in bars]
    assert [width / sum(widths[:4]) for width in widths[:4]] == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=1e-3)
    assert widths[4:] == pytest.approx([sum(widths[:4]), 0, 0, 0], abs=0.1)
    starts = [float(bar.get("x")) for bar in bars]
    assert starts[:4] == sorted(starts[:4])
    assert starts[1] == pytest.approx(starts[0] + widths[0], abs=0.02)


def test_a_share_below_eight_per_cent_is_told_and_not_written():
    tree = parsed(stacked_bars([("base", [7, 93])], ["E", "G"], "title"))
    small, large = tree.iter(f"{SVG}g")
    assert small.find(f"{SVG}text") is None
    assert small.find(f"{SVG}title").text == "base: E 7 of 100 (7.0 %)"
    assert large.find(f"{SVG}text").text == "93"


def test_a_bar_of_no_answers_is_empty():
    tree = parsed(stacked_bars([("base", [0, 0])], ["E", "G"], "title"))
    assert [rect.get("width") for rect in tree.iter(f"{SVG}rect")] == ["0.00", "0.00"]


@pytest.mark.parametrize(("low", "high", "clear"), [(0.1, 0.3, True), (-0.1, 0.3, False), (-0.3, -0.1, True)])
def test_zero_is_in_the_middle_and_an_interval_keeps_clear_of_it_or_not(low, high, clear):
    tree = parsed(zero_bar(Mark((low + high) / 2, low, high)))
    zero = x_of(all_of(tree, "line", "reference")[0])[0]
    left, right = x_of(all_of(tree, "line", "whisker")[0])
    assert zero == 72
    assert (not left <= zero <= right) is clear


def test_bars_with_a_common_reach_share_a_scale():
    dots = [
        float(all_of(parsed(zero_bar(Mark(value), reach=4)), "circle", "dot")[0].get("cx")) - 72 for value in (1, 2, 4)
    ]
    assert [dots[1] / dots[0], dots[2] / dots[0]] == pytest.approx([2, 4], rel=0.02)


def test_a_curve_breaks_where_there_is_no_figure_and_its_band_goes_there_and_back():
    line = Line(
        "reward", [0, 1, 2, 3], [0.0, 1.0, math.nan, 3.0], [-1.0, 0.0, math.nan, 2.0], [1.0, 2.0, math.nan, 4.0]
    )
    tree = parsed(curve([line], "title", "step", "reward"))
    path = all_of(tree, "path", "path")[0].get("d")
    assert (path.count("M"), path.count("L")) == (2, 1)
    assert len(all_of(tree, "polygon", "band")[0].get("points").split()) == 6
    first, second = [float(point.split()[1]) for point in path.replace("M", "L").split("L")[1:3]]
    assert second < first  # up is more


def test_every_line_is_in_the_legend_and_differs_without_colour():
    lines = [Line(f"run {i}", [0, 1], [0, i]) for i in range(SERIES)]
    tree = parsed(curve(lines, "title", "step", "reward"))
    assert [text.text for text in all_of(tree, "text", "label")] == [line.name for line in lines]
    assert len({path.get("stroke-dasharray") for path in all_of(tree, "path", "path")}) == SERIES


def test_every_series_has_a_shape_of_its_own():
    shapes = [parsed(f'<svg xmlns="{SVG[1:-1]}">{shape(series)}</svg>')[0] for series in range(SERIES)]
    assert len({each.get("points") for each in shapes}) == SERIES
    assert str(shape(SERIES + 1)) == str(shape(1))


@pytest.mark.parametrize("values", [[0.2864, 0.2913], [-1e-6, 3e-6], [0, 12345.0], [7.0, 7.0], [0.0], [math.nan]])
def test_ticks_are_round_and_within_the_axis(values):
    axis = axis_of(values, 0, 100)
    assert 1 <= len(axis.ticks) <= 8
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)
    for tick in axis.ticks:
        assert float(f"{tick:.{axis.digits}f}") == pytest.approx(tick, abs=1e-12)
    assert all(0 <= axis.at(value) <= 100 for value in values if math.isfinite(value))


@pytest.mark.parametrize(
    "chart",
    [
        interval_plot([(HOSTILE, [Mark(1.0, 0.0, 2.0, title=HOSTILE)])], HOSTILE),
        stacked_bars([(HOSTILE, [1])], [HOSTILE], HOSTILE),
        zero_bar(Mark(1.0, title=HOSTILE)),
        curve([Line(HOSTILE, [0], [1])], HOSTILE, HOSTILE, HOSTILE),
        interval_plot([], "no rows"),
    ],
    ids=["intervals", "bars", "zero", "curve", "empty"],
)
def test_no_text_can_end_the_chart(chart):
    tree = parsed(chart)
    assert not list(tree.iter("script")) + list(tree.iter(f"{SVG}script"))

"""Charts as SVG text: pure functions of figures, coloured by the page's style sheet through the classes s0, s1 ...

They read without colour too: every series has a shape or a dash of its own, every mark a title.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from srpo_cli.pages.writing import number, plain

SERIES = 8
"""Colours and shapes there are; a ninth series looks like the first."""

WIDTH = 340
"""Of a chart, in the unit of its view box: a pixel where it is not scaled."""

_VALUE, _ROW, _AXIS = 54, 22, 24
_LONGEST = 22  # letters of a label
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 2", "10 4", "4 2 1 2", "3 1")


@dataclass(frozen=True)
class Mark:
    """An estimate with its interval, where there is one; ``series`` is a model's number."""

    mean: float
    low: float | None = None
    high: float | None = None
    series: int = 0
    title: str = ""


@dataclass(frozen=True)
class Line:
    """One series of a curve: ``y`` over ``x``, both (N,), and where there is one its band; ``points`` get a shape."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    points: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Event:
    """What happened at ``x``; ``kind`` is "best" or "worse"."""

    x: float
    kind: str
    title: str


@dataclass(frozen=True)
class Axis:
    """A linear scale from values to pixels; its ``ticks`` are round numbers."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    digits: int

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axis_of(values: Sequence[float], start: float, end: float, count: int = 4) -> Axis:
    """The axis that holds all finite ``values`` with a small margin, with about ``count`` ticks."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin
    step = _round_step((high - low) / count)
    ticks = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, start, end, tuple(ticks), max(0, -math.floor(math.log10(step) + 1e-9)))


def interval_plot(
    rows: Sequence[tuple[str, Sequence[Mark]]],
    title: str,
    digits: int = 3,
    reference: float | None = None,
    values: bool = True,
) -> Markup:
    """Estimates with their intervals on one axis, a block of marks below each other for each labelled row.

    ``reference`` draws a dashed line there (the baseline's value, or zero); ``values`` writes each estimate at the
    right.
    """
    marks = [mark for _, of_row in rows for mark in of_row]
    ends = [end for mark in marks for end in (mark.mean, mark.low, mark.high) if end is not None]
    left = _label_width([label for label, _ in rows])
    axis = axis_of([*ends, *([] if reference is None else [reference])], left, WIDTH - (_VALUE if values else 10))
    heights = [_height(of_row) for _, of_row in rows]
    bottom = sum(heights) + 4
    parts = [_x_axis(axis, bottom)]
    if reference is not None:
        parts.append(_line("reference", axis.at(reference), 0, axis.at(reference), bottom))
    top, all_told = 2.0, []
    for (label, of_row), height in zip(rows, heights, strict=True):
        parts.append(_label(label, top + height / 2))
        for i, mark in enumerate(of_row):
            y = top + height / 2 + 16 * (i - (len(of_row) - 1) / 2)
            parts.append(_mark(mark, axis, y, digits, values))
            told = _told(mark, digits)
            all_told.append(told if told.startswith(f"{label}: ") else f"{label}, {told}")
        top += height
    return _svg(parts, bottom + _AXIS, _aloud(title, all_told))


def reach_of(marks: Sequence[Mark]) -> float:
    """How far from zero the marks and their intervals go."""
    return max((abs(end) for mark in marks for end in (mark.mean, mark.low, mark.high) if end is not None), default=0.0)


def zero_bar(mark: Mark, reach: float | None = None) -> Markup:
    """A difference and its interval on a line of its own, zero in the middle: does it keep clear of zero?

    ``reach`` is the value at the line's ends, for bars that share a scale; None: the bar's own.
    """
    width, middle = 144, 9
    reach = 1.08 * (reach_of([mark]) if reach is None else reach) or 1.0
    axis = Axis(-reach, reach, 4, width - 4, (), 0)
    parts = [_line("reference", width / 2, 0, width / 2, 18)]
    if mark.low is not None and mark.high is not None:
        parts.append(_line("whisker", axis.at(mark.low), middle, axis.at(mark.high), middle))
    parts.append(f'<circle class="dot" cx="{axis.at(mark.mean):.1f}" cy="{middle}" r="4"/>')
    start = f'<svg class="zero" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 18" role="img"'
    return Markup(f'{start} aria-label="{_safe(mark.title)}">{"".join(parts)}</svg>')


def stacked_bars(rows: Sequence[tuple[str, Sequence[int]]], names: Sequence[str], title: str) -> Markup:
    """A bar of shares for each labelled row of counts, the first of ``names`` at the left.

    Shares of 8 % and more are written in the bar; every part's title has the count.
    """
    parts, bar, pitch, all_told = [], 20, 30, []
    left, right = _label_width([label for label, _ in rows]), WIDTH - 4
    for i, (label, counts) in enumerate(rows):
        top, total, start = 4 + i * pitch, sum(counts), float(left)
        parts.append(_label(label, top + bar / 2))
        for kind, (name, count) in enumerate(zip(names, counts, strict=True)):
            share = count / total if total else 0.0
            width = share * (right - left)
            told = f"{label}: {name} {count} of {total} ({number(100 * share, 1)} %)"
            all_told.append(told)
            text = f'<text x="{start + width / 2:.1f}" y="{top + bar / 2:.1f}">{100 * share:.0f}</text>'
            text = text if share >= 0.08 else ""
            parts.append(
                f'<g class="part k{kind}"><title>{_safe(told)}</title>'
                f'<rect x="{start:.2f}" y="{top}" width="{width:.2f}" height="{bar}"/>{text}</g>'
            )
            start += width
    return _svg(parts, 8 + pitch * len(rows) - (pitch - bar), _aloud(title, all_told))


def curve(
    lines: Sequence[Line],
    title: str,
    x_title: str,
    y_title: str,
    corridor: tuple[float, float] | None = None,
    marks: Sequence[Event] = (),
) -> Markup:
    """Lines over a common axis, with bands where they have them. Gaps stay gaps; several lines have a legend below.

    ``corridor`` shades the values between its two ends over the whole width, ``marks`` are upright lines.
    """
    height = 180
    values = [v for line in lines for of_line in (line.y, line.low or (), line.high or ()) for v in of_line]
    points = [point for line in lines for point in line.points]
    steps = [*(x for line in lines for x in line.x), *(x for x, _ in points), *(mark.x for mark in marks)]
    x_axis = axis_of(steps, 44, WIDTH - 8, 5)
    y_axis = axis_of([*values, *(y for _, y in points), *(corridor or ())], height, 18, 4)
    parts = [_corridor(corridor, y_axis)] if corridor and _finite(*corridor) else []
    parts += [_x_axis(x_axis, height), *(_event(mark, x_axis.at(mark.x), height) for mark in marks)]
    for tick in y_axis.ticks:
        y = y_axis.at(tick)
        parts.append(_line("grid", 44, y, WIDTH - 8, y))
        parts.append(f'<text class="tick" x="38" y="{y:.1f}" text-anchor="end">{number(tick, y_axis.digits)}</text>')
    parts.append(f'<text class="name" x="4" y="8">{_safe(y_title)}</text>')
    parts.append(f'<text class="name" x="{WIDTH - 8}" y="{height + 34}" text-anchor="end">{_safe(x_title)}</text>')
    for i, line in enumerate(lines):
        parts += _curve_line(line, i % SERIES, x_axis, y_axis)
    legend = lines if len(lines) > 1 else []
    for i, line in enumerate(legend):
        y = height + 50 + 16 * i
        parts.append(f'<g class="s{i % SERIES}">{_line("path", 44, y, 68, y, _DASHES[i % SERIES])}</g>')
        parts.append(f'<text class="label" x="76" y="{y}">{_safe(_short(line.name, 44))}</text>')
    return _svg(parts, height + 46 + 16 * len(legend), title)


def shape(series: int, x: float = 6, y: float = 6, size: float = 4.2) -> Markup:
    """The mark of a series as an SVG element: circle, square, diamond, triangle ..."""
    corners = {1: (4, 45), 2: (4, 0), 3: (3, -90), 4: (3, 90), 5: (5, -90), 6: (6, 0), 7: (3, 0)}
    series %= SERIES
    if series == 0:
        return Markup('<circle class="dot s0" cx="{}" cy="{}" r="{}"/>').format(f"{x:.1f}", f"{y:.1f}", f"{size:.1f}")
    count, turn = corners[series]
    radius = size * (1.3 if count == 3 else 1.15)
    angles = [math.radians(turn + 360 * i / count) for i in range(count)]
    points = " ".join(f"{x + radius * math.cos(a):.1f},{y + radius * math.sin(a):.1f}" for a in angles)
    return Markup('<polygon class="dot s{}" points="{}"/>').format(series, points)


def _mark(mark: Mark, axis: Axis, y: float, digits: int, values: bool) -> str:
    series = mark.series % SERIES
    parts = []
    if mark.low is not None and mark.high is not None:
        parts.append(_line("whisker", axis.at(mark.low), y, axis.at(mark.high), y))
        parts += [_line("whisker", axis.at(end), y - 3, axis.at(end), y + 3) for end in (mark.low, mark.high)]
    parts.append(shape(series, axis.at(mark.mean), y))
    if values:
        parts.append(f'<text class="value" x="{WIDTH - 2}" y="{y:.1f}">{number(mark.mean, digits)}</text>')
    return f'<g class="s{series}"><title>{_safe(_told(mark, digits))}</title>{"".join(parts)}</g>'


def _told(mark: Mark, digits: int) -> str:
    """A mark in words."""
    told = f"{mark.title}: " if mark.title else ""
    told += number(mark.mean, digits)
    if mark.low is not None and mark.high is not None:
        told += f" [{number(mark.low, digits)}, {number(mark.high, digits)}]"
    return told


def _aloud(title: str, told: Sequence[str]) -> str:
    """A chart in words, for those who do not see it."""
    return f"{title}. {'; '.join(told)}"


def _curve_line(line: Line, series: int, x_axis: Axis, y_axis: Axis) -> list[str]:
    parts = []
    if line.low is not None and line.high is not None:
        ends = [(x, low, high) for x, low, high in zip(line.x, line.low, line.high, strict=True) if _finite(low, high)]
        there = [f"{x_axis.at(x):.1f},{y_axis.at(high):.1f}" for x, _, high in ends]
        back = [f"{x_axis.at(x):.1f},{y_axis.at(low):.1f}" for x, low, _ in reversed(ends)]
        parts.append(f'<polygon class="band s{series}" points="{" ".join(there + back)}"/>')
    path, pen = [], "M"
    for x, y in zip(line.x, line.y, strict=True):
        if not _finite(x, y):
            pen = "M"
            continue
        path.append(f"{pen}{x_axis.at(x):.1f} {y_axis.at(y):.1f}")
        pen = "L"
    dash = f' stroke-dasharray="{_DASHES[series]}"' if _DASHES[series] else ""
    parts.append(f'<path class="path s{series}" d="{" ".join(path)}"{dash}><title>{_safe(line.name)}</title></path>')
    parts += [shape(series, x_axis.at(x), y_axis.at(y), 3.2) for x, y in line.points if _finite(x, y)]
    return parts


def _corridor(ends: tuple[float, float], axis: Axis) -> str:
    bottom, top = (axis.at(end) for end in ends)
    size = f'width="{WIDTH - 52}" height="{max(bottom - top, 1):.1f}"'
    return f'<rect class="corridor" x="44" y="{top:.1f}" {size}><title>its corridor</title></rect>'


def _event(event: Event, x: float, bottom: float) -> str:
    return f'<g class="{event.kind}"><title>{_safe(event.title)}</title>{_line("event", x, 14, x, bottom)}</g>'


def _x_axis(axis: Axis, bottom: float) -> str:
    parts = []
    for tick in axis.ticks:
        x = axis.at(tick)
        parts.append(_line("grid", x, 0, x, bottom))
        text = f'<text class="tick" x="{x:.1f}" y="{bottom + 12:.1f}" text-anchor="middle">'
        parts.append(f"{text}{number(tick, axis.digits)}</text>")
    return "".join(parts)


def _label(text: str, y: float) -> str:
    short = _short(text, _LONGEST)
    whole = f"<title>{_safe(text)}</title>" if short != text else ""
    return f'<text class="label" x="2" y="{y:.1f}">{whole}{_safe(short)}</text>'


def _label_width(labels: Sequence[str]) -> float:
    """Room for the labels at the left, at about six to a letter."""
    return 16 + 6.2 * min(_LONGEST, max(map(len, labels), default=0))


def _line(kind: str, x1: float, y1: float, x2: float, y2: float, dash: str = "") -> str:
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{dashes}/>'


def _svg(parts: Sequence[str], height: float, title: str) -> Markup:
    start = f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
    return Markup(f'{start} aria-label="{_safe(title)}">{"".join(parts)}</svg>')


def _height(of_row: Sequence[Mark]) -> float:
    return max(_ROW, 16 * len(of_row) + 10) if len(of_row) > 1 else _ROW


def _round_step(step: float) -> float:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _finite(*values: float) -> bool:
    return all(map(math.isfinite, values))


def _safe(text: object) -> str:
    return str(escape(plain(text)))

"""Shapes of the report's charts: curves, histograms and intervals, in shares of their frame.

A shape is a path for an SVG of 1000 by 1000 units that is stretched to its frame; texts stand
beside it as HTML, so that they stay readable however narrow the frame is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

POINTS = 400  # chosen: places along a curve; more cannot be told apart on a screen
BINS = 24  # chosen
SIZE = 1000
ROUNDING = 1e-9

Point = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    """A label and its place, 0 to 100 of the frame from the left or the bottom."""

    place: float
    text: str


@dataclass(frozen=True)
class Curve:
    """One line of a chart: its name, the class that styles it, and its SVG path."""

    name: str
    kind: str
    path: str


@dataclass(frozen=True)
class Chart:
    """Curves over a common frame, with the labels of both axes; `said` is it in words."""

    curves: tuple[Curve, ...]
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    x_name: str
    y_name: str
    said: str


@dataclass(frozen=True)
class Interval:
    """A value with its interval, each 0 to 100 of the frame."""

    value: float
    low: float
    high: float


# --- curves -------------------------------------------------------------------------------


def curves(
    series: Sequence[tuple[str, str, Sequence[Point]]], *, x_name: str, y_name: str
) -> Chart | None:
    """A chart of `(name, kind, points)`, points by ascending x; None where no point is finite."""
    shown = [
        (name, kind, [p for p in points if math.isfinite(p[1])]) for name, kind, points in series
    ]
    shown = [each for each in shown if each[2]]
    if not shown:
        return None
    every = [point for _, _, points in shown for point in points]
    left, right = _range([x for x, _ in every])
    y_ticks = _ticks([y for _, y in every])
    bottom, top = y_ticks[0], y_ticks[-1]
    frame = (left, right, bottom, top)
    ends = "; ".join(f"{name} from {p[0][1]:.4g} to {p[-1][1]:.4g}" for name, _, p in shown)
    return Chart(
        tuple(Curve(name, kind, _line(_thinned(points), frame)) for name, kind, points in shown),
        tuple(Tick(100 * (x - left) / (right - left), f"{x:,.0f}") for x in (left, right)),
        tuple(Tick(100 * (y - bottom) / (top - bottom), _number(y)) for y in y_ticks),
        x_name,
        y_name,
        f"{y_name} by {x_name}: {ends}.",
    )


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The running mean of a curve over a fiftieth of its length, for the eye."""
    finite = [point for point in points if math.isfinite(point[1])]
    half = len(finite) // 100
    sums = [0.0]
    for _, y in finite:
        sums.append(sums[-1] + y)
    out = []
    for place, (x, _) in enumerate(finite):
        first, last = max(0, place - half), min(len(finite), place + half + 1)
        out.append((x, (sums[last] - sums[first]) / (last - first)))
    return out


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most twice POINTS of them: the lowest and the highest of each stretch, none hidden."""
    if len(points) <= 2 * POINTS:
        return list(points)
    out = []
    for part in range(POINTS):
        piece = points[part * len(points) // POINTS : (part + 1) * len(points) // POINTS]
        ends = {min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1])}
        out += sorted(ends)
    return out


def _line(points: Sequence[Point], frame: tuple[float, float, float, float]) -> str:
    left, right, bottom, top = frame
    placed = [
        f"{SIZE * (x - left) / (right - left):.1f} {SIZE * (top - y) / (top - bottom):.1f}"
        for x, y in points
    ]
    return "M" + " L".join(placed if len(placed) > 1 else placed * 2)


# --- histograms ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Bins:
    """How many values lie in each of equal stretches of `width` from `left` on."""

    left: float
    width: float
    counts: tuple[tuple[int, ...], ...]
    """For each series of values, stretch by stretch."""


def binned(series: Sequence[Sequence[float]], unit: float) -> Bins | None:
    """Equal stretches over several series of values, at most BINS; None without a finite value.

    A stretch is some `unit`s wide, the least that two values differ by, so that none holds more
    of them than another. Ends at the 99th percentile; what is above it counts in the last stretch.
    """
    every = sorted(value for values in series for value in values if math.isfinite(value))
    if not every:
        return None
    left, end = every[0], every[min(len(every) - 1, math.ceil(0.99 * len(every)))]
    width = unit * max(1, math.ceil((end - left) / BINS / unit))
    count = math.floor((end - left) / width + ROUNDING) + 1
    counts = []
    for values in series:
        found = [0] * count
        for value in filter(math.isfinite, values):
            found[min(count - 1, math.floor((value - left) / width + ROUNDING))] += 1
        counts.append(tuple(found))
    return Bins(left, width, tuple(counts))


def histogram(
    bins: Bins | None, names: Sequence[tuple[str, str]], *, x_name: str, y_name: str
) -> Chart | None:
    """A chart of counts, a `(name, kind)` for each series; None where all values are alike."""
    if bins is None or len(bins.counts[0]) < 2:
        return None
    y_ticks = _ticks([0.0, float(max(max(each) for each in bins.counts))])
    right = bins.left + bins.width * len(bins.counts[0])
    x_places = (bins.left, (bins.left + right) / 2, right)
    said = "; ".join(
        f"{name}: {sum(each):,}, most of them from {_number(bins.left + bins.width * place)}"
        for (name, _), each in zip(names, bins.counts, strict=True)
        for place in [each.index(max(each))]
    )
    return Chart(
        tuple(
            Curve(name, kind, _steps(each, y_ticks[-1]))
            for (name, kind), each in zip(names, bins.counts, strict=True)
        ),
        tuple(Tick(50.0 * place, _number(x)) for place, x in enumerate(x_places)),
        tuple(Tick(100 * y / y_ticks[-1], _number(y)) for y in y_ticks),
        x_name,
        y_name,
        f"{y_name} by {x_name}. {said}.",
    )


def _steps(counts: Sequence[int], top: float) -> str:
    """The outline of a histogram, closed at the bottom."""
    parts = [f"M0 {SIZE}"]
    for place, count in enumerate(counts):
        start, end = (SIZE * each / len(counts) for each in (place, place + 1))
        height = SIZE - SIZE * count / top
        parts.append(f"L{start:.1f} {height:.1f} L{end:.1f} {height:.1f}")
    return " ".join([*parts, f"L{SIZE} {SIZE} Z"])


# --- intervals ----------------------------------------------------------------------------


def scale(values: Iterable[float]) -> tuple[float, float]:
    """The ends of the axis that such scores are shown on: 0 to 1, 0 to 100, or what holds all."""
    known = list(values)
    low, high = min(known), max(known)
    if low < 0:
        reach = next((each for each in (1.0, 100.0) if each >= max(-low, high)), max(-low, high))
        return -reach, reach
    return 0.0, next((each for each in (1.0, 100.0) if each >= high), high * 1.05)


def interval(value: float, low: float, high: float, ends: tuple[float, float]) -> Interval:
    """The place of a score and its interval between the ends of an axis."""
    places = (100 * (each - ends[0]) / (ends[1] - ends[0]) for each in (value, low, high))
    return Interval(*(round(min(100.0, max(0.0, each)), 2) for each in places))


# --- axes ---------------------------------------------------------------------------------


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(values: Sequence[float]) -> list[float]:
    """Three to six round numbers, the first below all values and the last above them."""
    low, high = _range(values)
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * each for each in (1, 2, 5, 10) if unit * each >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(step * each, 12) for each in range(first, last + 1)]


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"

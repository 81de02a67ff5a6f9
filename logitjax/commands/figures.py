"""Pictures for people: numbers in, a PNG in one style out.

A `Picture` and its panels are plain values: what is drawn can be kept as JSON, checked without a
renderer, and drawn again. Every name has its colour, marker and dashes, so that series
can be told apart in grey; names stand at the ends of their lines or beside their points, where they
cover nothing; a page shows a picture 600 pixels wide, and letters are sized for that.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import scipy.special
from etils import epath

from logitjax import storage

_INCHES, _DPI = 6.0, 150
# Okabe and Ito's colours, which colour-blind readers tell apart, without their yellow. Numbers of
# colours, markers and dashes have no common divisor.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = "os^vDPX<>ph"
_DASHES = ((0, ()), (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))
_GREY = "#555555"
# More points than these are a curve: its runs are thin lines, and its interval is a band.
_MOST_POINTS = 24
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.xmargin": 0.03,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """What one name measured.

    Attributes:
        name: What is written beside it, and what its colour, marker and dashes belong to.
        runs: Points `(x, y)` of each run, such as a seed. All runs have equally many: the i-th
            points of all are one measurement, drawn as their mean and its interval.
        line: Whether the means are joined.
    """

    name: str
    runs: Sequence[Sequence[Sequence[float]]]
    line: bool = True

    def __post_init__(self) -> None:
        lengths = {len(run) for run in self.runs}
        if len(lengths) > 1:
            raise ValueError(f"runs: expected equally many points of {self.name}, got {lengths}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
        x: What is to the right, with its unit; so is `y`.
        log: Axes that are logarithmic: `x`, `y` or `xy`.
        low: The least y that is shown, where what lies below would squeeze the rest.
        rules: Values of y by name, drawn as lines across; `marks` are values of x.
        x_ticks: Places by what is written there, in place of numbers; so are `y_ticks`.
        names: `right` of the axes, at the ends of lines, or `beside` the last point.
        height: Inches; the picture is six wide.
    """

    x: str
    y: str
    series: Sequence[Series]
    title: str = ""
    log: Literal["", "x", "y", "xy"] = ""
    low: float | None = None
    rules: Mapping[str, float] = dataclasses.field(default_factory=dict)
    marks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    x_ticks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    y_ticks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    names: Literal["right", "beside"] = "right"
    height: float = 2.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """Panels in rows, so many of them beside each other; a name looks the same in all."""

    panels: Sequence[Panel]
    columns: int = 1

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Picture":
        """The picture whose `dataclasses.asdict` went through JSON."""
        panels = [
            Panel(**panel | {"series": [Series(**series) for series in panel["series"]]})
            for panel in record["panels"]
        ]
        return cls(panels=panels, columns=record["columns"])

    @property
    def source(self) -> str:
        """A digest of everything that it shows."""
        return storage.digest(json.dumps(dataclasses.asdict(self), sort_keys=True), length=16)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the first axis, and how far their 95 % intervals reach to either side.

    The interval is Student's; of one value it is nan.

    >>> mean, reach = interval(np.array([1.0, 2.0, 3.0]))
    >>> print(f"{mean:.3f} +- {reach:.3f}")  # t of two degrees of freedom is 4.303
    2.000 +- 2.484
    """
    n = len(values)
    mean = np.asarray(values.mean(0))
    if n < 2:
        return mean, np.full_like(mean, math.nan)
    quantile = scipy.special.stdtrit(n - 1, 0.975)
    return mean, np.asarray(quantile * values.std(0, ddof=1) / math.sqrt(n))


def look(number: int) -> dict[str, Any]:
    """How the series of a number is drawn: colour, marker and dashes.

    Of the first eleven no two have the same marker, and of the first 55 no two have the same marker
    and dashes.
    """
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


def draw(path: str | os.PathLike[str], picture: Picture) -> epath.Path:
    """Draws a picture into a PNG file, which appears whole or not at all.

    The file says what it was drawn of: its text `Source` is the picture's `source`.

    Returns:
        The path, local or remote.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with _styled():
        _save(compose(picture), path, picture.source)
    return epath.Path(path)


def draw_matrix(
    path: str | os.PathLike[str], shares: np.ndarray, names: Sequence[str], *, x: str, y: str
) -> epath.Path:
    """Draws a square matrix of shares between 0 and 1, with a name a row and column, as PNG."""
    with _styled():
        figure = _blank(_INCHES)
        axes = figure.subplots()
        axes.grid(False)
        picture = axes.imshow(shares, cmap="Greys", vmin=0, vmax=1)
        figure.colorbar(picture, ax=axes, shrink=0.5, label=f"share of {y}")
        axes.set(xlabel=x, ylabel=y)
        if len(names) <= 60:
            size = min(8.0, 240 / len(names))
            axes.set_xticks(range(len(names)), labels=names, rotation=90, fontsize=size)
            axes.set_yticks(range(len(names)), labels=names, fontsize=size)
        _save(figure, path, storage.digest(np.asarray(shares), length=16))
    return epath.Path(path)


def compose(picture: Picture) -> Any:
    """The matplotlib figure of a picture without panels that are empty; `draw` writes it."""
    shown = [panel for panel in picture.panels if any(any(s.runs) for s in panel.series)]
    panels, columns = shown or picture.panels[:1], picture.columns
    rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    every = dict.fromkeys(series.name for panel in panels for series in panel.series)
    looks = {name: look(number) for number, name in enumerate(every)}
    with _styled():
        figure = _blank(sum(heights))
        ratios = {"height_ratios": heights}
        grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=ratios).ravel()
        named = [_fill(axes, panel, looks) for axes, panel in zip(grid, panels)]
        for axes in grid[len(panels) :]:
            axes.remove()
        # Names at the right take room of the axes; those beside points ask where these are.
        for panel, names in zip(panels, named, strict=True):
            for name in names if panel.names == "right" else ():
                name.put_right()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, panel, names in zip(grid, panels, named):
            place = _place_right if panel.names == "right" else _place_beside
            place(axes, names)
    return figure


def _styled() -> contextlib.AbstractContextManager[Any]:
    return storage.require("matplotlib", extra="plots").rc_context(_STYLE)


def _blank(height: float) -> Any:
    # Without pyplot, which keeps figures alive and picks a backend for the whole process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: str | os.PathLike[str], made_of: str) -> None:
    metadata = {"Software": None, "Source": made_of}
    storage.write_atomic(path, lambda file: figure.savefig(file, format="png", metadata=metadata))


@dataclasses.dataclass
class _Name:
    """A name that is to stand beside a point `(x, y)` of its axes."""

    axes: Any
    text: str
    x: float
    y: float
    color: str
    artist: Any = None

    def put_right(self) -> None:
        self.artist = self.axes.annotate(
            self.text,
            (self.x, self.y),
            (1.04, 0.5),
            textcoords="axes fraction",
            va="center",
            color=_ink(self.color),
            annotation_clip=False,
            arrowprops=_leader(self.color) | {"relpos": (0, 0.5)},
        )


def _fill(axes: Any, panel: Panel, looks: Mapping[str, dict[str, Any]]) -> list[_Name]:
    """Draws a panel but for its names, which it returns."""
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.set_title(panel.title, pad=14 if panel.marks else 5)
    for axis in panel.log:
        axes.set(**{f"{axis}scale": "log"})
    if panel.names == "beside":
        axes.margins(0.08)
    names = []
    for series in panel.series:
        runs = np.asarray(series.runs, np.float64).reshape(len(series.runs), -1, 2)
        if not np.isfinite(runs).all(-1).any():
            continue
        mean = _draw_series(axes, series, runs, looks[series.name])
        x, y = mean[np.isfinite(mean).all(-1)][-1]
        names.append(_Name(axes, series.name, x, y, looks[series.name]["color"]))
    for name, y in panel.rules.items():
        axes.axhline(y, color=_GREY, linewidth=0.8, linestyle=":")
        names.append(_Name(axes, name, math.inf, y, _GREY))
    for name, x in panel.marks.items():
        axes.axvline(x, color=_GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            name, (x, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=_GREY
        )
    if panel.low is not None:
        # Intervals of what fell reach far up, and are not what is looked at.
        shown = [y for series in panel.series for run in series.runs for _, y in run]
        top = max([*shown, *panel.rules.values()])
        axes.set_ylim(panel.low, top + 0.05 * (top - panel.low))
    if panel.x_ticks:
        axes.set_xticks(list(panel.x_ticks.values()), labels=list(panel.x_ticks))
        axes.minorticks_off()
    if panel.y_ticks:
        axes.set_yticks(list(panel.y_ticks.values()), labels=list(panel.y_ticks))
        axes.set_ylim(min(panel.y_ticks.values()) - 0.7, max(panel.y_ticks.values()) + 1.5)
    for axis in panel.log:
        _plain_numbers(getattr(axes, f"{axis}axis"))
    low, high = sorted(axes.get_ylim())
    for name in names:
        if name.y < low:
            name.text += " (below)"
        name.y = min(max(name.y, low), high)
        name.x = min(name.x, axes.get_xlim()[1])
    return names


def _plain_numbers(axis: Any) -> None:
    """Enough numbers along a logarithmic axis, and none of them a power to be worked out."""
    from matplotlib.ticker import FixedLocator, LogLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if isinstance(axis.get_major_locator(), FixedLocator):
        return
    axis.set_major_formatter("{x:g}")
    if decades < 2.5:
        axis.set_minor_locator(LogLocator(subs=(2, 5) if decades > 0.7 else range(2, 10)))
        axis.set_minor_formatter("{x:g}")


def _draw_series(axes: Any, series: Series, runs: np.ndarray, style: dict[str, Any]) -> np.ndarray:
    """Runs, their means and intervals; returns the means `[points, 2]`."""
    mean, reach = interval(runs)
    reach = np.nan_to_num(reach)
    color, curve = style["color"], series.line and len(mean) > _MOST_POINTS
    style = style | ({} if series.line else {"linestyle": "none"})
    if len(runs) > 1:
        faint = {"linewidth": 0.5} if curve else {"linestyle": "none", "marker": style["marker"]}
        for run in runs:
            axes.plot(*run.T, color=color, alpha=0.3, markersize=2, markeredgewidth=0, **faint)
    if curve:
        axes.plot(*mean.T, markevery=0.15, **style)
        low, high = mean[:, 1] - reach[:, 1], mean[:, 1] + reach[:, 1]
        axes.fill_between(mean[:, 0], low, high, color=color, alpha=0.15, linewidth=0)
    else:
        bars = {f"{axis}err": r for axis, r in zip("xy", reach.T, strict=True) if r.any()}
        axes.errorbar(*mean.T, **bars, **style, elinewidth=0.9)
    return mean


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Places at least `gap` apart and as near what is wanted as can be, in the same order.

    The sum of squares of what they are moved by is least (isotonic regression). Where there is no
    room for all between `low` and `high` they reach beyond both alike.

    >>> apart([5.0, 5.0, 40.0], 10.0, 0.0, 100.0)
    array([ 0., 10., 40.])
    """
    order = np.argsort(wanted, kind="stable")
    steps = gap * np.arange(len(order))
    blocks: list[tuple[float, int]] = []
    for value in np.asarray(wanted, np.float64)[order] - steps:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, n), (a, m) = blocks.pop(), blocks.pop()
            blocks.append(((a * m + b * n) / (m + n), m + n))
    found = np.repeat([value for value, _ in blocks], [count for _, count in blocks])
    top = high - gap * (len(order) - 1)
    low, top = (low, top) if low <= top else ((low + top) / 2, (low + top) / 2)
    places = np.empty(len(order))
    places[order] = np.clip(found, low, top) + steps
    return places


def _place_right(axes: Any, names: Sequence[_Name]) -> None:
    if not names:
        return
    box = axes.get_window_extent()
    tall = max(extent(name.artist).height for name in names)
    wanted = [axes.transData.transform((name.x, name.y))[1] for name in names]
    places = apart(wanted, 1.1 * tall, box.y0, box.y1)
    for name, y in zip(names, places, strict=True):
        name.artist.set_y((y - box.y0) / box.height)


def _ink(color: str) -> str:
    """Letters are thin: those of light colours are darker than their lines."""
    return "#" + "".join(f"{int(int(color[i : i + 2], 16) * 0.75):02x}" for i in (1, 3, 5))


def _leader(color: str) -> dict[str, Any]:
    return {"arrowstyle": "-", "linewidth": 0.5, "color": color, "shrinkA": 1}


def extent(name: Any) -> Any:
    """The box of a name without the line that leads to its point."""
    from matplotlib.text import Text

    name.update_positions(name.figure.canvas.get_renderer())
    return Text.get_window_extent(name)


# Sides of a point where a name may be, those first that read best, and distances in pixels.
_SIDES = [(1, 0), (1, 1), (0, 1), (1, -1), (0, -1), (-1, 1), (-1, 0), (-1, -1)]
_SIDES += [(1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5)]
_FAR = (9, 18, 30, 45, 60, 80, 105, 135, 170, 210)


def _place_beside(axes: Any, names: Sequence[_Name]) -> None:
    """One name after another goes to the free place that is nearest its point."""
    inside = axes.get_window_extent().get_points()
    taken = _around(np.concatenate([_on_screen(axes, line) for line in axes.lines]), 4.0)
    put = np.empty((0, 2, 2))
    for name in names:
        at = axes.transData.transform((name.x, name.y))
        name.artist = axes.annotate(
            name.text,
            (name.x, name.y),
            (0, 0),
            textcoords="offset pixels",
            va="bottom",
            color=_ink(name.color),
            annotation_clip=False,
            arrowprops=_leader(name.color),
        )
        size = np.array(extent(name.artist).size) + np.array([6, 0])  # pixels between names
        places = []
        for far, side in itertools.product(_FAR, _SIDES):
            offset = np.array(side) * far + (np.array(side) - 1) / 2 * size
            box = np.array([at + offset, at + offset + size])
            # The way to the point may cross names no more than the name itself.
            way = _around(np.linspace(at, box.mean(0), 25)[3:-4], 1.5)
            covered = _shared(taken, box) + (_shared(put[:, None], way) if far > 18 else 0.0)
            worse = _shared(put, box) + round(size.prod() - _shared(box, inside))
            places.append((covered + 20 * worse, offset, box, way))
        # Nearer places come first, and `min` takes the first of equals.
        _, offset, box, way = min(places, key=lambda place: place[0])
        name.artist.set_position(tuple(offset))
        taken, put = np.concatenate([taken, way]), np.concatenate([put, box[None]])


def _on_screen(axes: Any, line: Any) -> np.ndarray:
    """Where a line has points, and where it passes between them."""
    data = np.asarray(line.get_xydata(), np.float64)
    if line.get_transform() != axes.transData or not len(data):
        return np.empty((0, 2))
    points = axes.transData.transform(data)
    points = points[np.isfinite(points).all(-1)]
    if line.get_linestyle() == "None" or len(points) < 2:
        return points
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    steps = np.linspace(0, length[-1], max(2, int(length[-1] / 8)))
    return np.stack([np.interp(steps, length, column) for column in points.T], -1)


def _around(points: np.ndarray, half: float) -> np.ndarray:
    """Boxes about points `[n, 2]`, each `[[x0, y0], [x1, y1]]`."""
    return np.stack([points - half, points + half], 1)


def _shared(boxes: np.ndarray, others: np.ndarray) -> float:
    """Area that boxes `[..., 2, 2]` have in common with others, summed over all pairs."""
    sides = np.minimum(boxes[..., 1, :], others[..., 1, :])
    sides = sides - np.maximum(boxes[..., 0, :], others[..., 0, :])
    return float(np.maximum(sides, 0).prod(-1).sum())

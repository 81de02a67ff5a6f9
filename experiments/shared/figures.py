"""Pictures for people: numbers in, a PNG in a uniform style out.

A `Picture` and its panels are plain values: they can be kept as JSON, checked without a renderer,
and drawn again. Every name has its colour, marker and dashes, so that series can be told apart in
grey. Names are at the ends of their lines or beside their points, where they cover nothing. A page
shows a picture 600 pixels wide, and letters are sized for that.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import scipy.special
from etils import epath

from experiments.shared.labels import Label, place_beside, place_right
from logitjax import storage

_INCHES, _DPI = 6.0, 150
# Okabe and Ito's colours, which colour-blind readers tell apart, without their yellow. The numbers
# of colours, markers and dashes have no common divisor.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
_MARKERS = "os^vDPX<>ph"
_DASHES = ((0, ()), (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (8, 2)))
_GREY = "#555555"
# More points than this make a curve: its runs are thin lines, and its interval is a band.
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
    """The measurements of one name.

    Attributes:
        name: Its label, which determines colour, marker and dashes.
        runs: Points `(x, y)` of each run, such as a seed, equally many in each. The i-th points of
            all runs are one measurement, drawn as their mean and its interval.
        line: Whether the means are joined.
    """

    name: str
    runs: Sequence[Sequence[Sequence[float]]]
    line: bool = True

    def __post_init__(self) -> None:
        lengths = {len(run) for run in self.runs}
        if len(lengths) > 1:
            raise ValueError(f"runs: expected as many points of {self.name} in each, got {lengths}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes.

    Attributes:
        x: Label of the horizontal axis, with its unit; `y` is that of the vertical one.
        log: Logarithmic axes: `x`, `y` or `xy`.
        low: The smallest y shown, if smaller values would squeeze the rest.
        rules: Values of y by name, drawn as lines across; `marks` are values of x.
        x_ticks: Positions by label, instead of numbers; so are `y_ticks`.
        names: Names go `right` of the axes, at the ends of lines, or `beside` the last point.
        height: Height in inches; the picture is six wide.
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
    """Panels in rows of a given length; a name looks the same in all."""

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
        return storage.digest(json.dumps(dataclasses.asdict(self), sort_keys=True), length=16)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means over the first axis, and half-widths of their 95 % intervals (Student's); or nan."""
    n = len(values)
    mean = np.asarray(values.mean(0))
    if n < 2:
        return mean, np.full_like(mean, math.nan)
    # For three runs a normal interval would be less than half as wide.
    quantile = scipy.special.stdtrit(n - 1, 0.975)
    return mean, np.asarray(quantile * values.std(0, ddof=1) / math.sqrt(n))


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a series number; the first 55 differ in the last two."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


def draw(path: str | os.PathLike[str], picture: Picture) -> epath.Path:
    """Draws a picture into a PNG file, which appears whole or not at all.

    The file names its data: its text `Source` is the picture's `source`.
    """
    with _styled():
        _save(compose(picture), path, picture.source)
    return epath.Path(path)


def compose(picture: Picture) -> Any:
    """The matplotlib figure of a picture, without empty panels; `draw` writes it."""
    shown = [panel for panel in picture.panels if any(any(s.runs) for s in panel.series)]
    panels, columns = shown or picture.panels[:1], picture.columns
    rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [max(panel.height for panel in row) for row in rows]
    every = dict.fromkeys(series.name for panel in panels for series in panel.series)
    # By the order of names over all panels, so that a name looks the same everywhere.
    looks = {name: look(number) for number, name in enumerate(every)}
    with _styled():
        figure = _blank(sum(heights))
        ratios = {"height_ratios": heights}
        grid = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw=ratios).ravel()
        named = [_fill(axes, panel, looks) for axes, panel in zip(grid, panels)]
        for axes in grid[len(panels) :]:
            axes.remove()
        # Names at the right take space from the axes; those beside points need the axes' position.
        for panel, names in zip(panels, named, strict=True):
            for name in names if panel.names == "right" else ():
                name.put_right()
        # Now the layout is known; it is frozen because labels that move must not move the axes.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes, panel, names in zip(grid, panels, named):
            place_labels = place_right if panel.names == "right" else place_beside
            place_labels(axes, names)
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
    # matplotlib needs Pillow anyway.
    from PIL import Image, PngImagePlugin

    about = PngImagePlugin.PngInfo()
    about.add_text("Source", made_of)
    figure.canvas.draw()
    # A palette image is a third of the size of a full-colour one, and a few lines need no more.
    drawn = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(128)
    storage.write_atomic(path, lambda file: drawn.save(file, "PNG", pnginfo=about, optimize=True))


def _fill(axes: Any, panel: Panel, looks: Mapping[str, dict[str, Any]]) -> list[Label]:
    """Draws a panel except for its names, which it returns."""
    axes.set(xlabel=panel.x, ylabel=panel.y)
    axes.set_title(panel.title, pad=14 if panel.marks else 5)
    for axis in panel.log:
        axes.set(**{f"{axis}scale": "log"})
    if panel.names == "beside":
        axes.margins(0.08)
    names = []
    for series in panel.series:
        if not any(series.runs):
            continue
        runs = np.asarray(series.runs, np.float64).reshape(len(series.runs), -1, 2)
        # Every value diverged: there is no last point to write the name at.
        if not np.isfinite(runs).all(-1).any():
            continue
        mean = _draw_series(axes, series, runs, looks[series.name])
        x, y = mean[np.isfinite(mean).all(-1)][-1]
        names.append(Label(axes, series.name, x, y, looks[series.name]["color"]))
    for name, y in panel.rules.items():
        axes.axhline(y, color=_GREY, linewidth=0.8, linestyle=":")
        names.append(Label(axes, name, math.inf, y, _GREY))
    for name, x in panel.marks.items():
        axes.axvline(x, color=_GREY, linewidth=0.8, linestyle=":")
        axes.annotate(
            name, (x, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom", color=_GREY
        )
    if panel.low is not None:
        # Intervals of falling curves reach far up, where nothing of interest is.
        shown = [y for series in panel.series for run in series.runs for _, y in run]
        top = max([*shown, *panel.rules.values()])
        axes.set_ylim(panel.low, top + 0.05 * (top - panel.low))
    if panel.x_ticks:
        axes.set_xticks(list(panel.x_ticks.values()), labels=list(panel.x_ticks))
        axes.minorticks_off()
    if panel.y_ticks:
        axes.set_yticks(list(panel.y_ticks.values()), labels=list(panel.y_ticks))
        axes.set_ylim(min(panel.y_ticks.values()) - 0.7, max(panel.y_ticks.values()) + 1.5)
    for name in panel.log:
        axis = getattr(axes, f"{name}axis")
        small, large = axis.get_view_interval()
        # All points at one place would leave no room.
        if large < 1.01 * small:
            axis.set_view_interval(small / 1.5, large * 1.5, ignore=True)
        _plain_numbers(axis)
    low, high = sorted(axes.get_ylim())
    for name in names:
        if name.y < low:
            name.text += " (below)"
        name.y = min(max(name.y, low), high)
        name.x = min(name.x, axes.get_xlim()[1])
    return names


def _plain_numbers(axis: Any) -> None:
    """Enough ticks along a logarithmic axis, written as plain numbers."""
    from matplotlib.ticker import FixedLocator, LogLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    # Ticks that the panel named stay.
    if isinstance(axis.get_major_locator(), FixedLocator):
        return
    axis.set_major_formatter("{x:g}")
    if decades < 2.5:
        axis.set_minor_locator(LogLocator(subs=(2, 5) if decades > 0.7 else range(2, 10)))
        axis.set_minor_formatter("{x:g}")


def _draw_series(axes: Any, series: Series, runs: np.ndarray, style: dict[str, Any]) -> np.ndarray:
    """Runs, their means and intervals; returns the means `[points, 2]`."""
    mean, reach = interval(runs)
    # A single run has no interval, so it gets no bar of length zero.
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

"""Labels that cover nothing: right of the axes, or beside their points."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.optimize

# Sides of a point where a name may be, the most readable first, and distances in pixels.
_SIDES = [(1, 0), (1, 1), (0, 1), (1, -1), (0, -1), (-1, 1), (-1, 0), (-1, -1)]
_SIDES += [(1, 0.5), (1, -0.5), (-1, 0.5), (-1, -0.5)]
_FAR = (9, 18, 30, 45, 60, 80, 105, 135, 170, 210)


@dataclasses.dataclass
class Label:
    """A label of the point `(x, y)` of matplotlib axes, and its artist, if any."""

    axes: Any
    text: str
    x: float
    y: float
    color: str
    artist: Any = None

    def put_right(self) -> None:
        """Draws it right of the axes, at an arbitrary height, so that the layout has room."""
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


def place_right(axes: Any, names: Sequence[Label]) -> None:
    """Moves labels from the right of the axes to the heights of their points, or near them."""
    if not names:
        return
    box = axes.get_window_extent()
    tall = max(extent(name.artist).height for name in names)
    items = [axes.transData.transform((name.x, name.y))[1] for name in names]
    places = apart(items, 1.1 * tall, box.y0, box.y1)
    for name, y in zip(names, places, strict=True):
        name.artist.set_y((y - box.y0) / box.height)


def place_beside(axes: Any, names: Sequence[Label]) -> None:
    """Draws one label after another at the free place that is nearest its point."""
    # Everything in pixels of the drawn figure, because letters have no size in data units.
    inside = axes.get_window_extent().get_points()
    drawn = [_on_screen(axes, line) for line in axes.lines]
    taken = _around(np.concatenate([np.empty((0, 2)), *drawn]), 4.0)
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
        # Pixels between names.
        size = np.array(extent(name.artist).size) + np.array([6, 0])
        places = []
        for far, side in itertools.product(_FAR, _SIDES):
            offset = np.array(side) * far + (np.array(side) - 1) / 2 * size
            box = np.array([at + offset, at + offset + size])
            # The line to the point must not cross names either.
            way = _around(np.linspace(at, box.mean(0), 25)[3:-4], 1.5)
            covered = _shared(taken, box) + (_shared(put[:, None], way) if far > 18 else 0.0)
            worse = _shared(put, box) + round(size.prod() - _shared(box, inside))
            places.append((covered + 20 * worse, offset, box, way))
        # Nearer places come first, and `min` takes the first of equals.
        _, offset, box, way = min(places, key=lambda candidate: candidate[0])
        name.artist.set_position(tuple(offset))
        taken, put = np.concatenate([taken, way]), np.concatenate([put, box[None]])


def apart(centres: Sequence[float], gap: float, low: float, high: float) -> np.ndarray:
    """Positions at least `gap` apart, as close to the wanted ones as possible, in the same order.

    The sum of squared moves is smallest (isotonic regression). If there is no room for all between
    `low` and `high`, they reach beyond both alike.

    >>> apart([5.0, 5.0, 40.0], 10.0, 0.0, 100.0)
    array([ 0., 10., 40.])
    """
    # Subtracting the steps turns "at least a gap apart" into "not decreasing".
    order = np.argsort(centres, kind="stable")
    steps = gap * np.arange(len(order))
    result = scipy.optimize.isotonic_regression(np.asarray(centres, float)[order] - steps).x
    top = high - gap * (len(order) - 1)
    # No room for all: centred, they stick out at both ends alike.
    low, top = (low, top) if low <= top else ((low + top) / 2, (low + top) / 2)
    places = np.empty(len(order))
    places[order] = np.clip(result, low, top) + steps
    return places


def extent(name: Any) -> Any:
    """The box of a name without the line that leads to its point."""
    from matplotlib.text import Text

    name.update_positions(name.figure.canvas.get_renderer())
    return Text.get_window_extent(name)


def _ink(color: str) -> str:
    """A darker colour for letters, which are thinner than their lines and would look too light."""
    return "#" + "".join(f"{int(int(color[i : i + 2], 16) * 0.75):02x}" for i in (1, 3, 5))


def _leader(color: str) -> dict[str, Any]:
    return {"arrowstyle": "-", "linewidth": 0.5, "color": color, "shrinkA": 1}


def _on_screen(axes: Any, line: Any) -> np.ndarray:
    """Points of a line, and positions that it passes in between."""
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

"""The width of a model from a spectrum: an interval with its reason, or none."""

import dataclasses
import math

import numpy as np

from logitjax.leakage import _residual as residuals
from logitjax.leakage._gram import Spectrum, Table, spectrum
from logitjax.leakage._residual import Residual
from logitjax.leakage._spectrum import fit_white_noise, spectrum_gaps

# A direction counts from this factor above the noise's edge, and closes the interval from here.
_COUNTED, _CLOSED = 1.1, 1.5
# Rows per direction for a reliable fit of the noise, because with fewer a few loud rows fit too;
# the second number applies if it confirms the declared noise.
_ROWS, _ROWS_CONFIRMED = 1.7, 1.1
# Directions this far above the rounding of the number format are not in one band of noise with it,
# which may lie on both sides of it.
_CLEAR = 30.0
# Scalings of rows and tokens until their noise has one variance.
_SWEEPS = 4
# Values this loud, in standard deviations, are separate directions under heavy tails.
_LOUD = 6.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputWidth:
    """The number of directions that rows span beyond their noise.

    Attributes:
        lower: Minimum number.
        estimate: The most likely number; None if none can be established.
        upper: Maximum number of directions stronger than `floor`; None if rows leave it open.
        reason: The evidence for it, or why it is not known.
        noise: Fitted standard deviation of a value's noise, 0 for rounding; None if none fits.
        floor: Singular value without noise below which a direction could have gone unseen.
    """

    lower: int
    estimate: int | None
    upper: int | None
    reason: str
    noise: float | None = None
    floor: float | None = None

    @property
    def certain(self) -> bool:
        """Whether it is one number; never under noise, which may hide weak directions."""
        return self.lower == self.estimate == self.upper and self.noise == 0.0

    def __str__(self) -> str:
        """`576`, `576 seen` under noise, `575 to 576`, `at least 503`, or `not known`."""
        if self.upper is None:
            return f"at least {self.lower}" if self.lower else "not known"
        if self.lower < self.upper:
            return f"{self.lower} to {self.upper}"
        return str(self.lower) if self.certain else f"{self.lower} seen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _View:
    """A table, its spectrum, and the declared noise and rounding of its rows."""

    table: Table
    spectrum: Spectrum
    gram: np.ndarray
    exact: float
    columns: int
    named: float | None

    @property
    def scales(self) -> tuple[np.ndarray, np.ndarray]:
        return self.table.scales or (np.ones(self.rows), np.ones(self.table.rows.shape[1]))

    @property
    def values(self) -> np.ndarray:
        return self.spectrum.values[: self.columns]

    @property
    def rows(self) -> int:
        return len(self.table.rows)


def judge_width(
    table: Table, gram: np.ndarray, *, step: float, columns: int, named: float | None
) -> OutputWidth:
    """The width that rows establish.

    Rows that were rounded alike count once. If everything beyond k directions is rounding, the
    width is k. Otherwise rows and tokens are scaled until their noise has one variance, which
    changes no rank, and the smallest k is taken beyond which both ends of the spectrum are those of
    white noise. If nothing fits there is only a lower bound, which assumes independent noise.

    `step` is the largest rounding error of a value, `named` the noise to test the fit against.
    Scales follow Landa, Zhang and Kluger, 2022 (Biwhitening reveals the rank of a count matrix),
    and also whiten noise of other variances.
    """
    exact = step * (math.sqrt(len(gram)) + math.sqrt(table.rows.shape[1]))
    if not np.trace(gram) > exact**2:
        return _open("only rounding is seen")
    if residuals.are_cut_off(table.rows):
        # Such rows are not linear images of hidden states, so their span says nothing about those.
        return _open("many values of a row are its smallest: they are cut off, or were filled in")
    once = residuals.first_of_alike(table.rows, gram, 2 * step)
    if alike := int((~once).sum()):
        table = dataclasses.replace(table, rows=table.rows[once], means=table.means[once])
        gram = gram[np.ix_(once, once)]
    seen = spectrum(table, gram)
    view = _View(table=table, spectrum=seen, gram=gram, exact=exact, columns=columns, named=named)
    width = _of_exact_rows(view)
    if width is None:
        view = dataclasses.replace(view, spectrum=spectrum(table, gram, fine=True))
        width = _of_noisy_rows(view)
    if alike:
        width = dataclasses.replace(width, reason=f"{width.reason}; {alike} rows repeat others")
    return width


def _open(why: str, lower: int = 0, noise: float | None = None) -> OutputWidth:
    return OutputWidth(lower=lower, estimate=None, upper=None, reason=why, noise=noise)


def _of_exact_rows(view: _View) -> OutputWidth | None:
    """All singular values after the k-th are rounding; None if they may be noise."""
    values, exact = view.values, max(view.exact, view.spectrum.floor)
    k = int((values > exact).sum())
    if not 0 < k < len(values) or values[k - 1] < _CLEAR * exact:
        return None
    message = "the rest is rounding"
    if view.named:
        message += f", noise of {view.named:.3g} would be seen"
    # Noise of a few rows gives each its own direction, which no other row confirms.
    share = 1.0 - (view.spectrum.left[:, :k] ** 2).sum(axis=1)
    if local := int((share < 1e-4 * (view.rows - k) / view.rows).sum()):
        message = (
            f"{local} rows have a direction each to themselves, as noise has; the rest is rounding"
        )
        return _open(message, lower=k - local)
    closed = values[k - 1] > 4 * _step(values, k) * exact
    if not closed:
        message += ", which may hide more of them"
    width = OutputWidth(
        lower=k, estimate=k, upper=k if closed else None, reason=message, noise=0.0, floor=exact
    )
    return _less_shared(view, width, exact / math.sqrt(max(view.rows, view.columns)))


def _of_noisy_rows(view: _View) -> OutputWidth:
    """White noise explains the end of the spectrum, once rows and tokens are scaled."""
    fit = None
    for sweep in range(_SWEEPS):
        noise = fit_white_noise(view.values, view.rows, view.columns)
        k = noise.above if noise else view.rows // 2
        left = residuals.residual(view.table, view.spectrum, k)
        if noise and left.even:
            # Tokens that differ make a few rows look even too, beyond too many directions.
            clear = 3 * k <= view.rows or view.values[k - 1] > _CLOSED * noise.edge
            fit = (view, noise, left) if fit is None or clear else fit
            if clear:
                break
        if sweep < _SWEEPS - 1:
            view = _evened(view, residuals.residual(view.table, view.spectrum, _gap(view)))
    if fit is None:
        gaps = spectrum_gaps(view.values)[: len(view.values) // 2]
        message = "no white noise explains the smaller singular values, however rows are scaled"
        if len(gaps):
            message += f"; the largest gap, {gaps.max():.2g} nats, lies at {gaps.argmax() + 1}"
        return _open(message, lower=_independent(view, view.rows // 2))
    view, noise, left = fit
    k = noise.above
    if k == 0:
        message = f"only white noise of {noise.sigma:.3g} is seen"
        return _open(message, noise=noise.sigma)
    # Declared by the API's operator and seen in the rows: then fewer rows are enough.
    agrees = view.named is not None and abs(noise.sigma / view.named - 1) <= 0.1
    least = _ROWS_CONFIRMED if agrees else _ROWS
    if min(view.rows, view.columns) < least * k:
        return _open(f"fewer than {least} rows for each direction", lower=_independent(view, k))
    if left.loudest > max(_LOUD, (view.rows * view.columns) ** 0.25):
        message = f"a value is {left.loudest:.1f} deviations off: heavy tails"
        return _open(message, lower=_independent(view, k))
    values = view.values
    message = f"white noise of {noise.sigma:.3g} explains the rest"
    if view.named is not None and not agrees:
        message += f", not the {view.named:.3g} that was named"
    # The observed spectrum shows how far below its last direction a further one would be.
    closed = k >= 4 and values[k - 1] > max(_CLOSED, _COUNTED * _step(values, k)) * noise.edge
    if not closed:
        message += ", which may hide more directions"
    by_row, by_token = view.scales
    squares = noise.sigma**2 * (1 / by_token**2).sum() / by_row**2
    if left.lone:
        closed = False
        message += ", and one of them may be a single loud row"
    if residuals.rows_apart(view.gram, squares) < 1.2 * k + 2:
        closed = False
        message += ", and few rows differ by more than that"
    width = OutputWidth(
        # Noise that is not quite white exceeds its edge without being a direction.
        lower=k if closed else _independent(view, k),
        estimate=k,
        upper=k if closed else None,
        reason=message,
        noise=noise.sigma,
        floor=noise.floor(view.rows, view.columns, _CLOSED * noise.edge),
    )
    return _less_shared(view, width, noise.sigma)


def _evened(view: _View, left: Residual) -> _View:
    """Scale rows and tokens by their residuals, so that noise has one size on average."""
    by_row = view.scales[0] * np.sqrt(np.median(left.by_row) / left.by_row)
    by_token = view.scales[1] * np.sqrt(np.median(left.by_token) / left.by_token)
    table = view.table.scaled((by_row, by_token))
    return dataclasses.replace(view, table=table, spectrum=spectrum(table, fine=True))


def _gap(view: _View) -> int:
    """The number of directions before the largest gap in the first half of the spectrum."""
    values = view.values[: max(2, view.rows // 2 + 1)]
    return int(np.argmax(spectrum_gaps(values))) + 1 if len(values) > 1 else 0


def _step(values: np.ndarray, k: int) -> float:
    """The largest factor between neighbours among the last directions: a quarter, at least 4."""
    last = values[max(0, k - 1 - max(4, k // 4)) : k]
    return float((last[:-1] / last[1:]).max()) if len(last) > 1 else 1.0


def _less_shared(view: _View, width: OutputWidth, sigma: float) -> OutputWidth:
    """Lower the bound by directions that may not be the model's."""
    lower, k, message = width.lower, width.estimate or 0, width.reason
    left, values = view.spectrum.left[:, :k], view.values[:k]
    rows, tokens = view.scales
    turned = sigma * math.sqrt(max(1, view.rows - k))
    if k > 1 and residuals.holds_vector(rows @ left, float(rows @ rows), values, turned):
        lower = min(lower, k - 1)
        message += (
            f"; all rows share an offset: {k} is the width behind a LayerNorm, {k - 1} with a bias "
            "on the output"
        )
    if k < 2 or view.table.centre:
        return dataclasses.replace(width, lower=lower, reason=message)
    inside = np.zeros(k)
    for where, block in view.table.blocks():
        inside += left.T @ (block @ tokens[where]) / values
    turned = sigma * math.sqrt(max(1, len(tokens) - k))
    if residuals.holds_vector(inside, float(tokens @ tokens), values, turned):
        lower = min(lower, k - 1)
        message += f"; log-probabilities that were not centred have one direction more than {k - 1}"
    return dataclasses.replace(width, lower=lower, reason=message)


def _independent(view: _View, most: int) -> int:
    """This many directions, up to `most`, exceed independent noise of any variances."""

    def stands(k: int) -> bool:
        edge = residuals.residual(view.table, view.spectrum, k).edge
        return bool(view.values[k] > max(_COUNTED * edge, view.spectrum.floor))

    low, high = 0, min(most, view.rows - 1, len(view.values))
    for k in (min(_gap(view), high) - 1, high - 1):
        if k >= low and stands(k):
            low = k + 1
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if stands(middle - 1) else (low, middle)
    return low

"""How wide a model is, from a spectrum: an interval and its reason, or none."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from logitjax.leakage._spectrum import WhiteNoise, fit_white_noise, noise_edge, spectrum_gaps

# A direction counts from so far above the noise's edge, and closes the interval from there.
_COUNTED, _CLOSED = 1.05, 1.5
# Rows for each direction from which the fit of the noise is to be believed, as below them a few
# loud rows make a fit too; the second where it confirms the noise that was named.
_ROWS, _ROWS_CONFIRMED = 1.7, 1.1
# A named noise may be so much off before it misleads a lower bound.
_NAMED_OFF = 1.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputWidth:
    """The number of directions that rows span beyond their noise.

    Attributes:
        lower: At least so many.
        estimate: The most likely number; None where none can be established.
        upper: At most so many, as far as directions stronger than `floor` go; None where the rows
            leave it open.
        reason: What that rests on, or why there is no more to say.
        noise: Standard deviation of a value's noise as it was fitted, 0 for rounding; None where
            none fits.
        floor: A direction whose singular value without noise is smaller could have gone unseen.
    """

    lower: int
    estimate: int | None
    upper: int | None
    reason: str
    noise: float | None = None
    floor: float | None = None

    @property
    def certain(self) -> bool:
        """Whether it is one number, and nothing but rounding is left that could hide another.

        Under noise it never is: directions weaker than `floor` cannot be excluded.
        """
        return self.lower == self.estimate == self.upper and self.noise == 0.0

    def __str__(self) -> str:
        """`576`, `576 seen` under noise, `575 to 576`, `at least 503`, or `not known`."""
        if self.upper is None:
            return f"at least {self.lower}" if self.lower else "not known"
        if self.lower < self.upper:
            return f"{self.lower} to {self.upper}"
        return str(self.lower) if self.certain else f"{self.lower} seen"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evidence:
    """What there is to judge a width by.

    Attributes:
        values: Singular values, falling, not clipped.
        rows: Number of rows.
        columns: Number of columns; one less where the rows' means were taken out.
        exact: Singular value that rounding of the rows' number format and of the method explains.
        diffuse: Gives a singular value that independent noise of any variances stays below.
        named: Standard deviation of the noise, if it was named.
        cut_off: Whether many values of a row are its smallest one.
        distinct: Given a distance, root mean square over tokens, how many rows have no earlier one
            as near.
        white: Whether the noise beyond so many directions has one variance in all tokens and rows.
        offset: Whether so many directions, under noise of that sigma, hold an offset that all rows
            share.
        normaliser: Likewise, whether they hold the ones vector over the vocabulary.
    """

    values: np.ndarray
    rows: int
    columns: int
    exact: float
    diffuse: Callable[[], float]
    named: float | None
    cut_off: Callable[[], bool]
    distinct: Callable[[float], int]
    white: Callable[[int], bool]
    offset: Callable[[int, float], bool]
    normaliser: Callable[[int, float], bool]


def judge_width(seen: Evidence) -> OutputWidth:
    """The width that the evidence establishes.

    Where everything beyond k directions is rounding, that is k. Else the noise is fitted
    (`fit_white_noise`) and has to prove white; a named noise is held against it, not believed.
    Where nothing fits there is a lower bound only.
    """
    values = seen.values
    if not (values > seen.exact).any():
        return OutputWidth(
            lower=0, estimate=None, upper=None, reason="nothing but rounding is seen"
        )
    if seen.cut_off():
        # Such rows are no linear images of hidden states: what they span says nothing of those.
        said = "many values of a row are its smallest: they are cut off, or were filled in"
        return OutputWidth(lower=0, estimate=None, upper=None, reason=said)
    above = int((values > seen.exact).sum())
    if above < len(values):
        return _of_exact_rows(seen, above)
    noise = fit_white_noise(values, seen.rows, seen.columns)
    if noise is None:
        said = (
            "no white noise explains the smaller singular values: too few rows for this width, or "
            "another noise"
        )
        gaps = spectrum_gaps(values)[: len(values) // 2]
        if len(gaps):
            said += f"; the largest gap, {gaps.max():.2g} nats, lies at {gaps.argmax() + 1}"
        return _refused(seen, said)
    if noise.above == 0:
        return OutputWidth(
            lower=0,
            estimate=None,
            upper=None,
            reason=f"nothing but white noise of {noise.sigma:.3g} is seen",
            noise=noise.sigma,
        )
    # Named by whoever runs the API and seen in the rows: then fewer rows are enough.
    confirmed = seen.named is not None and abs(noise.sigma / seen.named - 1) <= 0.1
    least = _ROWS_CONFIRMED if confirmed else _ROWS
    if min(seen.rows, seen.columns) < least * noise.above:
        return _refused(seen, f"fewer than {least} rows for each direction")
    if not seen.white(noise.above):
        return _refused(seen, "the noise differs between tokens or rows, none can be fitted")
    return _of_noisy_rows(seen, noise)


def _of_exact_rows(seen: Evidence, k: int) -> OutputWidth:
    """All singular values after the k-th are rounding."""
    said = "the rest is rounding"
    if seen.named:
        said += f", noise of {seen.named:.3g} would be seen"
    # Prompts with one answer are one row: the rank is then what was asked, not the width.
    if seen.distinct(0.0) <= k:
        said = "as many directions as rows that differ"
        return OutputWidth(lower=k, estimate=None, upper=None, reason=said, floor=seen.exact)
    closed = seen.values[k - 1] > 4 * max(1.0, _step(seen.values, k)) * seen.exact
    if not closed:
        said += ", which may hide more of them"
    found = OutputWidth(
        lower=k, estimate=k, upper=k if closed else None, reason=said, noise=0.0, floor=seen.exact
    )
    return _less_shared(seen, found, 0.0)


def _of_noisy_rows(seen: Evidence, noise: WhiteNoise) -> OutputWidth:
    k, values = noise.above, seen.values
    said = f"white noise of {noise.sigma:.3g} explains the rest"
    if seen.named is not None and abs(noise.sigma / seen.named - 1) > 0.1:
        said += f", not the {seen.named:.3g} that was named"
    step = _step(values, k)
    # What was seen of the spectrum says how far below its last direction a further one would be.
    closed = k >= 4 and values[k - 1] > max(_CLOSED, _COUNTED * step) * noise.edge
    if not closed:
        said += ", which may hide more directions"
    if seen.distinct(math.sqrt(2.0) * noise.sigma * 1.2) < _ROWS_CONFIRMED * k:
        closed = False
        said += ", and few rows differ by more than that"
    found = OutputWidth(
        lower=int((values > _COUNTED * noise.edge).sum()),
        estimate=k,
        upper=k if closed else None,
        reason=said,
        noise=noise.sigma,
        floor=noise.floor(seen.rows, seen.columns, _CLOSED * noise.edge),
    )
    return _less_shared(seen, found, noise.sigma)


def _step(values: np.ndarray, k: int) -> float:
    """The largest factor between neighbours among the last directions: a quarter, at least 4."""
    last = values[max(0, k - 1 - max(4, k // 4)) : k]
    return float((last[:-1] / last[1:]).max()) if len(last) > 1 else 1.0


def _less_shared(seen: Evidence, found: OutputWidth, sigma: float) -> OutputWidth:
    """Lowers the bound by directions that may not be the model's."""
    k = found.estimate
    assert k is not None
    lower, said = found.lower, found.reason
    if k > 1 and seen.offset(k, sigma):
        lower = min(lower, k - 1)
        said += (
            f"; all rows share an offset: {k} is the width behind a LayerNorm, {k - 1} with a bias "
            "on the output"
        )
    if k > 1 and seen.normaliser(k, sigma):
        lower = min(lower, k - 1)
        said += f"; log-probabilities that were not centred have one direction more than {k - 1}"
    return dataclasses.replace(found, lower=lower, reason=said)


def _refused(seen: Evidence, why: str) -> OutputWidth:
    """A lower bound, which asks of the noise only to be independent, or no larger than named."""
    lower = int((seen.values > _COUNTED * seen.diffuse()).sum())
    if seen.named is not None:
        edge = _NAMED_OFF * float(noise_edge(seen.named, seen.rows, seen.columns))
        lower = max(lower, int((seen.values > max(edge, seen.exact)).sum()))
    return OutputWidth(lower=lower, estimate=None, upper=None, reason=why)

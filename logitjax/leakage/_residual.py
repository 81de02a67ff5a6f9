"""Parts of rows beyond their first directions, and the content of those directions."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

from logitjax.leakage._gram import BLOCK, Spectrum, Table
from logitjax.ops import Array

# Values of a row whose differences to the nearest row are compared, and the share of them that is
# one number if the rows were rounded alike.
_SAMPLE, _ALIKE = 512, 1 / 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Residual:
    """The rest of a table beyond its first directions."""

    by_row: np.ndarray  # [n], variance of each row's noise
    by_token: np.ndarray  # [vocab], likewise
    # Whether the variance is the same in all tokens and in all rows.
    even: bool
    # The largest residual, in standard deviations.
    loudest: float
    # Whether a direction may be one loud row, or one loud value of it.
    lone: bool
    # Singular value that independent noise of any variances stays below.
    edge: float


def residual(table: Table, full: Spectrum, k: int) -> Residual:
    """Subtract a table's first `k` directions, block by block.

    `edge` is ``max_i |row_i| + max_v |column_v|`` (Bandeira and van Handel, 2016, theorem 1.1).
    """
    count, vocab = table.rows.shape
    left = full.left[:, :k]
    free, share = count - k, 1.0 - (left**2).sum(axis=1)
    by_row, loudest = np.zeros(count), np.zeros(count)
    by_token, fitted = np.zeros(vocab), np.zeros(vocab)
    for where, block in table.blocks():
        inside = left.T @ block
        fitted[where] = ((inside / np.maximum(full.values[:k, None], 1e-30)) ** 2).sum(axis=0)
        block -= left @ inside
        block *= block
        by_row += block.sum(axis=1)
        by_token[where] = block.sum(axis=0)
        loudest = np.maximum(loudest, block.max(axis=1))
    # Rows with almost no remainder have a direction each to themselves, as loud noise has and
    # hidden states have not.
    local = share <= 0.25 * free / count
    least = 0.7 if fitted.max() > 0.3 else 0.25
    lone = 3 * k <= count and share.min() < least * free / count
    share = np.maximum(share, 1e-6)
    # A projection removes twice as much noise from a row or token as from the unit vector.
    edge = np.sqrt((by_row / share**2).max())
    edge += np.sqrt((by_token / np.maximum(1.0 - fitted, 1e-6) ** 2).max() * count / free)
    by_row, by_token = by_row / share / vocab, by_token / free
    if not local.all():
        by_row[local] = np.median(by_row[~local])
    # Exact rows or tokens have no scale of their own.
    mean = max(float(by_token.mean()), 1e-30)
    by_row, by_token = (np.maximum(part, 1e-12 * mean) for part in (by_row, by_token))
    some = by_row[~local]
    # Loud tokens take directions as loud rows do, which evens the rest. A variance from m normal
    # values varies by sqrt(2 / m) of itself.
    even = local.mean() <= 0.1 and (fitted > 0.5).sum() <= 0.1 * k
    even = even and by_token.std() <= 1.25 * np.sqrt(2 / free) * mean
    even = even and some.std() <= (1.5 * np.sqrt(2 / vocab) + 0.05) * some.mean()
    return Residual(
        by_row=by_row,
        by_token=by_token,
        even=bool(even),
        loudest=float(np.sqrt((loudest / share)[~local].max(initial=0.0) / mean)),
        lone=bool(lone),
        edge=float(edge),
    )


def first_of_alike(rows: np.ndarray, gram: Float[np.ndarray, "n n"], step: float) -> np.ndarray:
    """Rows whose rounding is not that of an earlier row, which would make noise dependent.

    Two rows that are rounded alike share cells, so many of their values differ by one number.
    """
    squares = np.diagonal(gram)
    apart = squares[:, None] + squares[None, :] - 2 * gram
    apart[np.triu_indices(len(gram))] = np.inf
    nearest = apart.argmin(axis=1)
    vocab = rows.shape[1]
    columns = np.random.default_rng(0).permutation(vocab)[:_SAMPLE]
    some = np.asarray(rows[:, columns], np.float64)
    differences = np.sort(some - some[nearest], axis=1)
    width = max(2, int(_ALIKE * len(columns)))
    if len(columns) <= width:
        return np.ones(len(rows), bool)
    spread = (differences[:, width:] - differences[:, :-width]).min(axis=1)
    alike = spread <= step
    alike[0] = False
    return ~alike


def are_cut_off(rows: Float[Array, "n vocab"]) -> bool:
    """Whether many of a row's values are its smallest one, as under a floor or beyond a top-k."""
    some = np.asarray(rows[:: max(1, len(rows) // 32)], np.float32)
    ties = (some == some.min(axis=1, keepdims=True)).sum(axis=1).mean()
    return bool(ties > max(4.0, 0.002 * some.shape[1]))


def holds_vector(
    inside: Float[np.ndarray, " k"],
    squared_norm: float,
    values: Float[np.ndarray, " k"],
    noise: float,
) -> bool:
    """Whether a vector may lie in the span of singular vectors that noise has rotated."""
    outside = squared_norm - float(inside @ inside)
    turned = noise**2 * float(((inside / values) ** 2).sum())
    return outside <= 4 * turned + 1e-12 * squared_norm


def rows_apart(gram: Float[np.ndarray, "n n"], noise: Float[np.ndarray, " n"]) -> int:
    """The number of rows with no earlier one as near as noise with these squares allows."""
    squares = np.diagonal(gram)
    apart = squares[:, None] + squares[None, :] - 2 * gram
    # Three times the expectation: one row too few only leaves a width open.
    near = apart <= 3.0 * (noise[:, None] + noise[None, :]) + 1e-13 * squares.max()
    return len(gram) - int(np.tril(near, -1).any(axis=1).sum())


def finite_columns(rows: np.ndarray) -> Bool[np.ndarray, " vocab"]:
    blocks = range(0, rows.shape[1], BLOCK)
    return np.concatenate([np.isfinite(rows[:, i : i + BLOCK]).all(axis=0) for i in blocks])

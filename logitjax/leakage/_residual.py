"""What lies beyond the first directions of rows, and what those directions hold."""

import numpy as np
from jaxtyping import Bool, Float

from logitjax.ops import Array

#: Columns that a test of the noise looks at.
_SAMPLE = 2048


def white_residual(
    rows: Float[Array, "n vocab"], means: Float[np.ndarray, " n"], left: Float[np.ndarray, "n k"]
) -> bool:
    """Whether what `left` leaves of the rows has one variance in all tokens and in all rows."""
    count, vocab = rows.shape
    size = min(vocab, _SAMPLE)
    columns = np.sort(np.random.default_rng(0).choice(vocab, size, replace=False))
    part = np.asarray(rows[:, columns], np.float64) - means[:, None]
    part = part - left @ (left.T @ part)
    free = count - left.shape[1]
    by_token = (part**2).sum(axis=0) / free
    # What a row has left is less the more of it `left` explains; rows of which nearly nothing is
    # left had a direction each to themselves, as loud noise has and hidden states have not.
    share = 1.0 - (left**2).sum(axis=1)
    some = share > 0.25 * free / count
    if some.mean() < 0.9:
        return False
    by_row = (part[some] ** 2).mean(axis=1) / share[some]
    # A variance from m normal values varies by sqrt(2 / m) of itself.
    tokens_alike = by_token.std() <= 1.25 * np.sqrt(2 / free) * by_token.mean()
    rows_alike = by_row.std() <= (1.5 * np.sqrt(2 / size) + 0.05) * by_row.mean()
    return bool(tokens_alike and rows_alike)


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
    """Whether a vector may lie in the span of singular vectors that noise has turned."""
    outside = squared_norm - float(inside @ inside)
    turned = noise**2 * float(((inside / values) ** 2).sum())
    return outside <= 4 * turned + 1e-12 * squared_norm


def rows_apart(gram: Float[np.ndarray, "n n"], distance: float) -> int:
    """The number of rows of which no earlier one is as near as `distance`."""
    squares = np.diagonal(gram)
    apart = squares[:, None] + squares[None, :] - 2 * gram
    near = apart <= distance**2 + 1e-13 * squares.max()
    return len(gram) - int(np.tril(near, -1).any(axis=1).sum())


def finite_columns(rows: np.ndarray, *, block_size: int) -> Bool[np.ndarray, " vocab"]:
    """Columns without a NaN or an infinity."""
    blocks = range(0, rows.shape[1], block_size)
    return np.concatenate([np.isfinite(rows[:, i : i + block_size]).all(axis=0) for i in blocks])


def diffuse_edge(rows: np.ndarray, means: Float[np.ndarray, " n"], *, block_size: int) -> float:
    """A singular value that independent noise stays below, whatever its variances.

    ::

        max_i |row_i| + max_v |column_v|

    of the rows themselves, whose signal makes it too large, which is on the safe side.

    References:
        Bandeira and van Handel, 2016 (Annals of Probability 44), theorem 1.1.
    """
    by_row, by_column = np.zeros(len(rows)), 0.0
    for start in range(0, rows.shape[1], block_size):
        block = rows[:, start : start + block_size].astype(np.float64) - means[:, None]
        by_row += np.einsum("nv,nv->n", block, block)
        by_column = max(by_column, float(np.einsum("nv,nv->v", block, block).max()))
    return float(np.sqrt(by_row.max()) + np.sqrt(by_column))

"""Gram matrix and projection of rows by BLAS: XLA on CPU computes both halves, and copies."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg

# Number of tokens at a time.
BLOCK = 8192
_dsyrk: Any = scipy.linalg.get_blas_funcs("syrk", dtype=np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Rows minus their means, visited by blocks of tokens."""

    rows: np.ndarray  # [n, vocab]
    means: np.ndarray  # [n], zero unless rows are centred
    centre: bool
    scales: tuple[np.ndarray, np.ndarray] | None = None  # [n] and [vocab], of rows and tokens

    @classmethod
    def of(cls, rows: np.ndarray, *, centre: bool) -> "Table":
        return cls(rows=rows, means=np.zeros(len(rows)), centre=centre).scaled(None)

    def scaled(self, scales: tuple[np.ndarray, np.ndarray] | None) -> "Table":
        """Return rows with other scales, and means that loud tokens do not dominate."""
        vocab = self.rows.shape[1]
        weights = np.ones(vocab) if scales is None else scales[1] ** 2
        plain = dataclasses.replace(self, means=np.zeros(len(self.rows)), scales=None)
        means = np.zeros(len(self.rows))
        for where, block in plain.blocks() if self.centre else ():
            # Any weights remove the normaliser. Those of the scales leave white noise white.
            means += block @ weights[where] / weights.sum()
        return dataclasses.replace(self, means=means, scales=scales)

    def blocks(self, left: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Float64 blocks of columns, without the directions `left`."""
        for start in range(0, self.rows.shape[1], BLOCK):
            where = slice(start, start + BLOCK)
            # The caller checks for infinities.
            with np.errstate(invalid="ignore"):
                block = self.rows[:, where].astype(np.float64) - self.means[:, None]
            if self.scales is not None:
                block *= self.scales[0][:, None] * self.scales[1][where]
            if left is not None:
                block -= left @ (left.T @ block)
            yield where, block


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spectrum:
    """Decreasing singular values, the method's value for a zero, and left vectors."""

    values: np.ndarray
    floor: float
    left: np.ndarray
    gram: np.ndarray


def spectrum(table: Table, gram: np.ndarray | None = None, *, fine: bool = False) -> Spectrum:
    """The spectrum of a table by its Gram matrix, from `gram` if given.

    Float64 loses values below 1e-8 of the first; `fine` visits the table again for them.
    """
    gram = gram_matrix(table) if gram is None else gram
    if not np.isfinite(gram).all():
        unknown = np.full(len(gram), np.nan)
        return Spectrum(values=unknown, floor=np.nan, left=gram, gram=gram)
    squares, left = (part[..., ::-1] for part in np.linalg.eigh(gram))
    top = int((squares > 1e-8 * squares[0]).sum())
    floor = squares[0]
    if fine and 0 < top < len(gram):
        rest, turned = np.linalg.eigh(gram_matrix(table, left[:, :top]))
        # Directions that were removed come back as zeros.
        kept = slice(None, top - 1, -1)
        squares = np.concatenate([squares[:top], rest[kept]])
        left = np.concatenate([left[:, :top], turned[:, kept]], axis=1)
        floor = max(squares[top], 1e-24 * squares[0])
    # The square root of float64's precision, because values were squared.
    floor = 8 * (np.finfo(np.float64).eps * max(floor, 0.0)) ** 0.5
    return Spectrum(values=np.sqrt(np.maximum(squares, 0.0)), floor=floor, left=left, gram=gram)


def gram_matrix(table: Table, left: np.ndarray | None = None) -> np.ndarray:
    """``Q Q^T``, beyond the directions `left`: half of the products, one block in memory."""
    # In float64: the Gram matrix squares the singular values, so float32 would lose every
    # direction below 3e-4 of the first.
    count = len(table.rows)
    total = np.zeros((count, count), order="F")
    for _, block in table.blocks(left):
        # Fortran reads a transposed view without a copy.
        total = _dsyrk(1.0, block.T, beta=1.0, c=total, trans=True, lower=True, overwrite_c=True)
    return total + np.tril(total, -1).T


def project(rows: np.ndarray, left: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """``(rows - mean)^T left`` in float32, ``[vocab, k]``; BLAS copies only a few columns."""
    left = np.ascontiguousarray(left, np.float32)
    shift = 0.0 if mean is None else mean.astype(np.float32) @ left
    product = np.empty((rows.shape[1], left.shape[1]), np.float32)
    for start in range(0, len(product), BLOCK):
        block = rows[:, start : start + BLOCK].astype(np.float32, copy=False)
        product[start : start + BLOCK] = block.T @ left - shift
    return product

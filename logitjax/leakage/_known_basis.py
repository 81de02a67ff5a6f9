"""Whole rows from a few of their values, once a basis of all rows is known."""

import dataclasses

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from logitjax.ops import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class BasisFit:
    """Rows ``[n, vocab]`` found from a basis, and their coefficients.

    Attributes:
        residual: root mean square of what the given values leave unexplained, in their units.
        condition: condition number of the basis at the chosen tokens: by it errors of the values
            are multiplied at most.
    """

    rows: np.ndarray
    coefficients: np.ndarray
    residual: float
    condition: float


def choose_tokens(basis: Float[Array, "vocab rank"], count: int) -> Int[np.ndarray, " count"]:
    """Tokens at which to ask, so that `rows_from_basis` is well-conditioned.

    Pivoted QR picks the first ``rank``; the rest have the largest rows of the basis that remain.
    """
    basis = np.asarray(basis, np.float64)
    vocab, rank = basis.shape
    if not rank <= count <= vocab:
        raise ValueError(
            f"count: expected a number between the rank {rank} and the vocabulary, got {count}"
        )
    order: np.ndarray = scipy.linalg.qr(basis.T, mode="r", pivoting=True)[-1]  # pyright: ignore
    first = order[:rank]
    rest = np.setdiff1d(np.arange(vocab), first)
    size = np.einsum("vr,vr->v", basis[rest], basis[rest])
    return np.concatenate([first, rest[np.argsort(-size)[: count - rank]]])


def rows_from_basis(
    basis: Float[Array, "vocab rank"],
    tokens: Int[Array, " m"],
    values: Float[Array, "n m"],
    *,
    unknown_shift: bool = True,
    largest_condition: float = 1e6,
) -> BasisFit:
    """Least squares for each row's place in a known basis.

    ``values = basis[tokens] c + shift``, then ``row = basis c + shift``: h + 1 values say all V.
    The shift is each row's normaliser, where they are log-probabilities and the basis is of centred
    rows. A condition beyond the largest is refused.
    """
    basis = np.asarray(basis, np.float64)
    tokens = np.asarray(tokens)
    values = np.asarray(values, np.float64)
    if values.shape[-1] != len(tokens):
        raise ValueError(f"values: expected [n, {len(tokens)}] as tokens, got {values.shape}")
    known = basis
    if unknown_shift:
        known = np.concatenate([basis, np.ones((len(basis), 1))], axis=1)
    unknowns = known.shape[1]
    if len(tokens) < unknowns:
        raise ValueError(
            f"{len(tokens)} values a row cannot settle {unknowns} unknowns; "
            f"ask for {2 * unknowns} tokens"
        )
    system = known[tokens]
    found, _, _, singular = np.linalg.lstsq(system, values.T, rcond=None)
    condition = float(singular[0] / singular[-1]) if singular[-1] > 0 else float("inf")
    if condition > largest_condition:
        raise ValueError(
            f"the basis at these {len(tokens)} tokens has condition {condition:.2g}, more than "
            f"largest_condition={largest_condition:.2g}: take more tokens, or choose_tokens()"
        )
    residual = float(np.sqrt(np.mean((system @ found - values.T) ** 2)))
    return BasisFit(
        rows=(known @ found).T,
        coefficients=found[: basis.shape[1]].T,
        residual=residual,
        condition=condition,
    )

"""How much of a known head a recovered subspace holds: the auditor's metrics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from logitjax.ops import Array, checks, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadAlignment:
    """A recovered subspace beside the head that made it.

    Attributes:
        relative_rms: ``|W - basis G| / |W|``, with the best G.
        overlap: mean squared cosine of the principal angles, over the head's dimensions.
        max_angle: the largest principal angle, degrees.
        chance: overlap of a random subspace of this size: dimension / V.
        leak: overlap beyond chance: 0 for a random subspace, 1 for the head's own.
    """

    relative_rms: float
    overlap: float
    max_angle: float
    chance: float
    leak: float


def align_head(
    basis: Float[Array, "vocab dimension"],
    head: Float[Array, "_ hidden"],
    *,
    centre: bool = True,
) -> HeadAlignment:
    """Align a recovered subspace to the true head, up to GL(h); an audit knows both.

    ::

        G = argmin |W - basis G|_F,     leak = (mean cos^2 - d / V) / (1 - d / V)

    Args:
        basis: ``[vocab, dimension]``, any columns that span the subspace.
        head: ``[vocab, hidden]``, W with its final norm's gain or without: the span of the rows
            over the vocabulary does not depend on it.
        centre: compare with ``W`` less its mean over the vocabulary, which is all that
            log-probabilities hold.

    Raises:
        ValueError: vocabularies differ.

    References:
        Carlini et al., 2024, appendix B: error after least squares. Chance correction ours.

    >>> head = np.random.default_rng(0).standard_normal((30, 2))
    >>> found = align_head(head @ np.array([[2.0, 1.0], [0.0, 1.0]]), head, centre=False)
    >>> print(round(found.leak, 6), round(found.relative_rms, 6))
    1.0 0.0
    """
    checks.shapes(basis=(basis, "float vocab dimension"), head=(head, "float vocab hidden"))
    for name, rows in (("basis", basis), ("head", head)):
        checks.values(rows, np.isfinite, name, "finite numbers")
    basis = np.asarray(basis, np.float64)
    head = np.asarray(head, np.float64)
    if centre:
        head = head - head.mean(axis=0)
    vocab, dimension = basis.shape
    q = _orthonormal(basis)
    inside = q.T @ head
    norm = np.linalg.norm(head)
    # |W|^2 - |Q^T W|^2 would lose the digits that matter when the fit is good.
    error = np.linalg.norm(head - q @ inside)
    # Singular values of the product of two orthonormal bases: cosines of the principal angles.
    cosines = np.clip(
        np.linalg.svd(q.T @ _orthonormal(np.asarray(head)), compute_uv=False), 0.0, 1.0
    )
    width = head.shape[1]
    overlap = float((cosines**2).sum() / width)
    # A random subspace holds this share of any direction, on average.
    chance = dimension / vocab
    smallest = cosines.min() if dimension >= width else 0.0
    return HeadAlignment(
        relative_rms=float(error / norm),
        overlap=overlap,
        max_angle=float(np.degrees(np.arccos(smallest))),
        chance=chance,
        leak=float((overlap - chance) / (1 - chance)),
    )


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """Orthonormal columns of the same span, twice by Cholesky: several times faster than QR."""
    q = columns
    for _ in range(2):
        try:
            factor = scipy.linalg.cholesky(q.T @ q, lower=True)
        except np.linalg.LinAlgError:
            return np.linalg.qr(columns)[0]  # Too near to dependent for a Gram matrix.
        q = scipy.linalg.solve_triangular(factor, q.T, lower=True).T
    # The second pass sees what the first left: near the identity, or the Gram matrix lost it.
    lost = abs(np.diag(factor) - 1).max() > 0.1
    return np.linalg.qr(columns)[0] if lost else q


def utility_loss(
    true_log_probs: Float[Array, "n vocab"], served_log_probs: Float[Array, "n vocab"]
) -> dict[str, float]:
    """What a defence costs honest users: mean `kl` in nats; shares of equal `top1` and `top5`."""
    truth = np.asarray(true_log_probs, np.float32)
    served = np.asarray(served_log_probs, np.float32)
    return {name: float(value) for name, value in _utility_loss(truth, served).items()}


@jax.jit
def _utility_loss(truth: jax.Array, served: jax.Array) -> dict[str, jax.Array]:
    served = served - jnp.log(jnp.sum(jnp.exp(served), axis=-1, keepdims=True))
    kl = jnp.sum(jnp.exp(truth) * (truth - served), axis=-1)
    width = min(5, truth.shape[-1])
    _, mine = top_k(truth, width)
    _, theirs = top_k(served, width)
    shared = (mine[:, :, None] == theirs[:, None, :]).any(-1).mean(-1)
    return {
        "kl": kl.mean(),
        "top1": (mine[:, 0] == theirs[:, 0]).mean(),
        "top5": shared.mean(),
    }

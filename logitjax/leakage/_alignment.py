"""Share of a known head that a recovered subspace contains: the auditor's metrics."""

import dataclasses

import numpy as np
from jaxtyping import Float

from logitjax.ops import Array, checks, top_k


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadAlignment:
    """A recovered subspace compared with the true head."""

    # |W - basis G| / |W|, with the best G.
    relative_rms: float
    # Mean squared cosine of the principal angles, over the head's dimensions.
    overlap: float
    # Overlap of a random subspace of this size: dimension / V.
    chance: float
    # Overlap beyond chance: 0 for a random subspace, 1 for the head's own.
    leak: float


def align_head(
    basis: Float[Array, "vocab dimension"], head: Float[Array, "_ hidden"], *, centre: bool = True
) -> HeadAlignment:
    """Align a recovered subspace to the true head, up to GL(h); an audit knows both.

    As in Carlini et al., 2024, appendix B: error after least squares. Chance correction ours. ::

        G = argmin |W - basis G|_F,     leak = (mean cos^2 - d / V) / (1 - d / V)

    Args:
        basis: ``[vocab, dimension]``, spanning the subspace; ValueError for other vocabularies.
        head: ``[vocab, hidden]``, W with its final norm's gain or without: the span of the rows
            over the vocabulary does not depend on it.
        centre: compare with ``W`` minus its vocabulary mean, all that log-probabilities contain.

    >>> head = np.random.default_rng(0).standard_normal((30, 2))
    >>> found = align_head(head @ np.array([[2.0, 1.0], [0.0, 1.0]]), head, centre=False)
    >>> print(round(found.leak, 6), round(found.relative_rms, 6))
    1.0 0.0
    """
    checks.shapes(basis=(basis, "float vocab dimension"), head=(head, "float vocab hidden"))
    for name, rows in (("basis", basis), ("head", head)):
        checks.values(rows, np.isfinite, name, "finite numbers")
    basis, head = np.asarray(basis, np.float64), np.asarray(head, np.float64)
    head = head - head.mean(axis=0) if centre else head
    vocab, dimension = basis.shape
    q = np.linalg.qr(basis)[0]
    # |W|^2 - |Q^T W|^2 would lose the digits that matter if the fit is good.
    error = np.linalg.norm(head - q @ (q.T @ head))
    # Singular values of the product of two orthonormal bases: cosines of the principal angles.
    cosines = np.linalg.svd(q.T @ np.linalg.qr(head)[0], compute_uv=False).clip(0.0, 1.0)
    overlap = float((cosines**2).sum() / head.shape[1])
    # A random subspace holds this share of any direction, on average.
    chance = dimension / vocab
    leak, rms = (overlap - chance) / (1 - chance), float(error / np.linalg.norm(head))
    return HeadAlignment(relative_rms=rms, overlap=overlap, chance=chance, leak=leak)


def utility_loss(
    true_log_probs: Float[Array, "n vocab"], served_log_probs: Float[Array, "n vocab"]
) -> dict[str, float]:
    """Measure a defence's cost to users: mean `kl` in nats; shares of equal `top1`/`top5`."""
    truth, served = (np.asarray(rows, np.float32) for rows in (true_log_probs, served_log_probs))
    served = served - np.log(np.exp(served, dtype=np.float64).sum(axis=-1, keepdims=True))
    # Nothing where a vocabulary is padded, rather than 0 times infinity.
    gap = np.subtract(truth, served, out=np.zeros(truth.shape), where=truth != -np.inf)
    width = min(5, truth.shape[-1])
    rows = (truth, served.astype(np.float32))
    first, second = (np.asarray(top_k(some, width)[1]) for some in rows)
    return {
        "kl": float((np.exp(truth) * gap).sum(axis=-1).mean()),
        "top1": float((first[:, 0] == second[:, 0]).mean()),
        "top5": float((first[:, :, None] == second[:, None, :]).any(-1).mean()),
    }

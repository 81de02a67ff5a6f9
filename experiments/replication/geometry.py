"""How alike the hidden states of two models are, each measure with its null."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """Likeness of paired hidden states.

    Attributes:
        procrustes_r2: `1 - |B - s A R|^2 / |B|^2` on held-out rows, centred; R orthogonal.
        cka: Linear centred kernel alignment.
        cosine: Mean cosine of paired rows, centred; equal widths only, else nan.
        raw_cosine: The same without centring, as papers report it.
    """

    procrustes_r2: float
    cka: float
    cosine: float
    raw_cosine: float


def compare_geometry(
    states: np.ndarray,
    others: np.ndarray,
    *,
    seed: int = 0,
    held_out: float = 0.5,
    paired: bool = True,
) -> Geometry:
    """Compare hidden states of two models at the same positions.

    Procrustes is often fitted and scored on the same rows, which gives .22 to unrelated states;
    held out, it is negative for them. CKA is that of Kornblith et al., 2019.

    Args:
        states: `[n, width]`, e.g. a student's.
        others: `[n, other]`, the teacher's.
        seed: Seed of the split into fitted and scored rows.
        held_out: Share of the rows that score the rotation.
        paired: False breaks the pairing, for the level of unrelated states.
    """
    a, b = np.asarray(states, np.float64), np.asarray(others, np.float64)
    if not paired:
        b = b[np.random.default_rng(seed + 1).permutation(len(b))]
    order = np.random.default_rng(seed).permutation(len(a))
    cut = min(max(2, round(len(a) * (1 - held_out))), len(a) - 2)
    fit, score = order[:cut], order[cut:]
    raw = _mean_cosine(a, b) if a.shape == b.shape else float("nan")
    centred = a - a.mean(axis=0), b - b.mean(axis=0)
    return Geometry(
        procrustes_r2=_procrustes(a, b, fit, score),
        cka=_cka(*centred),
        cosine=_mean_cosine(*centred) if a.shape == b.shape else float("nan"),
        raw_cosine=raw,
    )


def _procrustes(a: np.ndarray, b: np.ndarray, fit: np.ndarray, score: np.ndarray) -> float:
    mean_a, mean_b = a[fit].mean(axis=0), b[fit].mean(axis=0)
    left, values, right = np.linalg.svd(
        (a[fit] - mean_a).T @ (b[fit] - mean_b), full_matrices=False
    )
    scale = values.sum() / np.square(a[fit] - mean_a).sum()
    found = scale * (a[score] - mean_a) @ (left @ right)
    target = b[score] - mean_b
    return float(1 - np.square(target - found).sum() / np.square(target).sum())


def _cka(a: np.ndarray, b: np.ndarray) -> float:
    cross = np.square(np.linalg.norm(a.T @ b))
    return float(cross / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)))


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.maximum(lengths, 1e-30)))

"""Similarity of the hidden states of two models, each measure with its null."""

import numpy as np


def compare_geometry(
    states: np.ndarray, others: np.ndarray, *, seed: int = 0, paired: bool = True
) -> dict[str, float]:
    """Compare hidden states `[n, width]` and `[n, other]` of two models at the same positions.

    `procrustes_r2` is `1 - |B - s A R|^2 / |B|^2`, centred, R orthogonal. Fitted and scored on the
    same rows, as is common, it gives .22 for unrelated states; on the other half it is negative for
    them. `cka` is the linear one of Kornblith et al., 2019. `raw_cosine` is the mean cosine of
    paired rows without centring, as papers report it; nan if widths differ. Without `paired` the
    pairing is broken, for the level of unrelated states.
    """
    a, b = np.asarray(states, np.float64), np.asarray(others, np.float64)
    if not paired:
        b = b[np.random.default_rng(seed + 1).permutation(len(b))]
    fit, score = np.array_split(np.random.default_rng(seed).permutation(len(a)), 2)
    return {
        "procrustes_r2": _procrustes(a, b, fit, score),
        "cka": _cka(a - a.mean(axis=0), b - b.mean(axis=0)),
        "raw_cosine": _mean_cosine(a, b) if a.shape == b.shape else float("nan"),
    }


def _procrustes(a: np.ndarray, b: np.ndarray, fit: np.ndarray, score: np.ndarray) -> float:
    mean_a, mean_b = a[fit].mean(axis=0), b[fit].mean(axis=0)
    left, values, right = np.linalg.svd(
        (a[fit] - mean_a).T @ (b[fit] - mean_b), full_matrices=False
    )
    scale = values.sum() / np.square(a[fit] - mean_a).sum()
    result = scale * (a[score] - mean_a) @ (left @ right)
    target = b[score] - mean_b
    return float(1 - np.square(target - result).sum() / np.square(target).sum())


def _cka(a: np.ndarray, b: np.ndarray) -> float:
    cross = np.square(np.linalg.norm(a.T @ b))
    return float(cross / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)))


def _mean_cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(np.mean((a * b).sum(axis=1) / np.maximum(lengths, 1e-30)))

"""How much of a text a model completes on its own."""

from typing import Any

import numpy as np


def extraction_strength(
    greedy: Any, where: Any = None, *, as_open_unlearning: bool = False
) -> np.ndarray:
    """The share of a text that its beginning makes a model say, word for word.

    ::

        1 - k / n,   k the shortest beginning after which every token is the most likely one

    References:
        Carlini et al., 2021; OpenUnlearning's ``extraction_strength``.

    >>> extraction_strength([[True, False, True, True], [True, True, True, False]])
    array([0.5, 0. ])
    """
    greedy, where = _rows(greedy, where)
    counts = where.sum(axis=-1)
    # Behind the last wrong token lie as many right ones as the running sum from the end has left.
    wrong_after = np.flip(np.cumsum(np.flip(where & ~greedy, -1), axis=-1), -1)
    found = ((wrong_after == 0) & where).sum(axis=-1)
    if as_open_unlearning:
        found = np.maximum(found, np.minimum(counts, 1))
    return np.asarray(found / np.maximum(counts, 1))


def exact_memorisation(greedy: Any, where: Any = None) -> np.ndarray:
    """The share of a text's tokens that are the most likely ones after all before them.

    References:
        Tirumala et al., 2022; OpenUnlearning's ``exact_memorization``.

    >>> exact_memorisation([[True, False, True, True]])
    array([0.75])
    """
    greedy, where = _rows(greedy, where)
    return np.asarray((greedy & where).sum(axis=-1) / np.maximum(where.sum(axis=-1), 1))


def _rows(greedy: Any, where: Any) -> tuple[np.ndarray, np.ndarray]:
    greedy = np.asarray(greedy, bool)
    where = np.ones(greedy.shape, bool) if where is None else np.asarray(where, bool)
    if greedy.ndim < 1 or greedy.shape != where.shape:
        raise ValueError(f"where: expected shape {greedy.shape}, as of greedy, got {where.shape}")
    return greedy, where

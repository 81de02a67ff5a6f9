"""How much of a text a model completes on its own, and whether it shows that it has seen it."""

from typing import Any

import numpy as np


def extraction_strength(
    greedy: Any, where: Any = None, *, as_open_unlearning: bool = False
) -> np.ndarray:
    """The share of a text that its beginning makes a model say, word for word.

    ::

        1 - k / n,   k the shortest beginning after which every token is the most likely one

    Args:
      greedy: bool ``[*batch, time]``: the token is the most likely one after all before it.
      where: bool, of that shape: the tokens that count; OpenUnlearning leaves out the end mark.
      as_open_unlearning: a text whose last token is not the most likely one scores ``1 / n`` there,
        for their loop stops one short; without this it scores 0.

    Returns:
      float64 ``[*batch]``; 0 where nothing counts.

    Raises:
      ValueError: unequal shapes.

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

    Args:
      greedy: bool ``[*batch, time]``.
      where: bool, of that shape: the tokens that count.

    Returns:
      float64 ``[*batch]``; 0 where nothing counts.

    Raises:
      ValueError: unequal shapes.

    References:
      Tirumala et al., 2022; OpenUnlearning's ``exact_memorization``.

    >>> exact_memorisation([[True, False, True, True]])
    array([0.75])
    """
    greedy, where = _rows(greedy, where)
    return np.asarray((greedy & where).sum(axis=-1) / np.maximum(where.sum(axis=-1), 1))


def membership_auc(losses: Any, holdout_losses: Any) -> float:
    """How well a loss says whether a text was trained on: 0.5 is not at all, 1 always.

    ::

        P(loss of a text < loss of one held out), ties counting half

    Args:
      losses: ``[n]``, nats a token, of texts that were trained on, or are to look as if not.
      holdout_losses: ``[m]``, of texts of the same kind that never were.

    Raises:
      ValueError: no or nan values.

    References:
      Yeom et al., 2018; OpenUnlearning's ``mia_loss``. Below 0.5 forgotten texts are less likely
      than unseen ones, which gives them away as well.

    >>> membership_auc([1.0, 2.0], [2.0, 3.0])
    0.875
    """
    from scipy import stats

    members = np.asarray(losses, np.float64).ravel()
    others = np.asarray(holdout_losses, np.float64).ravel()
    for name, array in (("losses", members), ("holdout_losses", others)):
        if not len(array) or np.isnan(array).any():
            raise ValueError(f"{name}: expected numbers, got {len(array)} of which some are nan")
    ranks = stats.rankdata(np.concatenate([members, others]))[len(members) :]
    pairs = len(members) * len(others)
    return float((ranks.sum() - len(others) * (len(others) + 1) / 2) / pairs)


def min_k(nll: Any, *, k: float = 0.4) -> float:
    """The mean loss of a text's least likely tokens, which a text that was trained on lacks.

    ::

        mean of the max(1, floor(k n)) largest of n losses

    Args:
      nll: ``[n]``, nats of a text's tokens.
      k: their share.

    Raises:
      ValueError: no tokens, or ``k`` outside (0, 1].

    References:
      Shi et al., 2024 (arXiv 2310.16789). OpenUnlearning's configurations have k = 0.4, its class
      0.2; it leaves out the last label, and gives an empty text the score of the surest member.

    >>> round(min_k(-np.log([0.9, 0.5, 0.1, 0.8, 0.05]), k=0.4), 4)
    2.6492
    """
    nll = np.asarray(nll, np.float64).ravel()
    if not len(nll):
        raise ValueError("nll: expected losses of tokens, got none")
    if not 0 < k <= 1:
        raise ValueError(f"k: expected a share in (0, 1], got {k}")
    return float(np.sort(nll)[-max(1, int(k * len(nll))) :].mean())


def privleak(auc: float, reference_auc: float = 0.5) -> float:
    """How far an attack's success is from that on a retrained model, in percent of the latter.

    ::

        100 ((1 - auc) - (1 - ref)) / (1 - ref)

    0 is ideal; below it the texts still look known, above it they look forgotten on purpose.

    Args:
      auc: from `membership_auc`, of the model.
      reference_auc: of a model retrained without the texts; 0.5 if there is none.

    Raises:
      ValueError: outside [0, 1].

    References:
      Shi et al., MUSE, 2024 (arXiv 2407.06460), as in OpenUnlearning (1e-10 below the fraction).

    >>> round(privleak(1.0), 3), round(privleak(0.5), 3)
    (-100.0, 0.0)
    """
    for name, value in (("auc", auc), ("reference_auc", reference_auc)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")
    return 100.0 * (reference_auc - auc) / (1.0 - reference_auc + 1e-10)


def _rows(greedy: Any, where: Any) -> tuple[np.ndarray, np.ndarray]:
    greedy = np.asarray(greedy, bool)
    where = np.ones(greedy.shape, bool) if where is None else np.asarray(where, bool)
    if greedy.ndim < 1 or greedy.shape != where.shape:
        raise ValueError(f"where: expected shape {greedy.shape}, as of greedy, got {where.shape}")
    return greedy, where

"""ROUGE, as TOFU counts it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from logitjax.storage import require


class RougeRecall(NamedTuple):
    """Recall of each text: float64 ``[n]`` each."""

    rouge_1: np.ndarray
    rouge_l: np.ndarray


def rouge_l_f1(references: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
    """ROUGE-L F1: how much of a reference a text has in order, and how little else.

    Recall alone rewards rambling, because a long text contains any short answer.

    ::

        2 LCS / (|reference| + |text|)

    Args:
        references: the right answers.
        predictions: as many texts.

    Returns:
        float64 ``[n]``.

    Raises:
        ValueError: unequal numbers.

    References:
        Lin, 2004; MUSE's verbmem and knowmem.

    >>> rouge_l_f1(["Paris, France"], ["It is in France: Paris."]).round(4)
    array([0.2857])
    """
    scores = _scores(references, predictions)
    return np.asarray([score["rougeL"].fmeasure for score in scores], np.float64)


def rouge_recall(references: Sequence[str], predictions: Sequence[str]) -> RougeRecall:
    """The share of each reference's words that a text has: any of them, and in their order.

    ::

        ROUGE-1  |words in common| / |reference|,    ROUGE-L  LCS / |reference|

    Words are lower-case runs of letters and digits, stemmed by Porter's rules where longer than
    three letters. A reference without words scores 0.

    Args:
        references: the right answers.
        predictions: as many texts.

    Raises:
        ValueError: unequal numbers.

    References:
        Lin, 2004; ``rouge_score`` with ``use_stemmer=True``, as in TOFU and OpenUnlearning.

    >>> rouge_recall(["Paris, France"], ["It is in France: Paris."])
    RougeRecall(rouge_1=array([1.]), rouge_l=array([0.5]))
    """
    scores = _scores(references, predictions)
    return RougeRecall(
        rouge_1=np.asarray([score["rouge1"].recall for score in scores], np.float64),
        rouge_l=np.asarray([score["rougeL"].recall for score in scores], np.float64),
    )


def _scores(references: Sequence[str], predictions: Sequence[str]) -> list[Any]:
    # Takes nltk along, which nobody needs who only trains.
    rouge_scorer = require("rouge_score.rouge_scorer", extra="eval")

    if len(references) != len(predictions):
        raise ValueError(
            f"as many predictions as references expected, got {len(predictions)} and "
            f"{len(references)}"
        )
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    return [scorer.score(a, b) for a, b in zip(references, predictions)]

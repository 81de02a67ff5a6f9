import collections
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from logitjax.storage import require


class Rouge(NamedTuple):
    """Scores of each text, float64 ``[n]`` each: recalls, and the F1 of ROUGE-L."""

    rouge_1: np.ndarray
    rouge_l: np.ndarray
    f1: np.ndarray


def rouge(references: Sequence[str], predictions: Sequence[str]) -> Rouge:
    """The share of each reference's words that a text has: any of them, and in their order.

    Recall alone rewards rambling, because a long text contains any short answer::

        ROUGE-1  |words in common| / |reference|,    ROUGE-L  LCS / |reference|
        F1       2 LCS / (|reference| + |text|)

    Words are lower-case runs of letters and digits, stemmed by Porter's rules if longer than three
    letters. A reference without words scores 0.

    Raises:
        ValueError: unequal numbers of references and predictions.

    References:
        Lin, 2004; ``rouge_score`` with ``use_stemmer=True``, as in TOFU and OpenUnlearning; F1 as
        in MUSE's verbmem and knowmem.

    >>> rouge(["Paris, France"], ["It is in France: Paris."])
    Rouge(rouge_1=array([1.]), rouge_l=array([0.5]), f1=array([0.28571429]))
    """
    # It imports nltk, which is not needed for training.
    rouge_scorer = require("rouge_score.rouge_scorer", extra="eval")
    if len(references) != len(predictions):
        raise ValueError(
            f"as many predictions as references expected, got {len(predictions)} and "
            f"{len(references)}"
        )
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    scores = [scorer.score(a, b) for a, b in zip(references, predictions)]
    columns = [
        [score["rouge1"].recall for score in scores],
        [score["rougeL"].recall for score in scores],
        [score["rougeL"].fmeasure for score in scores],
    ]
    return Rouge(*(np.asarray(column, np.float64) for column in columns))


def fluency(texts: Sequence[str]) -> float | None:
    """Mean entropy of texts' pairs and triples of words, low for repetitive texts.

    The mean of `(2/3 H_2 + 4/3 H_3) / 2`, in bits.

    Args:
        texts: Generated texts; those of fewer than three words do not count.

    References:
        Zhang et al., 2018, as weighted in ROME (Meng et al., 2022) and RWKU.

    >>> [round(fluency([text]), 4) for text in ("a b c d e", "a b a b a", "a a a a a")]
    [1.7233, 0.9455, 0.0]
    """
    rows = [words for words in map(str.split, texts) if len(words) >= 3]
    # ROME's weights: entropies of pairs and triples have 2/3 and 4/3 in their mean.
    values = [(2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2 for words in rows]
    return float(np.mean(values)) if values else None


def _entropy(words: list[str], size: int) -> float:
    counts = collections.Counter(zip(*(words[i:] for i in range(size))))
    total = sum(counts.values())
    return sum(-n / total * math.log2(n / total) for n in counts.values())

"""Whether generated text is more than a repetition."""

import collections
import math


def ngram_entropy(text: str) -> float | None:
    """Entropy of a text's pairs and triples of words: low where it repeats itself.

    ::

        (2/3 H_2 + 4/3 H_3) / 2   bits

    Args:
        text: Generated.

    Returns:
        The weighted mean, or None for fewer than three words.

    References:
        Zhang et al., 2018, as weighted in ROME (Meng et al., 2022) and RWKU.

    >>> [round(ngram_entropy(text), 4) for text in ("a b c d e", "a b a b a", "a a a a a")]
    [1.7233, 0.9455, 0.0]
    """
    words = text.split()
    if len(words) < 3:
        return None
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: list[str], size: int) -> float:
    counts = collections.Counter(zip(*(words[i:] for i in range(size))))
    total = sum(counts.values())
    return sum(-n / total * math.log2(n / total) for n in counts.values())

"""Short pieces of documents, as prompts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def token_windows(
    examples: Sequence[Mapping[str, Any]],
    encode: Callable[[str], Sequence[int]],
    *,
    count: int,
    length: int,
    start: Sequence[int] = (),
) -> np.ndarray:
    """Cut distinct windows from documents: their beginnings first, then what follows.

    Args:
        examples: Documents with a `text`.
        encode: Function from text to token ids.
        count, length: Number of windows, and number of tokens in each.
        start: Token ids at the beginning of each window, such as `Tokenizer.start`; they count.

    Returns:
        `[count, length]` int32.

    Raises:
        ValueError: Too few different windows, a document without text, or a window of only `start`.

    >>> token_windows([{"text": "abcd"}, {"text": "ab"}], lambda t: t.encode(), count=2, length=2)
    array([[ 97,  98],
           [ 99, 100]], dtype=int32)
    >>> token_windows([{"text": "abc"}], lambda t: t.encode(), count=2, length=2, start=[1])
    array([[ 1, 97],
           [ 1, 98]], dtype=int32)
    """
    entries: dict[bytes, np.ndarray] = {}
    begin, longest, part = 0, 1, length - len(start)
    if part < 1:
        raise ValueError(
            f"length: expected more than the {len(start)} tokens that each window begins with, got "
            f"{length}"
        )
    # All beginnings first, because later windows start in the middle of a sentence.
    while begin < longest:
        for i in range(len(examples)):
            if "text" not in examples[i]:
                message = getattr(examples, "source", "examples")
                raise ValueError(f"{message}: expected a text, got {sorted(examples[i])}")
            tokens = encode(examples[i]["text"])
            longest = max(longest, len(tokens))
            window = np.asarray([*start, *tokens[begin : begin + part]], np.int32)
            if len(window) == length:
                # Equal windows count once.
                entries.setdefault(window.tobytes(), window)
            if len(entries) == count:
                return np.stack(list(entries.values()))
        begin += part
    raise ValueError(
        f"data: expected {count} different windows of {length} tokens, got {len(entries)}"
    )

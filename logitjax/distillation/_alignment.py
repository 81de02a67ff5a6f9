"""Which positions of two tokenizations of one text have read the same prefix."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

# More bytes than any text, and more turns than any document, in a packed row has.
_TEXT_STRIDE = 1 << 28
_TURN_STRIDE = 1 << 16


def _starts(columns: Mapping[str, Any], lengths: np.ndarray, by: str) -> np.ndarray:
    """For each token, its text and the byte of it where the token begins, as one key."""
    tokens = np.asarray(columns["tokens"])
    texts = np.asarray(columns["segment_ids"], np.int64)
    sizes = lengths[np.clip(tokens, 0, len(lengths) - 1)]
    begin = np.cumsum(sizes, axis=1) - sizes
    first = np.asarray(columns["positions"]) == 0
    if by == "turn":
        learnt = np.asarray(columns["loss_mask"])
        turns = learnt & ~np.pad(learnt, ((0, 0), (1, 0)))[:, :-1]
        texts = texts * _TURN_STRIDE + np.cumsum(turns, axis=1) - _at_start(turns, first)
        first = turns
    origin = np.maximum.accumulate(np.where(first, begin, 0), axis=1)
    return texts * _TEXT_STRIDE + begin - origin


def _at_start(turns: np.ndarray, first: np.ndarray) -> np.ndarray:
    """How many turns the row had before each token's segment."""
    return np.maximum.accumulate(np.where(first, np.cumsum(turns, axis=1) - turns, 0), axis=1)


def align_positions(
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    *,
    our_lengths: np.ndarray,
    their_lengths: np.ndarray,
    by: Literal["document", "turn"] = "document",
) -> tuple[np.ndarray, np.ndarray]:
    """For each of our positions, the position of another tokenizer that predicts from there on.

    Position t predicts token t + 1. Two positions correspond where both predict a token that begins
    at the same byte of the same document: both models have then read exactly the same text. Where
    our token begins in the middle of one of theirs there is no such position.

    Args:
        ours: one tokenizer's columns of a packed batch (`tokens`, `segment_ids`, `positions`,
            `loss_mask`, each `[rows, length]`).
        theirs: the other's columns of the same rows.
        our_lengths: `[vocab]`, how many bytes of text each of our tokens stands for; 0 for
            special tokens.
        their_lengths: the same of the other vocabulary.
        by: what bytes are counted in: the document, or each learnt part of it, which is what
            conversations have in common that two chat templates spell differently.

    Returns:
        `places` int `[rows, length - 1]`, an index into the other's positions (0 where there is
        none), and `where` bool of the same shape: both are to be predicted and they correspond.

    >>> columns = lambda tokens: {
    ...     "tokens": np.array([tokens]), "segment_ids": np.ones((1, len(tokens)), int),
    ...     "positions": np.arange(len(tokens))[None], "loss_mask": np.ones((1, len(tokens)), bool)}
    >>> ours, theirs = columns([1, 1, 2, 1]), columns([2, 2, 1])   # tokens are their own lengths
    >>> lengths = np.arange(3)
    >>> places, where = align_positions(ours, theirs, our_lengths=lengths, their_lengths=lengths)
    >>> places.tolist(), where.tolist()
    ([[0, 0, 1]], [[False, True, True]])
    """
    mine, other = (
        _starts(columns, lengths, by)[:, 1:]
        for columns, lengths in ((ours, our_lengths), (theirs, their_lengths))
    )
    wanted = np.asarray(ours["loss_mask"])[:, 1:]
    known = np.asarray(theirs["loss_mask"])[:, 1:]
    places = np.zeros(mine.shape, np.int64)
    where = np.zeros(mine.shape, bool)
    for row in range(len(mine)):
        # A special token has length 0 and shares its start with the next one: the last counts.
        candidates = np.flatnonzero(known[row])
        keys = other[row, candidates]
        if not len(keys):
            continue
        slot = np.searchsorted(keys, mine[row], side="right") - 1
        found = (slot >= 0) & (keys[np.maximum(slot, 0)] == mine[row])
        places[row] = np.where(found, candidates[np.maximum(slot, 0)], 0)
        where[row] = found & wanted[row]
    return np.where(where, places, 0), where

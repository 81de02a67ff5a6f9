import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

# (tokens int32 [batch, time], targets bool [batch, time]) -> nll float32 [batch, time], or that and
# whether each token was the most likely one, bool [batch, time].
NllFn = Callable[[Any, Any], Any]

# Few shapes, few compilations.
_LENGTHS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowScores:
    """An array per row over its targets: `nll`, float64; `greedy`, bool, or None if unknown."""

    nll: list[np.ndarray]
    greedy: list[np.ndarray] | None

    def totals(self) -> np.ndarray:
        """float64 ``[rows]``, nats."""
        return np.asarray([row.sum() for row in self.nll], np.float64)

    def counts(self) -> np.ndarray:
        """int ``[rows]``, targets."""
        return np.asarray([len(row) for row in self.nll], np.int64)


def score_rows(
    nll_fn: NllFn,
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    batch_size: int = 16,
    pad_id: int = 0,
    progress: Callable[[int], Any] = lambda count: None,
    describe: Callable[[int], str] = lambda row: f"row {row}",
) -> RowScores:
    """Negative log-likelihoods of the targets of rows, in batches of few shapes.

    Rows are sorted by length, longest first, ``batch_size`` at a time, each batch padded at the end
    to a multiple of 32; the last batch is filled up with empty rows.

    Args:
        rows: token ids and which of them are targets, as from `encode_answer`.
        pad_id: any id of the model.
        progress: called with the number of finished rows.
        describe: returns a row's name, for errors.

    Raises:
        ValueError: a row whose first token is a target, answers of a wrong shape, or a loss that is
            not finite; the message names the row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected a positive number, got {batch_size}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))  # longest first
    nll: list[Any] = [None] * len(rows)
    greedy: list[Any] = [None] * len(rows)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        longest = len(rows[picked[0]][0])
        shape = (batch_size, -(-longest // _LENGTHS) * _LENGTHS)
        tokens, targets = np.full(shape, pad_id, np.int32), np.zeros(shape, bool)
        for b, i in enumerate(picked):
            ids, where = rows[i]
            if len(ids) and where[0]:
                raise ValueError(
                    f"{describe(i)}: its first token is a target, which nothing predicts"
                )
            tokens[b, : len(ids)], targets[b, : len(ids)] = ids, where
        message = nll_fn(tokens, targets)
        values, best = message if isinstance(message, tuple) else (message, None)
        if np.shape(values) != shape:
            raise ValueError(f"nll_fn: expected [batch, time] = {shape}, got {np.shape(values)}")
        # Sums reach thousands of nats.
        values = np.asarray(values, np.float64)
        for b, i in enumerate(picked):
            nll[i] = values[b][targets[b]]
            if not np.isfinite(nll[i]).all():
                count = int((~np.isfinite(nll[i])).sum())
                raise ValueError(f"{describe(i)}: {count} of {len(nll[i])} losses are not finite")
            if best is not None:
                greedy[i] = np.asarray(best, bool)[b][targets[b]]
        progress(len(picked))
    present = bool(rows) and all(row is not None for row in greedy)
    return RowScores(nll=nll, greedy=greedy if present else None)

"""One call from an API and some prompts to what the API gives away."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from logitjax.leakage._alignment import HeadAlignment, align_head, utility_loss
from logitjax.leakage._corner import corner_matrix
from logitjax.leakage._recover_row import RecoveredRow, recover_log_probs
from logitjax.leakage._subspace import OutputSubspace, estimate_output_subspace
from logitjax.ops import Array

#: Nats below the most likely token within which a row has to come back exactly.
SPAN = 25.0
#: Shares of the head beyond chance up to which a policy counts as closed, and from which as open.
CLOSED, OPEN = 0.1, 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """What an API gave away, and what its policy costs honest users.

    Attributes:
        prompts: Number of prompts whose values the subspace comes from, or of rows.
        subspace: The recovered subspace, with the hidden dimension as `width`; None without one.
        tokens: Tokens that the rows of its basis stand for; None for all.
        alignment: The subspace beside the true head, where that is known.
        utility: What honest users lose, where the truth is known; see `utility_loss`.
        row: A whole row of log-probabilities, asked for through a bias.
        row_error: Its largest error in nats over the likeliest tokens, where the truth is known.
    """

    prompts: int
    subspace: OutputSubspace | None = None
    tokens: np.ndarray | None = None
    alignment: HeadAlignment | None = None
    utility: Mapping[str, float] | None = None
    row: RecoveredRow | None = None
    row_error: float | None = None

    @property
    def leak(self) -> float | None:
        """Share of the head beyond chance that is out; None where the head is not known."""
        # What one query a value leaves is what whole rows leave: the same rows, dearer.
        if self.row is not None:
            return self.row.coverage
        return None if self.alignment is None else self.alignment.leak


def audit(
    oracle: Any,
    prompts: Sequence[Any] | Array,
    vocab_size: int,
    *,
    head: Float[Array, "vocab hidden"] | None = None,
    logits: Float[Array, "n vocab"] | None = None,
    corner: int = 0,
) -> Audit:
    """Ask an API what it answers anybody, and work out what that says of the head.

    Where whole rows or a top-k are reported, the subspace comes from one answer a prompt; a reader
    fills in the k-th value for what a top-k leaves out. Where a bias moves what is reported, the
    first prompt's row is recovered token by token, and the dimension comes from a corner of the
    matrix of log-probabilities.

    Args:
        oracle: A `LogitOracle` of a model in this process, or an `HttpOracle` of one's own server.
        prompts: Token ids, more prompts than the hidden dimension.
        vocab_size: Number of tokens.
        head: `[vocab, hidden]`, the true head, for the share that leaked.
        logits: `[n, vocab]`, the true logits of the prompts, for errors and for what users lose.
        corner: Number of prompts and of tokens in the corner asked for through a bias; 0 for none.

    Raises:
        BudgetExhaustedError: The oracle's budget does not suffice.

    References:
        Carlini et al., 2024 (arXiv:2403.06634), sections 4 and 5.

    >>> from logitjax.leakage import LogitOracle, LogitPolicy
    >>> rng = np.random.default_rng(0)
    >>> head, hidden = rng.standard_normal((40, 3)), rng.standard_normal((12, 3))
    >>> logits = (hidden @ head.T).astype(np.float32)
    >>> oracle = LogitOracle(lambda tokens: logits[np.asarray(tokens)[:, 0]], LogitPolicy())
    >>> found = audit(oracle, np.arange(12)[:, None], 40, head=head, logits=logits)
    >>> print(found.subspace.width, round(found.leak, 3))
    3 1.0
    """
    if oracle.policy.bias == "reported":
        return _through_bias(oracle, prompts, vocab_size, logits, corner)
    served = _rows(oracle, prompts, vocab_size)
    # As many directions as the head has, whatever the estimate says: one Gram matrix does for both.
    known = None if head is None else min(head.shape[1], len(served) - 1)
    subspace = estimate_output_subspace(
        served, noise=oracle.policy.noise or None, decimals=oracle.policy.decimals, dimension=known
    )
    some = slice(0, min(256, len(served)))
    return Audit(
        prompts=len(served),
        subspace=subspace,
        alignment=None if head is None else align_head(subspace.basis, head),
        utility=None if logits is None else utility_loss(_log_softmax(logits)[some], served[some]),
    )


def verdict(
    leak: float | None,
    *,
    loss: float | None = None,
    sees_width: bool = True,
    row: tuple[float, int] | None = None,
) -> str:
    """What an operator should take from an audit, in words.

    Args:
        leak: Share of the head beyond chance that is out; None where the head is not known.
        loss: Divergence in nats that honest users pay.
        sees_width: Whether the hidden dimension came out right.
        row: Error in nats and number of queries of a whole row, where one came back.
    """
    if row is not None:
        return f"open: every row comes back to {row[0]:.1g} nats, {row[1]} queries each"
    if leak is None:
        return "not known: how much leaked can be said beside the true head only"
    cost = ", and honest users pay for it" if loss is not None and loss > 0.1 else ""
    if leak >= OPEN:
        hidden = "" if sees_width else "; only the width is hidden"
        return f"open: the head's subspace is out{hidden}{cost}"
    if leak <= CLOSED:
        return f"closed{cost}"
    return f"part of the head leaks{cost}"


def _rows(oracle: Any, prompts: Any, vocab_size: int) -> np.ndarray:
    """Rows as a reader has them: where a top-k is reported, the rest is the k-th value."""
    answer = oracle.ask(prompts)
    values = np.asarray(answer.values)
    if oracle.policy.top_k is None:
        return values
    filled = np.repeat(values[:, -1:], vocab_size, axis=1)
    np.put_along_axis(filled, np.asarray(answer.tokens), values, axis=1)
    return filled


def _through_bias(oracle: Any, prompts: Any, vocab_size: int, logits: Any, corner: int) -> Audit:
    row, error = recover_log_probs(oracle, prompts[0], vocab_size), None
    if logits is not None:
        truth = _log_softmax(logits[:1])[0]
        near = row.known & (truth.max() - truth <= SPAN)
        error = float(np.abs(row.log_probs - truth)[near].max())
    if not corner:
        return Audit(prompts=1, row=row, row_error=error)
    count = min(corner, vocab_size)
    columns = np.random.default_rng(0).choice(vocab_size, count, replace=False)
    asked = list(prompts[:corner])
    subspace = estimate_output_subspace(corner_matrix(oracle, asked, columns, vocab_size))
    return Audit(
        prompts=len(asked),
        subspace=subspace,
        tokens=columns,
        row=row,
        row_error=error,
    )


def _log_softmax(logits: Any) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits))

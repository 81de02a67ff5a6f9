"""Attack an API with some prompts and report its leaks, in one call."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from logitjax.leakage._alignment import HeadAlignment, align_head, utility_loss
from logitjax.leakage._oracle import BudgetExhaustedError, LogitOracle
from logitjax.leakage._policy import LogitPolicy
from logitjax.leakage._protocol import Protocol, ask_at_end, infer_protocol, tell_again
from logitjax.leakage._recover_row import RecoveredRow, corner_matrix, recover_log_probs
from logitjax.leakage._subspace import OutputSubspace, estimate_output_subspace
from logitjax.leakage._width import OutputWidth
from logitjax.ops import Array

#: Nats below the most likely token within which a row must be recovered exactly.
SPAN = 25.0
#: Shares of the head beyond chance: up to the first, little leaks; from the second, all is open.
LITTLE, OPEN = 0.1, 0.9
#: Number of a row's tokens to search by comparisons, which cost several queries each.
SEARCHED = 256
#: Number of prompts for measuring the loss of honest users.
_HONEST = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Audit:
    """The result of an audit: what an API revealed, and what its policy costs honest users.

    Attributes:
        prompts: Number of prompts whose values determine the subspace, or of rows.
        values: Number of reported values.
        subspace: The recovered subspace, with the hidden dimension as `width`; None without one.
        tokens: Tokens of the rows of its basis; None for all.
        alignment: The subspace aligned to the true head at those tokens, if the head is known.
        utility: What honest users lose, if the truth is known; see `utility_loss`. For an API
            that reports tokens only, `top1`.
        row: A row of log-probabilities, as far as it was recovered token by token.
        row_error: Its largest error in nats over the most likely tokens, if the truth is known;
            inf if it is not, and noise was added that no test measures.
        protocol: Results of the tests of a server; None for an API in this process.
        hidden: The true hidden dimension, if known.
    """

    prompts: int
    queries: int = 0
    values: int = 0
    subspace: OutputSubspace | None = None
    tokens: np.ndarray | None = None
    alignment: HeadAlignment | None = None
    utility: Mapping[str, float] | None = None
    row: RecoveredRow | None = None
    row_error: float | None = None
    protocol: Protocol | None = None
    hidden: int | None = None

    @property
    def unlike(self) -> list[str]:
        """List the deviations of the server from its policy; they prevent any certification."""
        tests = [] if self.protocol is None else self.protocol.unlike
        return [f"{one.test}: {one.seen} ({one.effect:.2g})" for one in tests]

    @property
    def width(self) -> OutputWidth | None:
        """The hidden dimension that the subspace shows."""
        return None if self.subspace is None else self.subspace.width

    @property
    def leak(self) -> float | None:
        """Share of the head beyond chance that leaked; None if nothing was recovered."""
        return None if self.alignment is None else self.alignment.leak

    @property
    def verdict(self) -> str:
        """The conclusion for the operator, in words."""
        if self.unlike:
            return "not as declared, so nothing is certified: " + "; ".join(self.unlike)
        if self.row is not None:
            # The true error if the model is known, otherwise the proven bound.
            error = self.row.error_bound if self.row_error is None else self.row_error
            notes = "an unknown error"
            if error < math.inf:
                # To one digit, rounded up: a bound that is rounded down is no bound.
                digit = 10.0 ** math.floor(math.log10(max(error, 1e-12)))
                notes = f"{math.ceil(error / digit * (1 - 1e-9)) * digit:.1g} nats"
            queries, share = self.row.queries, self.row.coverage
            if share < 0.99:
                return f"part of a row leaks: {share:.2%} of it to {notes}, {queries} queries"
            return f"open: every row comes back to {notes}, {queries} queries each"
        if self.leak is None:
            return "not known: the leaked share can be measured only with the true head"
        paid = (self.utility or {}).get("kl", 0.0) > 0.1
        cost = ", and honest users pay for it" if paid else ""
        if self.leak >= OPEN:
            seen = self.width is not None and self.width.estimate == self.hidden
            hidden = "" if seen else "; only the width is hidden"
            return f"open: the head's subspace is out{hidden}{cost}"
        # Attacks that were not tried prove nothing, so no policy is called closed.
        little = "these attacks recover little of the head"
        kind = little if self.leak <= LITTLE else "part of the head leaks"
        return kind + cost


def audit(
    oracle: Any,
    prompts: Sequence[Any] | Array,
    vocab_size: int,
    *,
    head: Float[Array, "vocab hidden"] | None = None,
    logits: Float[Array, "n vocab"] | None = None,
    corner: int = 0,
) -> Audit:
    """Attack an API by queries that anybody may send, and measure how much of the head leaks.

    - If whole rows or a top-k are reported, the subspace comes from one answer per prompt. The k-th
      value is filled in for the values outside a top-k.
    - If a bias changes the reported values, or the drawn token with its reported value, the first
      prompt's row is recovered token by token, and the subspace from a corner of the matrix of
      log-probabilities. Without a bias a row is harvested by draws (`recover_log_probs`).
    - If only one value or only the token is reported, part of a row is searched for.

    An API in this process behaves as its policy says. Any other is tested first. A recovered row is
    then measured again by other queries, at the same cost, and its error widened by the
    differences. Attacks are those of Carlini et al., 2024 (arXiv:2403.06634), sections 4 and 5.

    Args:
        oracle: A `LogitOracle` of a model in this process, or an `HttpOracle` of your own server;
            BudgetExhaustedError if its budget does not suffice.
        prompts: Token ids, more prompts than the hidden dimension.
        head: `[vocab, hidden]`, the true head, for the share that leaked.
        logits: `[n, vocab]`, the true logits of the prompts, for errors and for users' losses.
        corner: Number of prompts and tokens of the corner recovered through a bias; 0 for none.

    >>> from logitjax.leakage import LogitOracle, LogitPolicy
    >>> rng = np.random.default_rng(0)
    >>> head, hidden = rng.standard_normal((40, 3)), rng.standard_normal((12, 3))
    >>> logits = (hidden @ head.T).astype(np.float32)
    >>> oracle = LogitOracle(lambda tokens: logits[np.asarray(tokens)[:, 0]], LogitPolicy())
    >>> found = audit(oracle, np.arange(12)[:, None], 40, head=head, logits=logits)
    >>> print(found.width, round(found.leak, 3))
    3 1.0
    """
    before = oracle.queries, oracle.values
    attack = functools.partial(_attacked, oracle, prompts, vocab_size, head, logits, corner)
    result = attack() if isinstance(oracle, LogitOracle) else _tested(oracle, prompts, attack)
    # The queries of honest users below are not part of the cost.
    price = {"queries": oracle.queries - before[0], "values": oracle.values - before[1]}
    hidden = None if head is None else head.shape[1]
    result = dataclasses.replace(result, **price, hidden=hidden)
    if logits is None:
        # Without the model, noise is measured only if it is fresh, by the tests of a server.
        seen = result.protocol is not None and oracle.policy.noise_per == "query"
        hides = result.row is not None and oracle.policy.noise > 0 and not seen
        return dataclasses.replace(result, row_error=math.inf if hides else None)
    error, utility = None, result.utility
    if result.row is not None:
        error = _row_error(result.row, np.asarray(logits[0], np.float64))
        if result.protocol is not None and not error <= result.row.error_bound:
            seen = "a row is not the model's, in nats"
            result.protocol.add("model", seen, 0.0, error, declared=False)
    if utility is None and not result.unlike:
        utility = _honest(oracle, prompts[:_HONEST], vocab_size, logits[:_HONEST])
    return dataclasses.replace(result, row_error=error, utility=utility)


def _attacked(
    oracle: Any, prompts: Any, vocab_size: int, head: Any, logits: Any, corner: int
) -> Audit:
    policy = oracle.policy
    if policy.returns == "token" and policy.bias == "none":
        return Audit(prompts=0)
    if policy.returns == "token" or (policy.bias == "reported" and policy.top_k == 1):
        some = np.random.default_rng(0).permutation(vocab_size)[:SEARCHED]
        row = recover_log_probs(oracle, prompts[0], vocab_size, tokens=some)
        return Audit(prompts=1, row=row)
    if policy.harvests or policy.bias == "reported" or (policy.bias != "none" and policy.sampled):
        return _by_bias(oracle, prompts, vocab_size, head, 0 if policy.harvests else corner)
    return _by_rows(oracle, prompts, vocab_size, head, logits)


def _tested(oracle: Any, prompts: Any, attack: Callable[[], Audit]) -> Audit:
    """An attack on an API that may differ from its declared policy."""
    declared, protocol, result = oracle.policy, Protocol(policy=oracle.policy), Audit(prompts=0)
    try:
        infer_protocol(protocol, oracle, prompts)
        oracle.policy = protocol.policy
        result = attack()
        if result.row is not None:
            row = tell_again(protocol, oracle, prompts[0], result.row)
            result = dataclasses.replace(result, row=row)
        ask_at_end(protocol, oracle, prompts[0])
    except BudgetExhaustedError:
        raise
    except ValueError as error:
        # Unexpected shapes or refusals; otherwise no row can be recovered from such answers.
        declared_so = not str(error).startswith("url")
        protocol.add("answers", str(error)[:200], 0.0, 0.0, declared=declared_so)
    finally:
        oracle.policy = declared
    return dataclasses.replace(result, protocol=protocol)


def _by_rows(oracle: Any, prompts: Any, vocab_size: int, head: Any, logits: Any) -> Audit:
    policy: LogitPolicy = oracle.policy
    served = _rows(oracle, prompts, vocab_size)
    noise = {"noise": policy.noise or None, "decimals": policy.decimals}
    rows = _of_rows(served, head, noise)
    if logits is not None:
        utility = utility_loss(_log_softmax(logits[:_HONEST]), served[:_HONEST])
        rows = dataclasses.replace(rows, utility=utility)
    return rows


def _of_rows(rows: np.ndarray, head: Any, noise: Mapping[str, Any]) -> Audit:
    """The subspace of rows with the head's number of directions, and the head itself."""
    # For any estimate: one Gram matrix serves both.
    existing = None if head is None else min(head.shape[1], len(rows) - 1, rows.shape[1] - 1)
    subspace = estimate_output_subspace(rows, dimension=existing, **noise)
    where, alignment = subspace.vocab_where, None
    if head is not None:
        alignment = align_head(subspace.basis[where], np.asarray(head)[where])
    return Audit(prompts=len(rows), subspace=subspace, alignment=alignment)


def _by_bias(oracle: Any, prompts: Any, vocab_size: int, head: Any, corner: int) -> Audit:
    row = recover_log_probs(oracle, prompts[0], vocab_size)
    if not corner:
        return Audit(prompts=1, row=row)
    columns = np.random.default_rng(0).choice(vocab_size, min(corner, vocab_size), replace=False)
    rows = corner_matrix(oracle, list(prompts[:corner]), columns, vocab_size)
    result = _of_rows(rows, None if head is None else np.asarray(head)[columns], {})
    return dataclasses.replace(result, row=row, tokens=columns)


def _row_error(row: RecoveredRow, logits: np.ndarray) -> float:
    """Over tokens that are likely enough; of differences if the row is not normalised."""
    truth = _log_softmax(logits)
    near = row.known & (truth.max() - truth <= SPAN)
    if row.method == "searched" and not row.known.all():
        truth = logits - logits.max()
    return float(np.abs(row.log_probs - truth)[near].max(initial=0.0))


def _rows(oracle: Any, prompts: Any, vocab_size: int) -> np.ndarray:
    """Rows as a reader sees them: beyond a top-k the k-th value, beyond one value an even rest."""
    answer = oracle.ask(prompts)
    values, tokens = np.asarray(answer.values), np.asarray(answer.tokens)
    # A server's top-k is sorted even if it covers the whole vocabulary.
    if values.shape[1] == vocab_size and (tokens == np.arange(vocab_size)).all():
        return values
    rest = values.min(axis=1, keepdims=True)
    if (tokens == tokens[:, :1]).all():
        left = np.maximum(-np.expm1(np.float64(values)), np.finfo(np.float32).tiny)
        rest = np.minimum(rest, np.log(left / (vocab_size - 1)))
    filled = np.repeat(rest.astype(np.float32), vocab_size, axis=1)
    np.put_along_axis(filled, tokens, values, axis=1)
    return filled


def _honest(oracle: Any, prompts: Any, vocab_size: int, logits: Any) -> Mapping[str, float]:
    """Value of one answer without a bias to a user who wants the distribution."""
    if oracle.policy.returns == "token":
        drawn = np.asarray(oracle.ask(prompts).tokens)[:, 0]
        return {"top1": float((drawn == np.argmax(logits, axis=-1)).mean())}
    return utility_loss(_log_softmax(logits), _rows(oracle, prompts, vocab_size))


def _log_softmax(logits: Any) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits))

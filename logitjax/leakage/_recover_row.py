"""A whole row of log-probabilities from an API that reports a few values and takes a bias."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.special

from logitjax.leakage._policy import Answer, LogitPolicy
from logitjax.ops import Array


@runtime_checkable
class Asked(Protocol):
    """What is asked: a `LogitOracle`, or a client of a server of one's own."""

    policy: LogitPolicy

    def ask(self, prompts: Any, /, *, temperature: float = 0.0) -> Answer: ...

    def ask_biased(
        self, prompt: Any, bias_tokens: Any, bias_values: Any, /, *, temperature: float = 0.0
    ) -> Answer: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveredRow:
    """A row of log-probabilities.

    Attributes:
        log_probs: ``[vocab]``, float32 nats; NaN where nothing was found.
        known: ``[vocab]``, bool.
        error_bound: nats, from the decimals and the number format of the answers.
        queries: what it took.
        method: ``reference``, ``visible``, ``alone`` or ``forced``, see `recover_log_probs`;
            ``harvested``, ``searched``.
    """

    log_probs: np.ndarray
    known: np.ndarray
    error_bound: float
    queries: int
    method: str

    @property
    def coverage(self) -> float:
        """Share of the vocabulary that was found."""
        return float(self.known.mean())


def row_queries(vocab: int, top_k: int) -> int:
    """Queries for a whole row with a reference token: ``1 + ceil((V - 1) / (K - 1))``; V at K = 1.

    >>> row_queries(5000, 5)
    1251
    """
    if top_k < 2:
        return vocab
    return 1 + math.ceil((vocab - 1) / (top_k - 1))


def recover_log_probs(
    oracle: Asked,
    prompt: Sequence[int] | Array,
    vocab_size: int,
    *,
    bias: float | None = None,
    tokens: Sequence[int] | Array | None = None,
    largest_error: float = 0.1,
) -> RecoveredRow:
    """Recover all log-probabilities of the next token from answers to biased queries.

    If a bias moves only the drawn token, whose own value is reported without the bias, each token
    is forced in turn: V queries a row.

    If a bias moves what is reported, one query without a bias gives the most likely token and its
    log-probability, the reference. Each further query lifts the reference and k - 1 tokens by the
    same bias to the top of the answer. Whatever the bias made of the normaliser cancels::

        log p_i = (y_i - y_r) + log p_r                        reference
        log p_i = (y_i - bias - y_r) + log p_r                 visible: y_r is without a bias
        log p_i = y_i - logaddexp(bias + log(1 - P), log P)    alone: no reference, P = exp y_i

    The bias has to exceed the range of the logits, else tokens stay below the top k. These are
    asked for again one by one, beside the unbiased reference (`visible`). An API that reports one
    value has no room for a reference (`alone`). What is still missing is reported as missing, not
    guessed.

    Args:
        oracle: the API, e.g. a `LogitOracle`.
        prompt: token ids.
        vocab_size: V.
        bias: in nats; by default 30, then 80 for tokens that stay below, or what the policy allows.
        tokens: the tokens to recover; by default all. An API of logits then gives their differences
            to the most likely token, because the normaliser is a sum over all.
        largest_error: in nats; a setting whose answers cannot be undone to this error is refused.

    Raises:
        ValueError: the API's answers do not depend on a bias, have too few decimals, or the setting
            is too ill-conditioned; the message says which.
        BudgetExhaustedError: the oracle's budget is spent.

    References:
        openlogprobs; Carlini et al., 2024, section 5. Departs from both in the reference token:
        their form without one loses 4 nats at a bias of 20 in float32.
    """
    policy = oracle.policy
    # Where every answer is the whole row there is no token of its own to be forced.
    forces = policy.bias == "sampling" and policy.sampled and policy.top_k is not None
    if policy.returns == "token":
        raise ValueError(
            "oracle: expected an API that reports values, got tokens alone; search_logits finds "
            "them by comparisons"
        )
    if policy.bias != "reported" and not forces:
        whole = "each answer, a whole row," if policy.top_k is None else None
        seen = whole or ("what is drawn" if policy.sampled else "the top k")
        raise ValueError(
            f"oracle: expected reported values that move with a bias, got bias={policy.bias!r}: "
            f"only {seen} can be seen"
        )
    if bias is not None and not 0 < bias <= policy.bias_limit:
        raise ValueError(f"bias: expected a number in (0, {policy.bias_limit}], got {bias}")
    # What a float32 server adds to a logit costs it digits: no more than is needed.
    biases = sorted({min(x, policy.bias_limit) for x in (30.0, 80.0)}) if bias is None else [bias]
    step = _step(policy)
    if 3 * step > largest_error:
        raise ValueError(
            f"answers have {policy.decimals} decimals: log-probabilities could be off by "
            f"{3 * step:.2g} nats, more than largest_error={largest_error}"
        )
    wanted = np.arange(vocab_size) if tokens is None else np.asarray(tokens, np.int64)
    if forces:
        return _forced(oracle, prompt, wanted, vocab_size, bias or policy.bias_limit)
    row = _Row.asked(oracle, prompt, vocab_size)
    k = vocab_size if policy.top_k is None else min(policy.top_k, vocab_size)
    # One place of the answer, and one of the bias, is for the reference.
    group = min(k - 1, policy.max_biased - 1)
    if group < 1:
        return _alone(row, wanted, biases[0], step, largest_error)
    missing = wanted[wanted != row.reference]
    queries, method = 1, "reference"
    for largest in biases:
        if len(missing):
            queries += row.ask(missing, largest, group)
        missing = missing[~row.known[missing]]
    if len(missing) and policy.returns == "logprobs":
        queries += row.ask_visible(missing, largest)
        method = "visible" if row.known[missing].any() else method
    return row.result(
        error_bound=3 * step + 4 * float(np.finfo(np.float32).eps) * largest,
        queries=queries,
        method=method,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """What is known of a row, relative to a token whose value was told without a bias."""

    oracle: Asked
    prompt: Any
    reference: int
    value: float
    found: np.ndarray
    known: np.ndarray

    @classmethod
    def asked(cls, oracle: Asked, prompt: Any, vocab_size: int) -> "_Row":
        """One query without a bias, which tells the first k tokens."""
        policy, first = oracle.policy, oracle.ask([prompt])
        tokens, values = np.asarray(first.tokens)[0], np.asarray(first.values)[0]
        found = np.full(vocab_size, -np.inf, np.float32)
        known = np.zeros(vocab_size, bool)
        # Of logits answers tell differences; the normaliser comes last.
        zero = values[0] if policy.returns == "logits" else 0.0
        found[tokens] = values - zero
        known[tokens] = policy.floor is None or values > policy.floor
        return cls(
            oracle=oracle,
            prompt=prompt,
            reference=int(tokens[0]),
            value=float(values[0] - zero),
            found=found,
            known=known,
        )

    def learn(self, tokens: Any, values: Any) -> None:
        self.found[tokens] = values
        self.known[tokens] = True

    def ask(self, tokens: np.ndarray, bias: float, group: int) -> int:
        """Tokens in groups, the reference with each, all lifted by one bias."""
        short = -len(tokens) % group
        filled = np.concatenate([tokens, np.repeat(tokens[-1:], short)]).reshape(-1, group)
        groups = np.concatenate([np.full((len(filled), 1), self.reference), filled], axis=1)
        biases = np.full(groups.shape, bias, np.float32)
        # A token that fills up the last group must not be lifted twice.
        biases[-1, group + 1 - short :] = 0.0
        answer = self.oracle.ask_biased(self.prompt, groups, biases)
        said, values = np.asarray(answer.tokens), np.asarray(answer.values)
        here = said == self.reference
        anchor = np.where(here, values, 0.0).sum(axis=1, keepdims=True)
        undone = values - anchor + np.float32(self.value)
        # Only tokens of this query were lifted: others in the answer stand lower by the bias.
        lifted = (said[:, :, None] == groups[:, None, :]).any(-1) & here.any(axis=1)[:, None]
        if self.oracle.policy.floor is not None:
            lifted &= values > self.oracle.policy.floor
        self.learn(said[lifted], undone[lifted])
        return len(groups)

    def ask_visible(self, tokens: np.ndarray, bias: float) -> int:
        """One token a query, lifted above what hid it; the reference stays where it is."""
        floor, alone = self.oracle.policy.floor, tokens[:, None]
        answer = self.oracle.ask_biased(self.prompt, alone, np.full(alone.shape, bias, np.float32))
        for token, values, where in zip(tokens, answer.values, answer.tokens, strict=True):
            mine = values[where == token]
            hidden = floor is not None and (mine <= floor).any()
            if len(mine) and self.reference in where and not hidden:
                # The reference was not lifted, as the token was.
                lifted = mine[0] - values[where == self.reference][0]
                self.learn(token, lifted + np.float32(self.value) - np.float32(bias))
        return len(tokens)

    def result(self, *, error_bound: float, queries: int, method: str) -> RecoveredRow:
        found = self.found
        if self.oracle.policy.returns == "logits" and self.known.all():
            found = _normalised(found)
        return RecoveredRow(
            log_probs=np.where(self.known, found, np.nan).astype(np.float32),
            known=self.known,
            error_bound=error_bound,
            queries=queries,
            method=method,
        )


def _normalised(logits: np.ndarray) -> np.ndarray:
    shift = logits.max()
    return logits - shift - np.log(np.exp(logits - shift, dtype=np.float64).sum())


def _forced(
    oracle: Asked, prompt: Any, tokens: np.ndarray, vocab_size: int, bias: float
) -> RecoveredRow:
    """Each token made the likeliest, at temperature 0; its reported value is the one without it."""
    policy = oracle.policy
    answer = oracle.ask_biased(prompt, tokens[:, None], np.full((len(tokens), 1), bias, np.float32))
    values = np.asarray(answer.values)[:, 0]
    # A token further down than the bias reaches is not drawn, and its value not reported.
    came = np.asarray(answer.tokens)[:, 0] == tokens
    came &= np.isfinite(values)
    if policy.floor is not None:
        came &= values > policy.floor
    found, known = np.full(vocab_size, np.nan), np.zeros(vocab_size, bool)
    found[tokens[came]] = values[came]
    known[tokens[came]] = True
    if policy.returns == "logits":
        found = _normalised(found) if known.all() else found - np.nanmax(found, initial=-np.inf)
    largest = float(np.abs(values[came]).max(initial=0.0))
    return RecoveredRow(
        log_probs=found.astype(np.float32),
        known=known,
        error_bound=_step(policy) + 4 * float(np.finfo(np.float32).eps) * largest,
        queries=len(tokens),
        method="forced",
    )


def _step(policy: LogitPolicy) -> float:
    """Half the distance of neighbouring values an answer can hold."""
    return 0.0 if policy.decimals is None else 0.5 * 10.0**-policy.decimals


def _alone(
    row: _Row, tokens: np.ndarray, bias: float, step: float, largest_error: float
) -> RecoveredRow:
    """An API that reports one value: no room for a reference."""
    if row.oracle.policy.returns == "logits":
        raise ValueError("top-1 logits hold no normaliser: a bias cannot be told from the logit")
    rest = tokens[~row.known[tokens]]
    biases = np.full((len(rest), 1), bias, np.float32)
    answer = row.oracle.ask_biased(row.prompt, rest[:, None], biases)
    came = np.asarray(answer.tokens)[:, 0] == rest
    undone, factor = unbias_alone(np.asarray(answer.values)[:, 0], bias)
    resolution = max(step, float(np.finfo(np.float32).eps))
    errors = np.where(np.isnan(factor), np.inf, factor * resolution)
    good = came & (errors <= largest_error)
    if not good.any():
        raise ValueError(
            f"bias={bias} leaves 1 - P(biased) below what answers resolve, or lifts no token to "
            f"the top: errors of {np.min(errors, initial=np.inf):.2g} nats and more, "
            f"largest_error={largest_error}; ask for top_k >= 2"
        )
    row.learn(rest[good], undone[good])
    bound = float(errors[good].max())
    return row.result(error_bound=bound, queries=1 + len(rest), method="alone")


def unbias_alone(values: np.ndarray, bias: float) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of tokens that were biased alone, and by how much errors are multiplied.

    With P_B the reported mass and P the true one, P_B / (1 - P_B) is e^bias P / (1 - P). The factor
    is about P_B / (1 - P_B) where that counts, and nan where 1 - P_B is lost altogether.

    References:
        The formula of openlogprobs; its error is our reading of it.
    """
    values = np.asarray(values, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        # log(1 - P_B) where P_B is close to 1 is what makes this form hard.
        rest = np.log(-np.expm1(np.minimum(values, 0.0)))
        share = scipy.special.expit(bias + rest - values)
        # Where 1 - P_B is lost this is zero times infinity: nan.
        factor = 1.0 + share * np.exp(values - rest)
    return values - np.logaddexp(bias + rest, values), factor


def corner_matrix(
    oracle: Asked, prompts: Sequence[Any], columns: np.ndarray, vocab_size: int
) -> np.ndarray:
    """Log-probabilities of chosen tokens after each prompt, ``[n, m]``, float32.

    A corner of h + s rows and as many columns has the rank of the whole matrix, for
    (h + s)^2 / (K - 1) queries instead of n V / (K - 1). Rows differ by their normalisers.

    References:
        Carlini et al., 2024, section 4.2.
    """
    if oracle.policy.top_k is None:
        return np.asarray(oracle.ask(prompts).values)[:, columns]
    rows = []
    for prompt in prompts:
        row = recover_log_probs(oracle, prompt, vocab_size, tokens=columns)
        missing = columns[~row.known[columns]]
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(columns)} tokens never reached the answer, "
                f"e.g. {missing[0]}: the bias is smaller than the range of the logits"
            )
        rows.append(row.log_probs[columns])
    return np.stack(rows)

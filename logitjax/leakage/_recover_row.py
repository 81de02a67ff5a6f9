"""Recovery of a whole row of log-probabilities from an API with few values and a bias."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from logitjax.leakage._oracle import Asked
from logitjax.leakage._policy import Answer, LogitPolicy
from logitjax.leakage._search import search_logits
from logitjax.ops import Array

# Nats: answers with fewer decimals cannot be inverted.
_LARGEST_ERROR = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecoveredRow:
    """A row of log-probabilities."""

    log_probs: np.ndarray  # [vocab], float32 nats; NaN where nothing was found
    known: np.ndarray  # [vocab]
    # Nats, from the decimals and the number format of the answers.
    error_bound: float
    queries: int
    # Reference, forced or harvested, see `recover_log_probs`; searched.
    method: str

    @property
    def coverage(self) -> float:
        """Share of the vocabulary that was recovered."""
        return float(self.known.mean())


def recover_log_probs(
    oracle: Asked,
    prompt: Sequence[int] | Array,
    vocab_size: int,
    *,
    bias: float | None = None,
    tokens: Sequence[int] | Array | None = None,
    draws: int = 2048,
) -> RecoveredRow:
    """Recover log-probabilities of the next token from answers to many queries.

    If only the token, or one value, is reported, logits are `searched` for by comparisons under a
    bias: if token t is drawn at temperature 0 under biases b, then `z_j + b_j <= z_t + b_t` for all
    j. Tokens are biased to be drawn equally often, within a factor of two of the most that one of N
    answers can reveal: 2.6 queries per token for 1e-4 of the range. Tokens 40 nats below the
    largest stay unknown; the row is then relative to its largest.

    If a bias only changes the drawn token, and its own value is reported without the bias, each
    token is `forced` in turn: V queries per row. If no bias is accepted, the values of the drawn
    tokens are `harvested`. They are those of temperature 1 whatever the draw's, so draws at
    temperature 2 reach rarer tokens. Twice the head's width of them complete a row of a known
    subspace (`OutputSubspace.complete`).

    If a bias changes reported values, one query without a bias gives the most likely token and its
    log-probability, the reference. Each further query lifts the reference and k - 1 tokens by the
    same bias to the top of the answer (`LogitPolicy.row_queries`). The bias's effect on the
    normaliser cancels::

        log p_i = (y_i - y_r) + log p_r

    A bias below the range of the logits leaves tokens below the top k: they count as missing.

    After openlogprobs and Carlini et al., 2024, section 5, except for the reference token: their
    form without one loses 4 nats at a bias of 20 in float32. Their searches keep one interval per
    token, or close all constraints at O(N^3) per answer; here it is O(N^2).

    Args:
        oracle: The API, e.g. a `LogitOracle`.
        bias: In nats; by default 30, then 80 for tokens that stay below, or the policy's limit.
        tokens: The tokens to recover; by default all. An API of logits then gives their differences
            to the most likely token, because the normaliser is a sum over all.
        draws: Number of draws if no bias is accepted.

    Raises:
        ValueError: The API's answers do not depend on a bias, or have too few decimals.
        BudgetExhaustedError: The oracle's budget is spent.

    >>> from logitjax.leakage import LogitOracle, LogitPolicy
    >>> table = np.log(np.array([[0.5, 0.3, 0.2, 1e-30]], np.float32))
    >>> oracle = LogitOracle(lambda tokens: table, LogitPolicy.parse("draws"))
    >>> row = recover_log_probs(oracle, [0], 4, draws=60)
    >>> print(np.exp(row.log_probs).round(3), row.queries)
    [0.5 0.3 0.2 nan] 60
    """
    policy = oracle.policy
    k = vocab_size if policy.top_k is None else min(policy.top_k, vocab_size)
    # One entry of the answer, and one of the bias, is for the reference.
    group = min(k - 1, policy.max_biased - 1)
    expected = np.arange(vocab_size) if tokens is None else np.asarray(tokens, np.int64)
    if policy.returns == "token" or (policy.bias == "reported" and group < 1):
        return _searched(oracle, prompt, expected, vocab_size)
    if policy.harvests:
        return harvested(oracle, prompt, vocab_size, draws)
    # If every answer is the whole row, no single token can be forced.
    forces = policy.bias == "sampling" and policy.sampled and policy.top_k is not None
    if policy.bias != "reported" and not forces:
        whole_row = "each answer, a whole row," if policy.top_k is None else None
        seen = whole_row or ("what is drawn" if policy.sampled else "the top k")
        raise ValueError(
            f"oracle: expected reported values that move with a bias, got bias={policy.bias!r}: "
            f"only {seen} can be seen"
        )
    if bias is not None and not 0 < bias <= policy.bias_limit:
        raise ValueError(f"bias: expected a number in (0, {policy.bias_limit}], got {bias}")
    # What a float32 server adds to a logit costs digits, so it is no more than needed.
    biases = sorted({min(x, policy.bias_limit) for x in (30.0, 80.0)}) if bias is None else [bias]
    if 3 * policy.step > _LARGEST_ERROR:
        raise ValueError(
            f"decimals: expected answers that can be inverted to {_LARGEST_ERROR} nats, got "
            f"{policy.decimals} decimals, which leave {3 * policy.step:.2g}"
        )
    if forces:
        return _forced(oracle, prompt, expected, vocab_size, bias or policy.bias_limit)
    # One query without a bias gives the first k tokens; the largest is the reference.
    first = oracle.ask([prompt])
    notes, values = np.asarray(first.tokens)[0], np.asarray(first.values)[0]
    # Answers with logits give differences; the normaliser comes last.
    values = values - (values[0] if policy.returns == "logits" else 0.0)
    selected, existing = np.full(vocab_size, np.nan, np.float32), np.zeros(vocab_size, bool)
    existing[notes] = policy.floor is None or values > policy.floor
    selected[notes] = np.where(existing[notes], values, np.nan)
    reference = int(notes[0]), float(values[0])
    missing, queries = expected[expected != notes[0]], 1
    for largest in biases:
        if len(missing):
            queries += _lift(oracle, prompt, reference, missing, largest, group, selected)
            existing |= np.isfinite(selected)
        missing = missing[~existing[missing]]
    selected = np.where(
        existing, _normalised(selected) if policy.returns == "logits" else selected, np.nan
    )
    return RecoveredRow(
        log_probs=selected.astype(np.float32),
        known=existing,
        error_bound=3 * policy.step + 4 * float(np.finfo(np.float32).eps) * largest,
        queries=queries,
        method="reference",
    )


def _lift(
    oracle: Asked,
    prompt: Any,
    reference: tuple[int, float],
    tokens: np.ndarray,
    bias: float,
    group: int,
    row: np.ndarray,
) -> int:
    """Query tokens in groups with the reference, all lifted by one bias, and write into `row`."""
    short = -len(tokens) % group
    filled = np.concatenate([tokens, np.repeat(tokens[-1:], short)]).reshape(-1, group)
    groups = np.concatenate([np.full((len(filled), 1), reference[0]), filled], axis=1)
    biases = np.full(groups.shape, bias, np.float32)
    # A token that pads the last group must not be lifted twice.
    biases[-1, group + 1 - short :] = 0.0
    answer = oracle.ask_biased(prompt, groups, biases)
    listed, values = np.asarray(answer.tokens), np.asarray(answer.values)
    here = listed == reference[0]
    anchor = np.where(here, values, 0.0).sum(axis=1, keepdims=True)
    # Only tokens of this query were lifted: others in the answer are lower by the bias.
    lifted = (listed[:, :, None] == groups[:, None, :]).any(-1) & here.any(axis=1)[:, None]
    if oracle.policy.floor is not None:
        lifted &= values > oracle.policy.floor
    row[listed[lifted]] = (values - anchor + np.float32(reference[1]))[lifted]
    return len(groups)


def _normalised(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities; if some logits are unknown, differences to the largest."""
    below = logits - np.nanmax(logits, initial=-np.inf)
    total = np.exp(below, dtype=np.float64).sum() if np.isfinite(below).all() else 1.0
    return below - np.log(total)


def _forced(
    oracle: Asked, prompt: Any, tokens: np.ndarray, vocab_size: int, bias: float
) -> RecoveredRow:
    """Lift each token to the top at temperature 0; its reported value is the unbiased one."""
    answer = oracle.ask_biased(prompt, tokens[:, None], np.full((len(tokens), 1), bias, np.float32))
    # A token further down than the bias reaches is not drawn, so its value is not reported.
    forced = np.asarray(answer.tokens)[:, 0] == tokens
    row = _own_values(oracle.policy, answer, forced, vocab_size, "forced")
    if oracle.policy.returns == "logits":
        row = dataclasses.replace(row, log_probs=_normalised(row.log_probs).astype(np.float32))
    return row


def harvested(
    oracle: Asked, prompt: Any, vocab_size: int, draws: int, temperature: float = 2.0
) -> RecoveredRow:
    """The values of drawn tokens; likely tokens come first."""
    answer = oracle.ask([prompt] * draws, temperature=temperature)
    return _own_values(oracle.policy, answer, np.ones(draws, bool), vocab_size, "harvested")


def _own_values(
    policy: LogitPolicy, answer: Answer, forced: np.ndarray, vocab_size: int, method: str
) -> RecoveredRow:
    """Values of drawn tokens, which come first in an answer; values at a floor are omitted."""
    tokens, values = np.asarray(answer.tokens)[:, 0], np.asarray(answer.values, np.float32)[:, 0]
    forced = forced & np.isfinite(values) & (policy.floor is None or values > policy.floor)
    result, existing = np.full(vocab_size, np.nan, np.float32), np.zeros(vocab_size, bool)
    result[tokens[forced]] = values[forced]
    existing[tokens[forced]] = True
    rounding = 4 * float(np.finfo(np.float32).eps) * np.abs(values[forced]).max(initial=0.0)
    bound = {"error_bound": policy.step + float(rounding), "queries": len(tokens)}
    return RecoveredRow(log_probs=result, known=existing, method=method, **bound)


def _searched(oracle: Asked, prompt: Any, tokens: np.ndarray, vocab_size: int) -> RecoveredRow:
    searched = search_logits(oracle, prompt, tokens, span=min(40.0, oracle.policy.bias_limit))
    log_probs, middle = np.full(vocab_size, np.nan, np.float32), searched.middle
    log_probs[tokens] = middle
    finite = np.isfinite(log_probs)
    if finite.all():
        log_probs -= np.log(np.exp(log_probs, dtype=np.float64).sum())
    widths = (searched.upper - searched.lower)[np.isfinite(middle)]
    return RecoveredRow(
        log_probs=log_probs,
        known=finite,
        # Contradictory answers bound nothing.
        error_bound=math.inf if searched.contradictions else float(widths.max(initial=0.0)),
        queries=searched.queries,
        method="searched",
    )


def corner_matrix(
    oracle: Asked, prompts: Sequence[Any], columns: np.ndarray, vocab_size: int
) -> np.ndarray:
    """Log-probabilities of chosen tokens after each prompt, ``[n, m]``, minus the normalisers.

    A corner of h + s rows and columns has the matrix's rank (Carlini et al., 2024, section 4.2).
    """
    if oracle.policy.top_k is None:
        return np.asarray(oracle.ask(prompts).values)[:, columns]
    rows = []
    for prompt in prompts:
        row = recover_log_probs(oracle, prompt, vocab_size, tokens=columns)
        if len(missing := columns[~row.known[columns]]):
            raise ValueError(
                f"bias: expected more than the range of the logits, got {len(missing)} of "
                f"{len(columns)} tokens that never reached the answer, e.g. {missing[0]}"
            )
        rows.append(row.log_probs[columns])
    return np.stack(rows)

"""Log-probabilities of whatever tokens an API draws, where it takes no bias."""

from collections.abc import Sequence

import numpy as np

from logitjax.leakage._recover_row import Asked, RecoveredRow
from logitjax.ops import Array


def harvest_log_probs(
    oracle: Asked,
    prompt: Sequence[int] | Array,
    vocab_size: int,
    *,
    queries: int,
    temperature: float = 2.0,
) -> RecoveredRow:
    """Collect the log-probabilities that an API reports of the tokens it draws.

    They are reported at temperature 1 whatever the token was drawn at, so a higher temperature
    reaches rarer tokens. For 1,536 of 50,257 tokens (normal logits of standard deviation 3.34) it
    takes 7,200 draws at temperature 1, and 1,800 at temperature 2. Likely tokens come first. If a
    basis of the head is known, values of twice its width complete the row
    (`OutputSubspace.complete`).

    Args:
        oracle: The API; its policy reports the drawn token's own value.
        prompt: Token ids.
        vocab_size: V.
        queries: Number of draws.
        temperature: Temperature of the draws.

    Raises:
        ValueError: The API does not report the drawn token's value.
        BudgetExhaustedError: The oracle's budget is spent.

    >>> from logitjax.leakage import LogitOracle, LogitPolicy
    >>> table = np.log(np.array([[0.5, 0.3, 0.2, 1e-30]], np.float32))
    >>> oracle = LogitOracle(lambda tokens: table, LogitPolicy.parse("draws"))
    >>> row = harvest_log_probs(oracle, [0], 4, queries=60)
    >>> print(np.exp(row.log_probs).round(3), row.queries)
    [0.5 0.3 0.2 nan] 60
    """
    policy = oracle.policy
    if not policy.sampled or policy.returns != "logprobs":
        raise ValueError(
            "oracle: expected an API that reports the log-probability of the token it draws, got "
            f"sampled={policy.sampled}, returns={policy.returns!r}"
        )
    answer = oracle.ask([prompt] * queries, temperature=temperature)
    tokens = np.asarray(answer.tokens)[:, 0]
    values = np.asarray(answer.values, np.float32)[:, 0]
    seen = values > (-np.inf if policy.floor is None else policy.floor)
    found, known = np.full(vocab_size, np.nan, np.float32), np.zeros(vocab_size, bool)
    found[tokens[seen]] = values[seen]
    known[tokens[seen]] = True
    step = 0.0 if policy.decimals is None else 0.5 * 10.0**-policy.decimals
    rounding = 4 * float(np.finfo(np.float32).eps) * float(np.abs(values).max(initial=0.0))
    return RecoveredRow(
        log_probs=found,
        known=known,
        error_bound=step + rounding,
        queries=queries,
        method="harvested",
    )

"""What is asked for the hidden dimension alone: some tokens of some rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from logitjax.leakage._recover_row import Asked, recover_log_probs
from logitjax.ops import Array


def corner_matrix(
    oracle: Asked,
    prompts: Sequence[Any],
    tokens: Sequence[int] | Array,
    vocab_size: int,
    *,
    bias: float | None = None,
) -> np.ndarray:
    """Log-probabilities of chosen tokens after each prompt.

    A corner of h + s rows and as many columns has the rank of the whole matrix, for
    (h + s)^2 / (K - 1) queries instead of n V / (K - 1).

    Args:
        oracle: what to ask. Where it reports whole rows, one query a prompt; else with a bias, or
            one query a value where the bias forces a token.
        prompts: n sequences of token ids.
        tokens: m columns.
        vocab_size: V.
        bias: as in `recover_log_probs`.

    Returns:
        ``[n, m]``, float32. Rows differ by their normalisers: subtract the row means, or expect a
        rank of h + 1.

    References:
        Carlini et al., 2024, section 4.2, for the corner.
    """
    columns = np.asarray(tokens, np.int64)
    if oracle.policy.top_k is None:
        answer = oracle.ask(prompts)
        return np.asarray(answer.values)[:, columns]
    rows = []
    for prompt in prompts:
        row = recover_log_probs(oracle, prompt, vocab_size, bias=bias, tokens=columns)
        if not row.known[columns].all():
            missing = columns[~row.known[columns]]
            raise ValueError(
                f"{len(missing)} of {len(columns)} tokens never reached the answer, "
                f"e.g. {missing[0]}: the bias is smaller than the range of the logits"
            )
        rows.append(row.log_probs[columns])
    return np.stack(rows)

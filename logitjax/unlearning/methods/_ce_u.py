"""CE-U: self-distillation without the memorised token."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read
from logitjax.unlearning.methods._undial import UNDIAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class CEU(TwoSided):
    """Self-distillation without the memorised token.

    `cross-entropy(q, softmax(logits))`, q = `softmax(logits, logit_y = -inf)`, a constant. This is
    `UNDIAL` from the model itself with a `beta` of infinity. Its gradient by the logits,
    `p_y (onehot(y) - q)`, fades as the token is forgotten.

    References:
        Yang, CE-U: cross entropy unlearning, 2025 (arXiv 2503.01224). The first token of an answer
        is left out, as in OpenUnlearning's `CEU`.
    """

    reads = (Need("forget", "states"),)

    def forget(self, read: Read) -> Any:
        here, head = read.states("forget"), read.head()
        values = UNDIAL(beta=float("inf")).values(here, head, here, head, read.labels("forget"))
        where = read.where("forget")
        return read.put("forget", values), where & (jnp.cumsum(where, axis=-1) > 1)

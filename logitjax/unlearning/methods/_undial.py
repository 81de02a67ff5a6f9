"""UNDIAL: self-distillation with the logit of the memorised token lowered."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.losses import Head
from logitjax.losses.sweep import KLStatistic, LogitBlock, run
from logitjax.ops import Array, checks
from logitjax.unlearning._method import TwoSided
from logitjax.unlearning._reads import Need, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Undial(KLStatistic):
    """Cross-entropy from a teacher whose logit at the label is lowered by `strength`."""

    strength: float
    vocab: int

    def term(self, over: jax.Array, under: jax.Array) -> jax.Array:
        # cross-entropy: that of the teacher is constant.
        return -under

    def sides(self, block: LogitBlock) -> tuple[jax.Array, jax.Array]:
        assert block.teacher is not None
        # Numbers of the whole vocabulary, on a shard too.
        hit = block.columns == block.tokens["labels"][..., None]
        return block.teacher - jnp.where(hit, self.strength, 0.0), block.student

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        labels = tokens["labels"]
        return jnp.where((labels >= 0) & (labels < self.vocab), outputs, jnp.nan)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNDIAL(TwoSided):
    """Self-distillation from the model before, with the memorised token's logit lowered.

    The loss is `cross-entropy(softmax(reference - beta onehot(y)), softmax(logits))`.

    Attributes:
        beta: How far the logit is lowered.

    References:
        Dong et al., UNDIAL, 2024 (arXiv 2402.10052). OpenUnlearning's `UNDIAL` (beta 10, no retain
        loss) averages over all positions and lets a label of -100 name the token V - 100; here such
        labels give nan, for the caller's mask to leave out.
    """

    beta: float = 10.0

    peak = 3e-2
    reads = (Need("forget", "states"), Need("forget", "states", before=True))

    def values(
        self,
        hidden: Float[Array, "*batch hidden"],
        head: Head | Array,
        reference_hidden: Float[Array, "*batch reference_hidden"],
        reference_head: Head | Array,
        labels: Int[Array, "*batch"],
        **options: Any,
    ) -> Float[jax.Array, "*losses"]:
        """Losses of tokens from hidden states and heads, now and before, in blocks of the logits.

        The model before gets no gradient. `options` are `weights`, `vocab_where`, `blocks` and
        `axis_name` of `losses.linear_kl_divergence`.

        >>> import numpy as np
        >>> one, head = np.ones((1, 1), np.float32), np.zeros((1, 4), np.float32)
        >>> print(f"{jax.jit(UNDIAL().values)(one, head, one, head, np.array([2]))[0]:.4f}")
        1.3863
        """
        checks.shapes(
            hidden=(hidden, "float *batch hidden"),
            labels=(labels, "int *batch"),
            reference_hidden=(reference_hidden, "float *batch reference"),
        )
        hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
        head = Head.of(head).resolve(hidden.shape[-1])
        before = Head.of(reference_head).resolve(jnp.shape(reference_hidden)[-1], "reference_head")
        size = head.vocab_size(options.get("axis_name"))
        statistic = _Undial(strength=float(self.beta), vocab=size)
        teacher, tokens = (reference_hidden, before), {"labels": labels}
        loss = run(statistic, hidden, head, teacher=teacher, tokens=tokens, **options)
        # The sum, without outputs.
        return loss if options.get("weights") is None else loss[0]

    def forget(self, read: Read) -> Any:
        sides = [(read.states("forget", before=b), read.head(before=b)) for b in (False, True)]
        values = self.values(*sides[0], *sides[1], read.labels("forget"))
        # Answers alone, back in their rows.
        return read.put("forget", values), read.where("forget")

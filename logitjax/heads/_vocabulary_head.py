import os
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int, Key

from logitjax.heads._head_cost import HeadCost
from logitjax.losses import Head, linear_cross_entropy
from logitjax.ops import Array, TopK, checks
from logitjax.storage import write_head


# Not an `nnx.Param`, so filters of optimizers and of gradients skip it.
class Assignment(nnx.Variable):
    """Tables of a head: saved with it, never trained."""


class VocabularyHead(nnx.Module):
    """Losses through `as_linear`; top-k and samples through the logits of the whole vocabulary.

    A subclass has ``__call__(hidden, embedding=None)``. All heads share the signatures of `nll`,
    `top_k` and `sample`, so that decoding and training code works with any head; heads with a
    faster way override them. A tied head takes its rows from ``embedding``.

    Constructors take ``hidden_size`` d and ``vocab_size`` V, ``unigram`` ``[vocab]`` (counts or
    probabilities whose logarithms are the initial biases), ``dtype`` of the computation,
    ``param_dtype`` of the parameters, and ``rngs`` for their initial values.
    """

    dtype: Any
    #: Whether `top_k` costs less than all logits; greedy decoding then calls it.
    screens: ClassVar[bool] = False

    def __call__(
        self, hidden: Float[Array, "*batch hidden"], embedding: Array | None = None
    ) -> Float[jax.Array, "*batch vocab"]:
        raise NotImplementedError

    def save(self, directory: str | os.PathLike[str], **about: Any) -> None:
        """Write ``head.safetensors``, and ``head.json`` with ``about``, as `vq.load_head` reads."""
        tensors, options = self._record()
        write_head(directory, {"kind": type(self).__name__, "options": options, **about}, tensors)

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays, and the other arguments of the constructor."""
        raise ValueError(f"head: expected one that can be saved, got a {type(self).__name__}")

    def cost(self, embedding: Array | None = None) -> HeadCost:
        """Return its `HeadCost`. Heads that use the embedding's rows need its shape.

        Only shapes are read: a head created under `nnx.eval_shape` has the same cost.
        """
        raise NotImplementedError

    def as_linear(self, embedding: Any = None) -> Head:
        """The equivalent full head, for losses of hidden states; ValueError if it is not linear."""
        raise ValueError(
            f"head: expected one with a kernel, got a {type(self).__name__}: use nll()"
        )

    def nll(
        self,
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        embedding: Array | None = None,
        **options: Any,
    ) -> Float[jax.Array, "*batch"]:
        """Cross-entropy, not reduced, by blocks of the vocabulary; see `linear_cross_entropy`."""
        # As in `__call__`.
        hidden = jnp.asarray(hidden, self.dtype)
        return linear_cross_entropy(hidden, self.as_linear(embedding), labels, **options)

    @staticmethod
    def initial_bias(unigram: Any, vocab_size: int) -> jax.Array:
        """Log-frequencies, with unseen tokens as a tenth of one; zeros if `unigram` is None."""
        if unigram is None:
            return jnp.zeros(vocab_size)
        # Counts may be integers.
        counts = jnp.asarray(unigram, jnp.float32)
        if counts.shape != (vocab_size,):
            raise ValueError(f"unigram: expected shape ({vocab_size},), got {counts.shape}")
        return _log_frequencies(counts)

    def top_k(
        self, hidden: Float[Array, "*batch hidden"], k: int, embedding: Array | None = None
    ) -> TopK:
        """The k largest logits, their tokens, and the log-normaliser."""
        return TopK.of(self(hidden, embedding), k)

    def sample(
        self,
        key: Key[jax.Array, ""],
        hidden: Float[Array, "*batch hidden"],
        embedding: Array | None = None,
        *,
        temperature: float | Array = 1.0,
    ) -> Int[jax.Array, "*batch"]:
        """Tokens drawn from the whole distribution."""
        checks.positive(temperature, "temperature")
        return jax.random.categorical(key, self(hidden, embedding) / temperature).astype(jnp.int32)


@jax.jit
def _log_frequencies(counts: jax.Array) -> jax.Array:
    # A bias of -inf would never recover.
    return jnp.log(jnp.maximum(counts / counts.sum(), 0.1 / counts.sum()))

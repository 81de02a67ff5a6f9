"""The full output head: an affine map from hidden states to logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from logitjax.ops import Array


def linear_logits(
    hidden: Float[Array, "*batch hidden"],
    kernel: Float[Array, "a b"],
    bias: Float[Array, " vocab"] | None = None,
    *,
    vocab_axis: int = 1,
    dtype: Any = None,
) -> Float[jax.Array, "*batch vocab"]:
    """Logits of a full head: inputs in the compute dtype, sums and result in float32.

    Args:
      hidden: hidden states.
      kernel: ``[hidden, vocab]``, or ``[vocab, hidden]`` (a tied embedding) with ``vocab_axis=0``.
      bias: one number a vocabulary entry.
      vocab_axis: which axis of ``kernel`` is the vocabulary.
      dtype: the compute dtype; that of ``hidden`` when omitted.

    Returns:
      float32 logits.

    >>> linear_logits(jnp.ones((2, 3)), jnp.ones((5, 3)), vocab_axis=0).shape
    (2, 5)
    """
    hidden = jnp.asarray(hidden, dtype)
    kernel = jnp.asarray(kernel, hidden.dtype)
    contract = (((hidden.ndim - 1,), (1 - vocab_axis,)), ((), ()))
    logits = jax.lax.dot_general(hidden, kernel, contract, preferred_element_type=jnp.float32)
    return logits if bias is None else logits + jnp.asarray(bias, jnp.float32)


class LinearHead(nnx.Module):
    """A head with its own kernel ``[hidden, vocab]``.

    >>> head = LinearHead(4, 10, rngs=nnx.Rngs(0))
    >>> head(jnp.ones((2, 4))).shape
    (2, 10)
    >>> kernel, bias, vocab_axis = head.kernel_and_bias()
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        use_bias: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        init = nnx.initializers.normal(hidden_size**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (hidden_size, vocab_size), param_dtype))
        self.bias = nnx.Param(jnp.zeros((vocab_size,), param_dtype)) if use_bias else None

    def __call__(
        self, hidden: Float[Array, "*batch hidden"], embedding: Array | None = None
    ) -> Float[jax.Array, "*batch vocab"]:
        kernel, bias, axis = self.kernel_and_bias()
        return linear_logits(hidden, kernel, bias, vocab_axis=axis, dtype=self.dtype)

    def kernel_and_bias(self, embedding: Array | None = None) -> tuple[Array, Array | None, int]:
        """What the fused linear losses take: kernel, bias or None, axis of the vocabulary."""
        return self.kernel[...], None if self.bias is None else self.bias[...], 1


class TiedHead(nnx.Module):
    """A head without parameters: the kernel is the token embedding ``[vocab, hidden]``."""

    def __init__(self, *, dtype: Any = jnp.float32):
        self.dtype = dtype

    def __call__(
        self, hidden: Float[Array, "*batch hidden"], embedding: Float[Array, "vocab hidden"]
    ) -> Float[jax.Array, "*batch vocab"]:
        return linear_logits(hidden, embedding, vocab_axis=0, dtype=self.dtype)

    def kernel_and_bias(self, embedding: Array) -> tuple[Array, None, int]:
        """What the fused linear losses take: kernel, no bias, axis of the vocabulary."""
        return embedding, None, 0

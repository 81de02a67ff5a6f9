import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from logitjax.heads._head_cost import HeadCost
from logitjax.heads._vocabulary_head import VocabularyHead
from logitjax.losses import Head
from logitjax.ops import Array, Codes


class FullHead(VocabularyHead):
    """The shared part of `LinearHead` and `TiedHead`: a kernel over the whole vocabulary."""

    kernel: Any
    bias: Any

    def __call__(self, hidden: Array, embedding: Any = None) -> jax.Array:
        stored: Any = self.kernel[...] if hasattr(self, "kernel") else embedding
        hidden = jnp.asarray(hidden, self.dtype)
        if isinstance(stored, Codes):
            logits = stored.product(hidden)
            return logits if self.bias is None else logits + self.bias[...]
        head = self.as_linear(embedding)
        head = dataclasses.replace(head, kernel=jnp.asarray(head.kernel, self.dtype))
        if hidden.dtype != jnp.bfloat16 or hidden.size != hidden.shape[-1]:
            return head.logits(hidden)

        def twice(row: jax.Array) -> jax.Array:
            return head.logits(jnp.concatenate([row, row]))[:1]

        # On a CPU, a bfloat16 product of one row takes ten times as long as one of two rows.
        row = hidden.reshape(1, -1)
        logits = lax.platform_dependent(row, cpu=twice, default=head.logits)
        return logits.reshape(*hidden.shape[:-1], -1)


def _dense(kernel: Any) -> Any:
    return kernel.dense() if isinstance(kernel, Codes) else kernel


def _full_cost(kernel: Any, bias: Any, *, tied: bool) -> HeadCost:
    """A tied head stores no kernel of its own but reads one all the same."""
    coded = isinstance(kernel, Codes)
    rows = kernel.nbytes if coded else kernel.size * kernel.dtype.itemsize
    extra = 0 if bias is None else bias.size
    extra_bytes = extra * (bias.dtype.itemsize if coded and extra else kernel.dtype.itemsize)
    # The embedding is counted elsewhere.
    return HeadCost(
        parameters=(0 if tied else kernel.size) + extra,
        stored_bytes=int((0 if tied else rows) + extra_bytes),
        read_bytes=int(rows + extra_bytes),
        # A product and a sum per number.
        decode_flops=2 * kernel.size,
        # Forward, and both gradients.
        train_flops=6 * kernel.size,
        exact=not coded,
    )


class LinearHead(FullHead):
    """A head with its own kernel ``[hidden, vocab]``, and a bias ``[vocab]`` if ``use_bias``.

    With ``kernel``, an array or `ops.Codes`, nothing is drawn; ``bias`` is then its bias, if any.

    >>> head = nnx.jit(lambda: LinearHead(4, 10, rngs=nnx.Rngs(0)))()
    >>> head(jnp.ones((2, 4))).shape
    (2, 10)
    >>> head.as_linear().vocab_size()
    10
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        use_bias: bool = False,
        unigram: Array | None = None,
        kernel: Any = None,
        bias: Array | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.dtype = dtype
        if kernel is not None:
            self.kernel = nnx.Param(kernel)
            self.bias = None if bias is None else nnx.Param(jnp.asarray(bias))
            return
        if rngs is None:
            raise ValueError("rngs: expected them where no kernel is given, got None")
        init = nnx.initializers.normal(hidden_size**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (hidden_size, vocab_size), param_dtype))
        start = self.initial_bias(unigram, vocab_size).astype(param_dtype)
        self.bias = nnx.Param(start) if use_bias else None

    def as_linear(self, embedding: Any = None) -> Head:
        return Head(
            _dense(self.kernel[...]), None if self.bias is None else self.bias[...], vocab_axis=1
        )

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        kernel, options = self.kernel[...], {}
        tensors = {} if self.bias is None else {"bias": np.asarray(self.bias[...])}
        if not isinstance(kernel, Codes):
            return tensors | {"kernel": np.asarray(kernel)}, options
        options = {"bits": str(kernel.dtype), "hidden_size": kernel.values.shape[1]}
        return tensors | kernel.arrays(), options

    def cost(self, embedding: Array | None = None) -> HeadCost:
        return _full_cost(self.kernel.get_raw_value(), self.bias, tied=False)


class TiedHead(FullHead):
    """A head whose kernel is the token embedding ``[vocab, hidden]``.

    Args:
        bias: ``[vocab]``, its initial biases, which are its only parameters. None for none.

    >>> TiedHead(bias=jnp.zeros(5))(jnp.ones((1, 2)), jnp.ones((5, 2))).shape
    (1, 5)
    """

    def __init__(self, *, bias: Array | None = None, dtype: Any = jnp.float32):
        self.dtype = dtype
        self.bias = None if bias is None else nnx.Param(jnp.asarray(bias))

    def as_linear(self, embedding: Any = None) -> Head:
        if embedding is None:
            raise ValueError("embedding: expected the rows of a TiedHead, got None")
        return Head(_dense(embedding), None if self.bias is None else self.bias[...], vocab_axis=0)

    def cost(self, embedding: Any = None) -> HeadCost:
        if embedding is None:
            raise ValueError("embedding: expected the rows of a TiedHead, got None")
        return _full_cost(embedding, self.bias, tied=True)


def torch_linear(
    in_features: int, out_features: int, *, dtype: Any = None, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer initialised like torch's: uniform up to ``1 / sqrt(in_features)``.

    >>> import numpy as np
    >>> layer = nnx.jit(lambda: torch_linear(4, 2, rngs=nnx.Rngs(0)))()
    >>> bool((np.abs(layer.kernel[...]) <= 0.5).all())
    True
    """

    def uniform(key: jax.Array, shape: Any, dtype: Any = None, out_sharding: Any = None) -> Any:
        # Flax passes it to every initialiser.
        del out_sharding
        limit = in_features**-0.5
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return nnx.Linear(
        in_features, out_features, kernel_init=uniform, bias_init=uniform, dtype=dtype, rngs=rngs
    )

"""A product-quantised head as a module."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.heads import Assignment, HeadCost, VocabularyHead
from logitjax.losses import Head
from logitjax.ops import Array, checks
from logitjax.vq._product_codes import ProductCodes, pack_codes


class ProductHead(VocabularyHead):
    """`ProductCodes` as a module, random ones at first. The codes are not trained.

    Args:
        groups: number of parts of the hidden dimensions.
        num_codes: number of codes per group, at most 16.

    >>> make = lambda: ProductHead(8, 20, groups=4, num_codes=5, rngs=nnx.Rngs(0))
    >>> nnx.jit(lambda hidden: make()(hidden))(jnp.ones((2, 8))).shape
    (2, 20)
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        groups: int,
        num_codes: int = 16,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        checks.between(num_codes, 1, 16, "num_codes")
        if hidden_size % groups:
            raise ValueError(
                f"groups: expected a divisor of hidden_size={hidden_size}, got {groups}"
            )
        codes = jax.random.randint(rngs.params(), (vocab_size, groups), 0, num_codes)
        self.dtype = dtype
        # Logits of variance 1.
        init = nnx.initializers.normal(hidden_size**-0.5)
        shape = (groups, num_codes, hidden_size // groups)
        self.codebooks = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(vocab_size))
        self.codes = Assignment(pack_codes(codes))

    @classmethod
    def from_fit(cls, fit: ProductCodes, **options: Any) -> "ProductHead":
        """The head with the result of `ProductCodes.fit`."""
        groups, num_codes, part = fit.codebooks.shape
        shape, options = (groups * part, fit.bias.shape[0]), {"rngs": nnx.Rngs(0)} | options
        head = cls(*shape, groups=groups, num_codes=num_codes, **options)
        for name, array in vars(fit).items():
            entry = getattr(head, name)
            entry[...] = jnp.asarray(array, entry.dtype)
        return head

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors = {n: np.asarray(getattr(self, n)[...]) for n in ("codebooks", "codes", "bias")}
        return tensors, {}

    def __call__(self, hidden: Array, embedding: Array | None = None) -> jax.Array:
        return self._value().logits(jnp.asarray(hidden, self.dtype))

    def _value(self) -> ProductCodes:
        return ProductCodes(self.codebooks[...], self.codes[...], self.bias[...])

    def as_linear(self, embedding: Any = None) -> Head:
        value = self._value()
        return Head(value.kernel(), value.bias, vocab_axis=0)

    def cost(self, embedding: Array | None = None) -> HeadCost:
        """Return its `HeadCost`: a look-up per group and token; in training, a full head."""
        groups, codes, part = self.codebooks.shape
        vocab, hidden = self.bias.shape[0], groups * part
        itemsize = self.codebooks.dtype.itemsize
        parameters = codes * hidden + vocab
        size = parameters * itemsize + self.codes.size  # in bytes
        return HeadCost(
            parameters=parameters,
            stored_bytes=size,
            read_bytes=size,
            decode_flops=2 * codes * hidden + vocab * groups,
            # Forward, and both gradients.
            train_flops=6 * vocab * hidden,
        )

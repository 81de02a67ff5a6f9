"""A product-quantised head as a module."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.heads import Assignment, HeadCost, VocabularyHead
from logitjax.losses import Head
from logitjax.ops import Array
from logitjax.vq._product_codes import PackedCodes, ProductCodes, pack_codes


class ProductHead(VocabularyHead):
    """`ProductCodes` as a module, to be injected into a decoder. The codes are not trained.

    Args:
        groups: number of parts of the hidden dimensions.
        num_codes: number of codes per group.
        codes: ``[vocab, groups]``, e.g. of `ProductCodes.fit`; by default random.
        packed: store two codes per byte, for at most 16 codes, and round tables to bytes.

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
        num_codes: int = 256,
        codes: Array | None = None,
        packed: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if packed and num_codes > 16:
            raise ValueError(f"num_codes: expected at most 16 in a packed head, got {num_codes}")
        if hidden_size % groups:
            raise ValueError(
                f"groups: expected a divisor of hidden_size={hidden_size}, got {groups}"
            )
        # One byte if it suffices.
        small = jnp.uint8 if num_codes <= 256 else jnp.uint16
        if codes is None:
            codes = jax.random.randint(rngs.params(), (vocab_size, groups), 0, num_codes)
        elif codes.shape != (vocab_size, groups):
            raise ValueError(f"codes: expected shape {(vocab_size, groups)}, got {codes.shape}")
        self.dtype = dtype
        # Logits of variance 1.
        init = nnx.initializers.normal(hidden_size**-0.5)
        shape = (groups, num_codes, hidden_size // groups)
        self.codebooks = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(vocab_size))
        codes = jnp.asarray(codes).astype(small)
        self.packed = packed
        self.codes = Assignment(pack_codes(codes) if packed else codes)

    @classmethod
    def from_fit(cls, fit: ProductCodes, **options: Any) -> "ProductHead":
        """The head with the result of `ProductCodes.fit`."""
        groups, num_codes, part = fit.codebooks.shape
        head = cls(
            groups * part,
            fit.codes.shape[0],
            groups=groups,
            num_codes=num_codes,
            codes=fit.codes,
            rngs=nnx.Rngs(0),
            **options,
        )
        head.codebooks[...] = jnp.asarray(fit.codebooks, head.codebooks.dtype)
        if fit.bias is not None:
            head.bias[...] = jnp.asarray(fit.bias, head.bias.dtype)
        return head

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors = {n: np.asarray(getattr(self, n)[...]) for n in ("codebooks", "codes", "bias")}
        return tensors, {"packed": self.packed}

    def __call__(self, hidden: Array, embedding: Array | None = None) -> jax.Array:
        return self._value().logits(jnp.asarray(hidden, self.dtype))

    def _value(self) -> ProductCodes | PackedCodes:
        kind = PackedCodes if self.packed else ProductCodes
        return kind(self.codebooks[...], self.codes[...], self.bias[...])

    def as_linear(self, embedding: Any = None) -> Head:
        value = self._value()
        value = value.unpacked() if isinstance(value, PackedCodes) else value
        return Head(value.kernel(), value.bias, vocab_axis=0)

    def cost(self, embedding: Array | None = None) -> HeadCost:
        """Return its `HeadCost`: a look-up per group and token; in training, a full head."""
        groups, codes, part = self.codebooks.shape
        vocab, hidden = self.bias.shape[0], groups * part
        itemsize = self.codebooks.dtype.itemsize
        parameters = codes * hidden + vocab
        assignment = vocab * groups * (1 if codes <= 256 else 2)  # in bytes
        if self.packed:
            # In whole blocks of 32 tokens, and pairs of groups.
            assignment = -(-vocab // 32) * 32 * -(-groups // 2)
        return HeadCost(
            parameters=parameters,
            stored_bytes=parameters * itemsize + assignment,
            read_bytes=parameters * itemsize + assignment,
            decode_flops=2 * codes * hidden + vocab * groups,
            # Forward, and both gradients.
            train_flops=6 * vocab * hidden,
        )

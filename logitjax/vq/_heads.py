"""Vector-quantised heads as flax.nnx modules, to be injected into a decoder."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.heads import Assignment, HeadCost, VocabularyHead
from logitjax.losses import Head
from logitjax.ops import Array, TopK
from logitjax.vq._assignment import VQFit
from logitjax.vq._decode import VQTables
from logitjax.vq._loss import vq_logits, vq_nll


class VQHead(VocabularyHead):
    """One code for several tokens, and a bias for each: O(K) training and decoding.

    As a decoder's ``head`` it returns all V logits, so everything works with it. `nll`, `top_k` and
    `sample` give the same results without forming them. Sharding: split ``codebook`` along its
    first axis over the tensor axis of the mesh or replicate it; replicate the others.

    Args:
        num_codes: K.
        assignment: ``[vocab]``, e.g. of `fit_assignment`; by default balanced and random.
        use_bias: False is the head as published.

    >>> make = lambda: VQHead(8, 20, 5, rngs=nnx.Rngs(0))
    >>> nnx.jit(lambda hidden: make()(hidden))(jnp.ones((2, 8))).shape
    (2, 20)
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        num_codes: int,
        *,
        assignment: Array | None = None,
        unigram: Array | None = None,
        use_bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 1 <= num_codes <= vocab_size:
            raise ValueError(
                f"num_codes: expected a number between 1 and {vocab_size}, got {num_codes}"
            )
        key = rngs.params()
        if assignment is None:
            # Codes of equal size, scattered: neighbouring ids are no more alike than others.
            code = np.arange(vocab_size) * num_codes // vocab_size
            assignment = jax.random.permutation(jax.random.fold_in(key, 1), code)
        elif np.shape(assignment) != (vocab_size,):
            raise ValueError(
                f"assignment: expected shape ({vocab_size},), got {np.shape(assignment)}"
            )
        self.dtype = dtype
        # Logits of variance 1.
        init = nnx.initializers.normal(hidden_size**-0.5)
        self.codebook = nnx.Param(init(key, (num_codes, hidden_size), param_dtype))
        # float32 regardless of the other types: a bias of -11.3 is a log-probability.
        self.bias = nnx.Param(self.initial_bias(unigram, vocab_size)) if use_bias else None
        self.assignment = Assignment(jnp.asarray(assignment, jnp.int32))

    @classmethod
    def from_fit(cls, fit: VQFit, **options: Any) -> Any:
        """The head with the result of `fit_assignment`."""
        codes, hidden = fit.codebook.shape
        sizes = hidden, len(fit.assignment), codes
        head = cls(*sizes, assignment=fit.assignment, rngs=nnx.Rngs(0), **options)
        head.load(fit.codebook, fit.bias, fit.assignment)
        return head

    def load(self, codebook: Array, bias: Array | None, assignment: Array) -> None:
        """Overwrite parameters and assignment."""
        self.codebook[...] = jnp.asarray(codebook, self.codebook.dtype)
        if self.bias is not None and bias is not None:
            self.bias[...] = jnp.asarray(bias, self.bias.dtype)
        self.assignment[...] = jnp.asarray(assignment, jnp.int32)

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        names = ("codebook", "assignment", *(() if self.bias is None else ("bias",)))
        tensors = {name: np.asarray(getattr(self, name)[...]) for name in names}
        return tensors, {"use_bias": self.bias is not None}

    @property
    def vocab_size(self) -> int:
        return self.assignment.shape[0]

    @property
    def num_codes(self) -> int:
        return self.codebook.shape[0]

    def _arrays(self) -> tuple[Array, Array | None, Array]:
        bias = None if self.bias is None else self.bias[...]
        return self.codebook[...], bias, self.assignment[...]

    def __call__(self, hidden: Array, embedding: Array | None = None) -> jax.Array:
        return vq_logits(jnp.asarray(hidden, self.dtype), *self._arrays())

    def nll(
        self, hidden: Array, labels: Array, embedding: Array | None = None, **options: Any
    ) -> jax.Array:
        """Cross-entropy, not reduced; options as for `vq_nll`."""
        hidden = jnp.asarray(hidden, self.dtype)
        return vq_nll(hidden, *self._arrays(), labels, **options)

    def tables(self, *, width: int = 64, **options: Any) -> VQTables:
        """Tables that save `top_k` and `sample` a sort per call; options as for `VQTables.of`."""
        _, bias, assignment = self._arrays()
        return VQTables.of(bias, assignment, self.num_codes, width=width, **options)

    def top_k(
        self,
        hidden: Array,
        k: int,
        embedding: Array | None = None,
        *,
        tables: VQTables | None = None,
    ) -> TopK:
        """The k largest logits; see `VQTables.top_k`."""
        tables = self.tables(width=k) if tables is None else tables
        return tables.top_k(jnp.asarray(hidden, self.dtype), self.codebook[...], k)

    def sample(
        self,
        key: jax.Array,
        hidden: Array,
        embedding: Array | None = None,
        *,
        temperature: float | Array = 1.0,
        tables: VQTables | None = None,
    ) -> jax.Array:
        """Tokens drawn from the whole distribution; ``tables`` carry their own temperature."""
        if tables is None:
            tables = self.tables(width=1, temperature=temperature)
        return tables.sample(key, jnp.asarray(hidden, self.dtype), self.codebook[...])

    def as_linear(self, embedding: Array | None = None) -> Head:
        codebook, bias, assignment = self._arrays()
        # V rows, for losses of a full head.
        return Head(codebook[assignment], bias, vocab_axis=0)

    def cost(self, embedding: Array | None = None) -> HeadCost:
        """Return its `HeadCost`: decoding reads the codebook and three numbers per cluster."""
        (codes, hidden), vocab = self.codebook.shape, self.vocab_size
        itemsize = self.codebook.dtype.itemsize
        parameters = codes * hidden + (0 if self.bias is None else vocab)
        # Members and sums, four numbers per code.
        tables = 2 * vocab * 4 + codes * 16
        return HeadCost(
            parameters=parameters,
            stored_bytes=parameters * itemsize + tables,
            read_bytes=codes * hidden * itemsize + codes * 12,
            decode_flops=2 * codes * hidden,
            train_flops=6 * codes * hidden,
            exact=codes == vocab,
        )

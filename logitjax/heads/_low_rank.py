"""A head through a bottleneck: the plainest way to save parameters, to compare with."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from logitjax.heads._head_cost import HeadCost
from logitjax.heads._vocabulary_head import VocabularyHead
from logitjax.losses import Head, linear_cross_entropy
from logitjax.ops import Array, checks


def low_rank_logits(
    hidden: Float[Array, "*batch hidden"],
    down: Float[Array, "hidden rank"],
    kernel: Float[Array, "vocab rank"],
    bias: Float[Array, " vocab"] | None = None,
) -> Float[jax.Array, "*batch vocab"]:
    """All V logits of a low-rank head, ``(h D) W^T + b``: O(rank (d + V)) per token."""
    narrow = jnp.asarray(hidden) @ jnp.asarray(down)
    wide = jnp.promote_types(narrow.dtype, jnp.float32)
    logits = jnp.einsum("...r,vr->...v", narrow, kernel, preferred_element_type=wide)
    return logits if bias is None else logits + jnp.asarray(bias)


def fit_low_rank(
    rows: Float[Array, "vocab hidden"],
    unigram: Float[Array, " vocab"],
    hidden_mean: Float[Array, " hidden"],
    hidden_cov: Float[Array, "hidden hidden"],
    rank: int,
    *,
    row_bias: Float[Array, " vocab"] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The low-rank head nearest to a full one, in the metric of the hidden states.

    Minimises ``sum_v sqrt(u_v) (w_v - w'_v)^T Cov(h) (w_v - w'_v)``, by an eigendecomposition;
    what is lost at the mean hidden state goes into the bias.

    Args:
        rows: ``[vocab, hidden]``.
        unigram: ``[vocab]``, probabilities or counts.
        hidden_mean: ``[hidden]``.
        hidden_cov: ``[hidden, hidden]``.
        rank: at most hidden.
        row_bias: ``[vocab]``, bias of the full head.

    Returns:
        ``(down [hidden, rank], kernel [vocab, rank], bias [vocab])``, float32.

    Raises:
        TypeError: arrays that are not floating point (``unigram`` may be counts).
        ValueError: ``rank`` is not in 1..hidden, or shapes that do not fit.

    >>> import numpy as np
    >>> rows = np.array([[1.0, 2.0], [2.0, 4.0], [-1.0, -2.0]])
    >>> fit = jax.jit(fit_low_rank, static_argnums=4)
    >>> down, kernel, bias = map(np.asarray, fit(rows, np.ones(3), np.zeros(2), np.eye(2), 1))
    >>> np.allclose(kernel @ down.T, rows, atol=1e-4)
    True
    """
    checks.shapes(
        rows=(rows, "float vocab hidden"),
        unigram=(unigram, "number vocab"),
        hidden_mean=(hidden_mean, "float hidden"),
        hidden_cov=(hidden_cov, "float hidden hidden"),
        row_bias=(row_bias, "float vocab"),
    )
    rows = jnp.asarray(rows, jnp.float32)
    if not 1 <= rank <= rows.shape[1]:
        raise ValueError(f"rank: expected 1 to hidden, {rows.shape[1]}, got {rank}")
    weights = jnp.asarray(unigram, jnp.float32)
    # A token that was never counted still weighs a hundredth of a mean one.
    weights = jnp.maximum(weights / weights.sum(), 0.01 / rows.shape[0]) ** 0.5
    root, inverse = metric_roots(hidden_cov)
    mapped = rows @ root
    _, vectors = jnp.linalg.eigh(jnp.einsum("vi,v,vj->ij", mapped, weights, mapped))
    # In the metric's coordinates the best of a rank is a projection (Eckart and Young). `eigh`
    # sorts upwards.
    best = vectors[:, ::-1][:, :rank]
    down, kernel = inverse @ best, mapped @ best
    mean = jnp.asarray(hidden_mean, jnp.float32)
    bias = rows @ mean - kernel @ (mean @ down)
    return down, kernel, bias if row_bias is None else bias + jnp.asarray(row_bias)


def metric_roots(cov: Float[Array, "d d"]) -> tuple[jax.Array, jax.Array]:
    """The square root of a covariance and its inverse; tiny eigenvalues are lifted."""
    values, vectors = jnp.linalg.eigh(jnp.asarray(cov, jnp.float32))
    values = jnp.sqrt(jnp.maximum(values, 1e-6 * values[-1]))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


class LowRankHead(VocabularyHead):
    """`low_rank_logits` as a module, to be injected into a decoder.

    Args:
        rank: rank of the bottleneck.

    >>> make = lambda: LowRankHead(8, 20, 3, rngs=nnx.Rngs(0))
    >>> nnx.jit(lambda hidden: make()(hidden))(jnp.ones((2, 8))).shape
    (2, 20)
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        rank: int,
        *,
        unigram: Array | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 1 <= rank <= hidden_size:
            raise ValueError(
                f"rank: expected a number between 1 and hidden_size={hidden_size}, got {rank}"
            )
        self.dtype = dtype
        narrow, wide = (nnx.initializers.normal(n**-0.5) for n in (hidden_size, rank))
        self.down = nnx.Param(narrow(rngs.params(), (hidden_size, rank), param_dtype))
        self.kernel = nnx.Param(wide(rngs.params(), (vocab_size, rank), param_dtype))
        self.bias = nnx.Param(self.initial_bias(unigram, vocab_size))

    @classmethod
    def from_fit(cls, down: Array, kernel: Array, bias: Array, **options: Any) -> "LowRankHead":
        """The head that `fit_low_rank` found."""
        head = cls(down.shape[0], kernel.shape[0], down.shape[1], rngs=nnx.Rngs(0), **options)
        for mine, found in ((head.down, down), (head.kernel, kernel), (head.bias, bias)):
            mine[...] = jnp.asarray(found, mine.dtype)
        return head

    def __call__(
        self, hidden: Float[Array, "*batch hidden"], embedding: Array | None = None
    ) -> Float[jax.Array, "*batch vocab"]:
        down, kernel = (jnp.asarray(x[...], self.dtype) for x in (self.down, self.kernel))
        return low_rank_logits(jnp.asarray(hidden, self.dtype), down, kernel, self.bias[...])

    def nll(
        self,
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "*batch"],
        embedding: Array | None = None,
        **options: Any,
    ) -> Float[jax.Array, "*batch"]:
        """Cross-entropy, not reduced; options as of `linear_cross_entropy`."""
        narrow = jnp.asarray(hidden, self.dtype) @ jnp.asarray(self.down[...], self.dtype)
        head = Head(self.kernel[...], self.bias[...], vocab_axis=0)
        return linear_cross_entropy(narrow, head, labels, **options)

    def as_linear(self, embedding: Array | None = None) -> Head:
        """The equivalent full head, ``[vocab, hidden]``, for losses that start at hidden states."""
        return Head(self.kernel[...] @ self.down[...].T, self.bias[...], vocab_axis=0)

    def cost(self, embedding: Array | None = None) -> HeadCost:
        (vocab, rank), hidden = self.kernel.shape, self.down.shape[0]
        parameters = rank * (vocab + hidden) + vocab
        itemsize = self.kernel.dtype.itemsize
        return HeadCost(
            parameters=parameters,
            stored_bytes=parameters * itemsize,
            read_bytes=parameters * itemsize,
            decode_flops=2 * rank * (vocab + hidden),
            train_flops=6 * rank * (vocab + hidden),
            exact=rank >= hidden,
        )

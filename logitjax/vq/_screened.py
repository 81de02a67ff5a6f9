"""Screened heads: a cheap head scores all tokens, exact rows re-score the best of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Float, Int

from logitjax import ops
from logitjax.heads import HeadCost, VocabularyHead
from logitjax.losses import Head
from logitjax.ops import Array, TopK, checks, gather_at, logsumexp, neginf_to_zero, top_k
from logitjax.ops import mesh as on_mesh
from logitjax.vq._row_products import row_products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Screen:
    """A cheap head that scores all tokens, and better rows for the best of them.

    Attributes:
        cheap: approximate logits, ``hidden [n, hidden] -> [n, vocab]`` float32: a head, or e.g.
            `ProductCodes.logits`.
        rescore: a `Head` with better rows, or its kernel alone.
        num_candidates: number of tokens to re-score.
    """

    cheap: Callable[[jax.Array], jax.Array]
    rescore: Head | Array
    num_candidates: int

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[jax.Array, "*batch vocab"]:
        """Logits of a cheap head, the largest of them replaced by those of better rows.

        The better logits divide the candidates' mass; the cheap head determines how large that mass
        is. The cheap logits are only known up to a number that depends on the context, which a head
        tuned to imitate another's probabilities may well learn. ::

            s = cheap(h),  c = the num_candidates largest of it
            l_v = rescore(h, v)       v in c
                  s_v + shift(h)      otherwise
            shift = logsumexp_{v in c} rescore(h, v) - logsumexp_{v in c} s_v

        The result is float32 ``[*batch, vocab]``; ValueError if ``num_candidates`` is not in
        1..vocab. Shim et al., SVD-softmax, 2017, screen by a low rank; here any cheap head may.

        >>> cheap = lambda h: jnp.array([[0.0, 1.0, 2.0]])
        >>> screen = Screen(cheap=cheap, rescore=jnp.full((3, 1), 5.0), num_candidates=1)
        >>> jax.jit(screen.logits)(jnp.ones((1, 1)))
        Array([[3., 4., 5.]], dtype=float32)
        """
        hidden = jnp.asarray(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = _joined(*self._look(flat))
        return logits.reshape(*hidden.shape[:-1], -1)

    def nll(
        self,
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "..."],
        *,
        temperature: float | Array = 1.0,
        z_loss: float = 0.0,
        block_size: int = 256,
    ) -> Float[jax.Array, "*batch"]:
        """Cross-entropy of `logits`, by blocks of positions: ``[*batch]``, float32, not reduced.

        The choice of candidates has no gradient. Memory is block_size x vocab; other options are
        those of `vq_nll`. ValueError as of `logits`, or if ``labels`` do not fit ``hidden``.
        """
        hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(f"labels: expected shape {hidden.shape[:-1]}, got {labels.shape}")
        checks.positive(temperature, "temperature")

        def block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden, labels = inputs
            logits = self.logits(hidden) / temperature
            log_z = logsumexp(logits)
            nll = log_z - gather_at(logits, labels[:, None])[:, 0]
            return nll + z_loss * log_z**2 if z_loss else nll

        return in_blocks(block, (hidden, labels), block_size)

    def top_k(
        self, hidden: Float[Array, "*batch hidden"], k: int, *, with_log_z: bool = True
    ) -> TopK:
        """The k best candidates by their better logits.

        They are the full head's if its k best tokens are among the candidates. Returns the `TopK`:
        ``[*batch, k]`` logits and tokens, ``log_z`` over the whole vocabulary.

        Args:
            k: number of tokens, at most ``num_candidates``; otherwise ValueError.
            with_log_z: False leaves ``log_z`` zero, which greedy decoding does not need.

        >>> cheap = lambda h: jnp.array([[0.0, 1.0, 2.0]])
        >>> exact = jnp.array([[9.0], [4.0], [3.0]])
        >>> screen = Screen(cheap=cheap, rescore=exact, num_candidates=2)
        >>> jax.jit(screen.top_k, static_argnums=1)(jnp.ones((1, 1)), 1).indices
        Array([[1]], dtype=int32)
        """
        most = self.num_candidates
        if not 1 <= k <= most:
            raise ValueError(f"k: expected a number between 1 and num_candidates={most}, got {k}")
        hidden = jnp.asarray(hidden)
        batch = hidden.shape[:-1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores, tokens, better = self._look(flat)
        values, places = top_k(better, k)
        chosen = gather_at(tokens, places)
        # It would need a pass over V.
        log_z = jnp.zeros(len(flat), jnp.float32)
        if with_log_z:
            log_z = logsumexp(_joined(scores, tokens, better))
        return TopK(values.reshape(*batch, k), chosen.reshape(*batch, k), log_z.reshape(batch))

    def _look(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Cheap scores of all tokens, the candidates, and their better logits."""
        scores = self.cheap(hidden)
        if not 1 <= self.num_candidates <= scores.shape[-1]:
            raise ValueError(
                "num_candidates: expected a number between 1 and the vocabulary, "
                f"{scores.shape[-1]}, "
                f"got {self.num_candidates}"
            )
        _, tokens = top_k(jax.lax.stop_gradient(scores), self.num_candidates, group_size=8)
        return scores, tokens, rescored(self.rescore, hidden, tokens)


class ScreenedHead(VocabularyHead):
    """A cheap head screens, rows of the (tied) embedding re-score.

    A model with its embedding in memory gets its own logits back, for a tenth of the rows read.

    Args:
        screen: any head with V cheap logits: a `ProductHead`, a `VQHead`.
        num_candidates: number of tokens to re-score.
        rows: ``[vocab, hidden]``, the head's own rows; None uses the embedding.
        row_bias: ``[vocab]``, their biases.

    >>> from logitjax.vq import VQHead
    >>> make = lambda: ScreenedHead(VQHead(8, 20, 5, rngs=nnx.Rngs(0)), num_candidates=4)
    >>> nnx.jit(lambda *arrays: make()(*arrays))(jnp.ones((3, 8)), jnp.ones((20, 8))).shape
    (3, 20)
    """

    screens = True

    def __init__(
        self,
        screen: VocabularyHead,
        *,
        num_candidates: int = 512,
        rows: Array | None = None,
        row_bias: Array | None = None,
    ):
        self.screen = screen
        self.num_candidates = num_candidates
        self.rows = None if rows is None else nnx.Param(jnp.asarray(rows))
        self.row_bias = None if row_bias is None else nnx.Param(jnp.asarray(row_bias))

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        tensors, options = self.screen._record()
        tensors = {f"screen.{name}": array for name, array in tensors.items()}
        entries = {"rows": self.rows, "row_bias": self.row_bias}
        tensors |= {n: np.asarray(array[...]) for n, array in entries.items() if array is not None}
        screen = {"kind": type(self.screen).__name__, "options": options}
        return tensors, {"num_candidates": self.num_candidates, "screen": screen}

    def _screen(self, embedding: Array | None) -> Screen:
        rows = embedding if self.rows is None else self.rows[...]
        if rows is None:
            raise ValueError(
                "embedding: expected rows, because this ScreenedHead has none of its own, got None"
            )
        bias = None if self.row_bias is None else self.row_bias[...]
        # `[vocab, hidden]`.
        exact = Head(rows, bias, vocab_axis=0)
        return Screen(cheap=self.screen, rescore=exact, num_candidates=self.num_candidates)

    def __call__(self, hidden: Array, embedding: Array | None = None) -> jax.Array:
        return self._screen(embedding).logits(hidden)

    def nll(
        self, hidden: Array, labels: Array, embedding: Array | None = None, **options: Any
    ) -> jax.Array:
        """Cross-entropy over the whole vocabulary; options as of `Screen.nll`."""
        return self._screen(embedding).nll(hidden, labels, **options)

    def top_k(self, hidden: Array, k: int, embedding: Array | None = None, **options: Any) -> TopK:
        """The k best candidates; options as of `Screen.top_k`."""
        return self._screen(embedding).top_k(hidden, k, **options)

    def cost(self, embedding: Array | None = None) -> HeadCost:
        """Return its `HeadCost`, on top of its screen."""
        rows: Any = embedding if self.rows is None else self.rows
        if rows is None:
            raise ValueError("embedding: expected the rows that re-score, got None")
        vocab, hidden = rows.shape
        # The embedding is in memory anyway.
        local = 0 if self.rows is None else vocab
        return self.screen.cost(embedding).with_rows(self.num_candidates, hidden, kept=local)


def _joined(scores: jax.Array, tokens: jax.Array, better: jax.Array) -> jax.Array:
    """The better logits at their tokens; the cheap ones elsewhere, shifted to their scale."""

    def join(scores: jax.Array, tokens: jax.Array, better: jax.Array) -> tuple[jax.Array]:
        rows = jnp.arange(scores.shape[0])[:, None]
        # The candidates keep their mass.
        shift = neginf_to_zero(logsumexp(better)) - neginf_to_zero(logsumexp(scores[rows, tokens]))
        return ((scores + shift[:, None]).at[rows, tokens].set(better),)

    return on_mesh.over_batch(join, (2,), scores, tokens, better)[0]


def rescored(rows: Head | Array, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """``w_v . h + a_v`` of a full head for tokens `[n, chosen]`, sums and result in float32."""
    head = Head.of(rows).resolve(hidden.shape[-1])
    scores = row_products(hidden, head.rows, tokens)
    scores = scores if head.bias is None else scores + jnp.asarray(head.bias)[tokens]
    return scores if head.soft_cap is None else ops.soft_cap(scores, head.soft_cap)


def in_blocks(block: Callable, inputs: tuple[jax.Array, ...], block_size: int) -> Any:
    """`block` over flattened positions, some at a time, recomputed in the backward pass."""
    batch = inputs[0].shape[:-1]
    count = math.prod(batch)
    flat = [x.reshape(count, *x.shape[len(batch) :]) for x in inputs]
    if count <= block_size:
        out = block(tuple(flat))
    else:
        blocks = -(-count // block_size)
        padded = [
            jnp.pad(x, [(0, blocks * block_size - count)] + [(0, 0)] * (x.ndim - 1)) for x in flat
        ]
        cut = tuple(x.reshape(blocks, block_size, *x.shape[1:]) for x in padded)
        # Gathered rows are not kept.
        out = lax.map(jax.checkpoint(block), cut)
        out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)

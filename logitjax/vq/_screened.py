"""Screened heads: a cheap head scores all tokens, exact rows re-score the best of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from flax import nnx
from jax import lax
from jaxtyping import Bool, Float, Int

from logitjax import ops
from logitjax.heads import Assignment, HeadCost, VocabularyHead
from logitjax.losses import Head
from logitjax.ops import Array, TopK, checks, gather_at, logsumexp, neginf_to_zero, top_k
from logitjax.ops import mesh as on_mesh
from logitjax.vq._row_products import row_products


class ScreenedHead(VocabularyHead):
    """A cheap head scores all tokens; exact rows score the best of them again.

    A model with its embedding in memory gets its own logits back, for a tenth of the rows read. ::

        s = screen(h),  c = the num_candidates largest of it
        l_v = w_v . h + a_v       v in c
              s_v + shift(h)      otherwise
        shift = tail  or, without one,  logsumexp_{v in c} l_v - logsumexp_{v in c} s_v

    Codes of rows err about as much in one token as in another, so the mass of all others is that of
    their scores but for a constant, the ``tail``; the error of the few best tokens would make it
    far less certain. A head whose scores are only known up to a number that depends on the context
    has no tail: the better logits divide the mass that it gives to the candidates.

    With ``errors`` the candidates have the largest bounds ``s_v + errors_v |h|``, and `top_k` is
    the full head's: where a token that was not scored again may belong to it (see `certified`), all
    rows are read. Shim et al., SVD-softmax, 2017, screen by a low rank; here any head may.

    Args:
        screen: ``hidden [n, hidden] -> [n, vocab]`` float32 scores: any head, or a function.
        num_candidates: number of tokens that are scored again.
        rows: ``[vocab, hidden]``, better rows; None uses the (tied) embedding.
        row_bias: ``[vocab]``, their biases.
        tail: what is added to the scores of all other tokens, as of `fitted_tail`; or None.
        errors: ``[vocab]``, bounds such that ``|w_v . h + a_v - s_v| <= errors_v |h|``, rounding
            included, as of `row_errors`; None promises nothing.

    >>> rows, cheap = jnp.array([[9.0], [4.0], [3.0]]), lambda h: jnp.array([[0.0, 1.0, 2.0]])
    >>> exact = ScreenedHead(cheap, rows=rows, num_candidates=1, errors=jnp.array([9.0, 3.0, 1.0]))
    >>> look = jax.jit(lambda h: (exact.top_k(h, 1).indices, exact.certified(h, 1)))
    >>> look(jnp.ones((1, 1)))
    (Array([[0]], dtype=int32), Array([ True], dtype=bool))
    """

    screens = True

    def __init__(
        self,
        screen: Callable[[jax.Array], jax.Array],
        *,
        num_candidates: int = 512,
        rows: Array | None = None,
        row_bias: Array | None = None,
        tail: float | None = None,
        errors: Array | None = None,
    ):
        self.screen = screen
        self.num_candidates = num_candidates
        self.tail = tail
        self.rows = None if rows is None else nnx.Param(jnp.asarray(rows))
        self.row_bias = None if row_bias is None else nnx.Param(jnp.asarray(row_bias))
        self.errors = None if errors is None else Assignment(jnp.asarray(errors))

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        screen: Any = self.screen
        tensors, options = screen._record()
        tensors = {f"screen.{name}": array for name, array in tensors.items()}
        entries = {name: getattr(self, name) for name in ("rows", "row_bias", "errors")}
        tensors |= {n: np.asarray(array[...]) for n, array in entries.items() if array is not None}
        inner = {"kind": type(screen).__name__, "options": options}
        options = {"num_candidates": self.num_candidates, "tail": self.tail, "screen": inner}
        return tensors, options

    def _exact(self, embedding: Array | None) -> Head:
        rows = embedding if self.rows is None else self.rows[...]
        if rows is None:
            raise ValueError("embedding: expected the rows that score again, got None")
        bias = None if self.row_bias is None else self.row_bias[...]
        # `[vocab, hidden]`.
        return Head(rows, bias, vocab_axis=0)

    def _look(self, hidden: Array, embedding: Array | None) -> "_Scores":
        """Score all tokens of flattened positions, and the candidates again."""
        head, hidden = self._exact(embedding), jnp.asarray(hidden)
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.errors is None:
            scores = self.screen(flat)
            bounds = scores
        else:
            # As the screen rounds them; the bounds are of float32 products, also on a TPU.
            flat = flat.astype(getattr(self.screen, "dtype", flat.dtype)).astype(jnp.float32)
            with jax.default_matmul_precision("float32"):
                scores = self.screen(flat)
            bounds = scores + self.errors[...] * _norms(flat)
        vocab, count = scores.shape[-1], self.num_candidates
        if not 1 <= count <= vocab:
            raise ValueError(
                f"num_candidates: expected a number between 1 and the vocabulary, {vocab}, "
                f"got {count}"
            )
        more = self.errors is not None and count < vocab
        bounds, tokens = top_k(lax.stop_gradient(bounds), count + more, group_size=8)
        # Of the others.
        limit = bounds[:, -1] if more else jnp.full(len(flat), -jnp.inf)
        # Sums with a bias, and this one, round relative to their size.
        limit = limit + 2.0**-21 * jnp.abs(neginf_to_zero(limit))
        tokens = tokens[:, :count]
        if self.errors is not None:
            # Of equal logits the lowest token comes first, as in a full head.
            tokens = jnp.sort(tokens, axis=-1)
        return _Scores(flat, scores, tokens, rescored(head, flat, tokens), limit)

    def __call__(
        self, hidden: Float[Array, "*batch hidden"], embedding: Array | None = None
    ) -> Float[jax.Array, "*batch vocab"]:
        look = self._look(hidden, embedding)
        logits = look.joined(self.tail)
        if self.errors is not None:
            # Their largest is the full head's, too.
            best, _, sure = look.best(1)
            logits = lax.cond(
                sure.all(),
                lambda: look.joined(self.tail, best),
                lambda: self._full(look, embedding),
            )
        return logits.reshape(*jnp.shape(hidden)[:-1], logits.shape[-1])

    def _full(self, look: "_Scores", embedding: Array | None) -> jax.Array:
        with jax.default_matmul_precision("float32"):
            return self._exact(embedding).logits(look.hidden)

    def nll(
        self,
        hidden: Float[Array, "*batch hidden"],
        labels: Int[Array, "..."],
        embedding: Array | None = None,
        *,
        temperature: float | Array = 1.0,
        z_loss: float = 0.0,
        block_size: int = 256,
    ) -> Float[jax.Array, "*batch"]:
        """Cross-entropy of the logits, by blocks of positions: ``[*batch]``, float32, not reduced.

        The choice of candidates has no gradient. Memory is block_size x vocab; other options are
        those of `vq_nll`. ValueError if ``labels`` do not fit ``hidden``.
        """
        hidden, labels = jnp.asarray(hidden), jnp.asarray(labels)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(f"labels: expected shape {hidden.shape[:-1]}, got {labels.shape}")
        checks.positive(temperature, "temperature")

        def block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden, labels = inputs
            logits = self(hidden, embedding) / temperature
            log_z = logsumexp(logits)
            nll = log_z - gather_at(logits, labels[:, None])[:, 0]
            return nll + z_loss * log_z**2 if z_loss else nll

        return in_blocks(block, (hidden, labels), block_size)

    def top_k(
        self,
        hidden: Float[Array, "*batch hidden"],
        k: int,
        embedding: Array | None = None,
        *,
        with_log_z: bool = True,
    ) -> TopK:
        """The k best tokens by their better logits.

        They are the full head's if its k best tokens are among the candidates, and always if the
        head has ``errors``. Returns the `TopK`: ``[*batch, k]`` logits and tokens, ``log_z`` over
        the whole vocabulary, as the screen has it.

        Args:
            k: number of tokens, at most ``num_candidates``; otherwise ValueError.
            with_log_z: False leaves ``log_z`` zero, which greedy decoding does not need.
        """
        look = self._look(hidden, embedding)
        values, chosen, sure = look.best(k)
        if self.errors is not None:
            values, chosen = lax.cond(
                sure.all(), lambda: (values, chosen), lambda: top_k(self._full(look, embedding), k)
            )
        # It would need a pass over V.
        log_z = jnp.zeros(len(chosen), jnp.float32)
        if with_log_z:
            log_z = logsumexp(look.joined(self.tail))
        batch = jnp.shape(hidden)[:-1]
        return TopK(values.reshape(*batch, k), chosen.reshape(*batch, k), log_z.reshape(batch))

    def certified(
        self, hidden: Float[Array, "*batch hidden"], k: int, embedding: Array | None = None
    ) -> Bool[jax.Array, "*batch"]:
        """Whether the candidates are sure to hold the full head's k best tokens.

        True where the k-th best exact logit is above ``s_v + errors_v |h|`` of all other tokens.
        Where it is False for a position of a batch, `top_k` reads all rows. ValueError for a head
        without ``errors``.
        """
        if self.errors is None:
            raise ValueError("errors: expected bounds of the screen's errors, got None")
        return self._look(hidden, embedding).best(k)[2].reshape(jnp.shape(hidden)[:-1])

    def cost(self, embedding: Array | None = None) -> HeadCost:
        """Return its `HeadCost`, on top of its screen; a certificate's rare full reads are not."""
        rows = self._exact(embedding).rows
        vocab, hidden = rows.shape
        screen: Any = self.screen
        cost = screen.cost(embedding)
        if self.errors is not None:
            extra = self.errors.size * self.errors.dtype.itemsize
            cost = dataclasses.replace(
                cost,
                stored_bytes=cost.stored_bytes + extra,
                read_bytes=cost.read_bytes + extra,
                exact=True,
            )
        # The embedding is in memory anyway.
        local = 0 if self.rows is None else vocab
        return cost.with_rows(self.num_candidates, hidden, kept=local, itemsize=rows.dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class _Scores:
    """Scores of all tokens, the candidates, their better logits, and a bound of all others."""

    hidden: jax.Array
    scores: jax.Array
    tokens: jax.Array
    better: jax.Array
    limit: jax.Array

    def best(self, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The k best candidates' logits and tokens, and whether no other token reaches them."""
        count = self.tokens.shape[-1]
        if not 1 <= k <= count:
            raise ValueError(f"k: expected a number between 1 and num_candidates={count}, got {k}")
        values, places = top_k(self.better, k)
        # Of equal logits another token might come first; a nan is never above.
        sure = (values[:, -1] > self.limit) | (count == self.scores.shape[-1])
        return values, gather_at(self.tokens, places), sure

    def joined(self, tail: float | None, most: Array | None = None) -> jax.Array:
        """The better logits at their tokens; the screen's elsewhere, shifted to their scale.

        The latter stay below ``most [n, 1]``.
        """
        below = jnp.inf if most is None else jnp.nextafter(lax.stop_gradient(most), -jnp.inf)
        below = jnp.broadcast_to(below, (len(self.tokens), 1))

        def join(scores: Array, tokens: Array, better: Array, below: Array) -> tuple[jax.Array]:
            rows = jnp.arange(scores.shape[0])[:, None]
            shift = jnp.full(len(scores), tail or 0.0)
            if tail is None:
                # The candidates keep their mass.
                mass = neginf_to_zero(logsumexp(scores[rows, tokens]))
                shift = neginf_to_zero(logsumexp(better)) - mass
            return (jnp.minimum(scores + shift[:, None], below).at[rows, tokens].set(better),)

        return on_mesh.over_batch(join, (2,), self.scores, self.tokens, self.better, below)[0]


def _norms(hidden: jax.Array) -> jax.Array:
    """Norms of rows ``[n, 1]``, rounded up."""
    # Squares of small numbers would vanish.
    largest = jnp.abs(hidden).max(-1, keepdims=True, initial=0)
    scaled = hidden / jnp.where(largest > 0, largest, 1)
    return largest * jnp.sqrt((scaled**2).sum(-1, keepdims=True)) * (1 + _rounding(hidden))


def _rounding(rows: Any) -> float:
    """Bound of the relative rounding of a float32 sum over a row, in any order, with room."""
    return (rows.shape[-1] + 16) * 2.0**-23


def fitted_tail(head: ScreenedHead, full: Head, hidden: Array) -> float:
    """The `ScreenedHead.tail` with the full head's mean mass outside the candidates."""
    graphdef, state = nnx.split(head)

    # Large arrays are arguments: constants would be compiled, and written to the cache of programs.
    @jax.jit
    def odds(state: Any, full: Head, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        look, exact = nnx.merge(graphdef, state)._look(hidden, full.rows), full.logits(hidden)
        best = logsumexp(look.better)

        def rest(scores: jax.Array) -> jax.Array:
            places = jnp.arange(len(scores))[:, None], look.tokens
            return logsumexp(scores.at[places].set(-jnp.inf)) - best

        return rest(exact), rest(look.scores)

    parts = [odds(state, full, hidden[at : at + 256]) for at in range(0, len(hidden), 256)]
    wanted, rest = (np.concatenate(x) for x in zip(*map(jax.device_get, parts)))
    share = scipy.special.expit(wanted).mean()

    def error(tail: float) -> float:
        return float(scipy.special.expit(rest + tail).mean() - share)

    # Nothing to fit where nothing is left.
    if not error(-50) < 0 < error(50):
        return 0.0
    return scipy.optimize.root_scalar(error, bracket=(-50, 50)).root


@jax.jit
def row_errors(rows: Any, approximate: Any) -> jax.Array:
    """Bounds of `ScreenedHead` for a screen of approximate rows and the same biases: ``[vocab]``.

    They hold for ``rows`` and for these rounded to bfloat16, and for any order of float32 sums. ::

        |w_v - w^_v| + rounding (|w_v| + |w^_v| + 2 max_u |w_u|)
    """
    rows = jnp.asarray(rows, jnp.float32)
    rounding = _rounding(rows)
    small = rows.astype(jnp.bfloat16).astype(jnp.float32)
    norm, other = (_norms(x)[:, 0] for x in (rows, approximate))
    gap = jnp.maximum(_norms(rows - approximate), _norms(small - approximate))[:, 0]
    # Twice the largest: the logit that others are compared with may be rounded too.
    return gap + 1.01 * rounding * (norm + other + 2 * norm.max(initial=0))


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

"""Shortlists: cluster scores choose tokens, better rows re-score them, the rest stays as it is."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from logitjax import ops
from logitjax.losses import Head
from logitjax.ops import Array, TopK, checks, logsumexp, neginf_to_zero, top_k
from logitjax.vq._loss import code_scores
from logitjax.vq._row_products import row_products


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """The clusters cut into pages of equal size, so that a shortlist has a static shape.

    Attributes:
        tokens: ``[pages, size]``, tokens of one cluster, -1 where a page is not full.
        code: ``[pages]``, their cluster.
        bias: ``[pages, size]``, their biases, ``-inf`` where there is no token.
        log_mass: ``[pages]``, log of the summed exponentials of those.
        lift: ``[pages]``, added to the cluster's score to rank pages: the largest bias in it, plus
            a margin for how far rows lie from the codebook.
    """

    tokens: jax.Array
    code: jax.Array
    bias: jax.Array
    log_mass: jax.Array
    lift: jax.Array

    def with_biases(self, bias: Float[Array, " vocab"]) -> "Pages":
        """The same pages in the same ranking with other biases, differentiable in them.

        >>> pages = Pages.cut(np.zeros(3), np.array([0, 0, 1]), size=2)
        >>> again = jax.jit(Pages.with_biases)(pages, np.log([1.0, 2.0, 4.0]))
        >>> print(np.exp(again.log_mass).round(3))
        [3. 4.]
        """
        within = jnp.where(self.tokens >= 0, jnp.asarray(bias)[self.tokens], -jnp.inf)
        return dataclasses.replace(self, bias=within, log_mass=logsumexp(within))

    @classmethod
    def cut(
        cls,
        bias: Float[Array, " vocab"],
        assignment: Int[Array, " vocab"],
        *,
        size: int = 16,
        margin: Float[Array, " vocab"] | None = None,
    ) -> "Pages":
        """Cuts clusters into pages of tokens with similar bias.

        Runs on the host, once: the number of pages depends on the sizes of the clusters and is at
        most codes + vocab / size.

        Args:
            bias: ``[vocab]``; tokens with ``-inf`` are left out.
            assignment: ``[vocab]``, cluster of each entry.
            size: tokens per page.
            margin: ``[vocab]``, by how much the better logit of a token may plausibly exceed its VQ
                logit, e.g. one standard deviation (`spread`).

        Raises:
            ValueError: ``size`` is not positive.

        >>> pages = Pages.cut(jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([0, 0, 0, 1]), size=2)
        >>> print(pages.tokens.tolist(), pages.code)
        [[2, 1], [0, -1], [3, -1]] [0 0 1]
        """
        if size < 1:
            raise ValueError(f"size: expected a positive number, got {size}")
        bias_, assignment_ = np.asarray(bias, np.float64), np.asarray(assignment)
        reach = bias_ if margin is None else bias_ + np.asarray(margin)
        # By cluster, then by what a token can reach: those of a page are wanted together.
        order = np.lexsort((-reach, assignment_))
        order = order[np.isfinite(bias_[order])]  # what does not exist has no page
        codes = assignment_[order]
        fresh = np.r_[True, codes[1:] != codes[:-1]] if len(codes) else np.zeros(0, bool)
        start = np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))
        offset = np.arange(len(order)) - start
        page = np.cumsum(offset % size == 0) - 1  # a page has one cluster's tokens
        tokens = np.full((page[-1] + 1 if len(page) else 1, size), -1, np.int32)
        tokens[page, offset % size] = order
        code = np.zeros(len(tokens), np.int32)
        code[page] = codes
        lift = np.where(tokens >= 0, reach[tokens], -np.inf).max(1)
        within = jnp.asarray(np.where(tokens >= 0, bias_[tokens], -np.inf), jnp.float32)
        return cls(
            tokens=jnp.asarray(tokens),
            code=jnp.asarray(code),
            bias=within,
            log_mass=jax.jit(logsumexp)(within),
            lift=jnp.asarray(lift, jnp.float32),
        )

    @staticmethod
    def spread(
        rows: Float[Array, "vocab hidden"],
        codebook: Float[Array, "codes hidden"],
        assignment: Int[Array, " vocab"],
        hidden_cov: Float[Array, "hidden hidden"],
    ) -> Float[jax.Array, " vocab"]:
        """Standard deviation, over hidden states, of the codebook's error in each token's logit.

        ::

            sqrt((w_v - C_{m(v)})^T Cov(h) (w_v - C_{m(v)}))

        >>> arrays = np.array([[3.0], [1.0]]), np.ones((1, 1)), np.zeros(2, int), 4.0 * np.eye(1)
        >>> print(jax.jit(Pages.spread)(*arrays))
        [4. 0.]
        """
        apart = jnp.asarray(rows, jnp.float32) - jnp.asarray(codebook, jnp.float32)[assignment]
        return jnp.sqrt(jnp.maximum(((apart @ hidden_cov) * apart).sum(-1), 0.0))


def rescored(rows: Head | Array, hidden: jax.Array, tokens: jax.Array) -> jax.Array:
    """``w_v . h + a_v`` of a full head, or its kernel alone, for tokens `[n, chosen]`.

    Inputs in the dtype of ``hidden``, sums and result in float32. Tokens outside of the vocabulary
    are taken for its nearest end.
    """
    head = Head.of(rows).resolve(hidden.shape[-1])
    scores = row_products(hidden, head.rows, tokens)
    scores = scores if head.bias is None else scores + jnp.asarray(head.bias)[tokens]
    return scores if head.soft_cap is None else ops.soft_cap(scores, head.soft_cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortlist:
    """A shortlist: the pages of tokens to re-score, and the better rows.

    Attributes:
        pages: pages from `Pages.cut`.
        rescore: a `Head` with better rows, or its kernel alone.
        num_pages: pages that are re-scored.

    Raises:
        ValueError: ``num_pages`` is not in 1..pages.
    """

    pages: Pages
    rescore: Head | Array
    num_pages: int

    def __post_init__(self) -> None:
        most = self.pages.tokens.shape[0]
        if not 1 <= self.num_pages <= most:
            raise ValueError(
                f"num_pages: expected a number between 1 and the number of pages, {most}, "
                f"got {self.num_pages}"
            )

    def nll(
        self,
        hidden: Float[Array, "*batch hidden"],
        codebook: Float[Array, "codes hidden"],
        bias: Float[Array, " vocab"],
        assignment: Int[Array, " vocab"],
        labels: Int[Array, "*batch"],
        *,
        temperature: float | Array = 1.0,
        soft_cap: float | None = None,
        z_loss: float = 0.0,
        block_size: int = 256,
    ) -> Float[jax.Array, "*batch"]:
        """Cross-entropy of a shortlist head, normalised over the whole vocabulary.

        The better logits divide the mass of the ``num_pages`` best pages; all other tokens keep
        their VQ logits. The codes say how large that mass is, because the two kinds of logits
        differ by a number that depends on the context. The result is a proper distribution, the one
        that `top_k` decodes from. ::

            g = logsumexp_{chosen pages} s - logsumexp_{other pages} s,    s = z_code + log mass
            l_v = rescore(h, v) + shift(h)      v in a chosen page
                  z_{m(v)} + b_v                otherwise
            shift such that  logsumexp_chosen l - logsumexp_{other pages} s = g

        The choice of pages has no gradient; the codes learn how much of the mass it catches.

        Arguments are those of `vq_nll`, beside:

        Args:
            soft_cap: bounds the VQ scores and, with it, the better logits.
            block_size: positions at a time; their rows are gathered anew in the backward pass.

        Returns:
            ``[*batch]``, float32, not reduced. O(K d + num_pages * size * d) per token.

        Raises:
            ValueError: ``labels`` do not fit ``hidden``.

        References:
            The tail of the paper's head, arXiv:2505.10202, under rows of the head it replaces:
            ours.
        """
        hidden, labels, assignment = map(jnp.asarray, (hidden, labels, assignment))
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(f"labels: expected shape {hidden.shape[:-1]}, got {labels.shape}")
        checks.positive(temperature, "temperature")
        pages = self.pages.with_biases(bias)
        hot = _heated(pages, temperature)

        def block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            hidden, labels = inputs
            scores = code_scores(hidden, codebook, soft_cap=soft_cap)
            chosen = _choose(scores, pages, self.num_pages)
            tokens, logits, rest = self._split(hidden, scores, chosen, pages, soft_cap)
            logits = logits / temperature
            rest = jnp.where(jnp.isneginf(rest), -jnp.inf, _page_scores(scores / temperature, hot))
            log_z = jnp.logaddexp(logsumexp(logits), logsumexp(rest))
            coarse = jnp.take_along_axis(scores, assignment[labels][:, None], axis=-1)[:, 0]
            coarse = (coarse + jnp.asarray(bias)[labels]) / temperature
            hit = tokens == labels[:, None]
            fine = jnp.where(hit, logits, 0.0).sum(-1)  # at most one place is hit
            nll = log_z - jnp.where(hit.any(-1), fine, coarse)
            return nll + z_loss * log_z**2 if z_loss else nll

        return in_blocks(block, (hidden, labels), block_size)

    def top_k(
        self,
        hidden: Float[Array, "*batch hidden"],
        codebook: Float[Array, "codes hidden"],
        k: int,
        *,
        temperature: float | Array = 1.0,
        soft_cap: float | None = None,
        with_tail: bool = True,
        block_size: int = 256,
    ) -> TopK:
        """The k largest logits of a shortlist head, without V logits.

        With the tail they are exactly those of `logits`: tokens of the k best pages that were
        not chosen take part with their VQ logits. They equal the full head's wherever its k best
        tokens lie in the chosen pages.

        Args:
            temperature: divides the logits. Other than 1 it costs O(V) a call.
            soft_cap: as of `nll`.
            with_tail: False uses the chosen pages alone, which is cheaper, and right if you trust
                only the better logits.
            block_size: positions at a time.

        Returns:
            `TopK`: ``[*batch, k]`` logits and tokens, ``log_z`` over the whole vocabulary.

        Raises:
            ValueError: the shortlist is shorter than k.

        >>> rows = Head(np.eye(3), vocab_axis=0)
        >>> bias, assignment = np.zeros(3), np.array([0, 0, 1])
        >>> pages = Pages.cut(bias, assignment, size=2)
        >>> both = Shortlist(pages=pages, rescore=rows, num_pages=2)
        >>> top_k = jax.jit(both.top_k, static_argnums=2)
        >>> top_k(np.array([[1.0, 3.0, 2.0]]), np.zeros((2, 3)), 2).indices
        Array([[1, 2]], dtype=int32)
        """
        hidden = jnp.asarray(hidden)
        checks.positive(temperature, "temperature")
        pages = self.pages
        hot = _heated(pages, temperature)
        listed = self.num_pages * pages.tokens.shape[1]
        if k > listed:
            raise ValueError(f"k: expected at most num_pages * size = {listed}, got {k}")

        def block(inputs: tuple[jax.Array]) -> tuple[jax.Array, ...]:
            (hidden,) = inputs
            scores = code_scores(hidden, codebook, soft_cap=soft_cap)
            chosen = _choose(scores, pages, self.num_pages)
            tokens, logits, rest = self._split(hidden, scores, chosen, pages, soft_cap)
            scores, logits = scores / temperature, logits / temperature
            rest = jnp.where(jnp.isneginf(rest), -jnp.inf, _page_scores(scores, hot))
            log_z = jnp.logaddexp(logsumexp(logits), logsumexp(rest))
            if with_tail:
                # A page's best token.
                heads = jnp.take(scores, hot.code, axis=-1) + hot.bias.max(-1)
                heads = jnp.where(jnp.isneginf(rest), -jnp.inf, heads)
                _, best = lax.top_k(heads, min(k, heads.shape[-1]))
                kept = jnp.take_along_axis(rest, best, axis=-1) > -jnp.inf
                tail = jnp.take_along_axis(scores, hot.code[best], axis=-1)[..., None]
                tail = jnp.where(kept[..., None], tail + hot.bias[best], -jnp.inf)
                tail = tail.reshape(hidden.shape[0], -1)
                logits = jnp.concatenate([logits, tail], axis=-1)
                tokens = jnp.concatenate([tokens, hot.tokens[best].reshape(tail.shape)], axis=-1)
            values, places = lax.top_k(logits, k)
            return values, jnp.take_along_axis(tokens, places, axis=-1), log_z

        return TopK(*in_blocks(block, (hidden,), block_size))

    def logits(
        self,
        hidden: Float[Array, "*batch hidden"],
        codebook: Float[Array, "codes hidden"],
        bias: Float[Array, " vocab"],
        assignment: Int[Array, " vocab"],
        *,
        soft_cap: float | None = None,
    ) -> Float[jax.Array, "*batch vocab"]:
        """All V logits of a shortlist head, float32 ``[*batch, vocab]``; arguments as of `nll`.

        >>> rows = Head(np.eye(3), vocab_axis=0)
        >>> bias, assignment = np.zeros(3), np.array([0, 0, 1])
        >>> pages = Pages.cut(bias, assignment, size=2)
        >>> run = jax.jit(Shortlist(pages=pages, rescore=rows, num_pages=1).logits)
        >>> logits = run(np.array([[1.0, 3.0, 2.0]]), np.zeros((2, 3)), bias, assignment)
        >>> [f"{logit:.3f}" for logit in np.asarray(logits)[0]]  # the page keeps its codes' mass
        ['-1.434', '0.566', '0.000']
        """
        hidden = jnp.asarray(hidden)
        pages = self.pages.with_biases(bias)
        flat = hidden.reshape(-1, hidden.shape[-1])
        scores = code_scores(flat, codebook, soft_cap=soft_cap)
        chosen = _choose(scores, pages, self.num_pages)
        tokens, logits, _ = self._split(flat, scores, chosen, pages, soft_cap)
        coarse = jnp.take(scores, assignment, axis=-1) + jnp.asarray(bias)
        # Empty places of a page point behind the vocabulary, where a scatter drops them.
        tokens = jnp.where(tokens < 0, coarse.shape[-1], tokens)
        rows = jnp.arange(len(flat))[:, None]
        full = coarse.at[rows, tokens].set(logits, mode="drop")
        return full.reshape(*hidden.shape[:-1], -1)

    def _split(
        self,
        hidden: jax.Array,
        scores: jax.Array,
        chosen: jax.Array,
        pages: Pages,
        soft_cap: float | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens of the chosen pages, their shifted logits, and scores plus masses of the rest."""
        tokens = pages.tokens[chosen].reshape(len(hidden), -1)
        logits = rescored(self.rescore, hidden, jnp.maximum(tokens, 0))
        if soft_cap is not None:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        logits = jnp.where(tokens >= 0, logits, -jnp.inf)
        masses = _page_scores(scores, pages)
        rest = masses.at[jnp.arange(len(hidden))[:, None], chosen].set(-jnp.inf)
        others = logsumexp(rest)
        # Exact logits are shifted so that the shortlist keeps the odds that its codes have against
        # the rest.
        odds = logsumexp(jnp.take_along_axis(masses, chosen, axis=-1)) - neginf_to_zero(others)
        # Where nothing else is left there is nothing to weigh the shortlist against.
        shift = jnp.where(
            jnp.isneginf(others), 0.0, neginf_to_zero(others) + odds - logsumexp(logits)
        )
        return tokens, logits + shift[:, None], rest


def _choose(scores: jax.Array, pages: Pages, num_pages: int) -> jax.Array:
    # `lift` is the most that a token of the page may have beyond the score of its code.
    ranked = lax.stop_gradient(jnp.take(scores, pages.code, axis=-1) + pages.lift)
    return top_k(ranked, num_pages)[1]


def _page_scores(scores: jax.Array, pages: Pages) -> jax.Array:
    return jnp.take(scores, pages.code, axis=-1) + pages.log_mass


def _heated(pages: Pages, temperature: float | Array) -> Pages:
    if isinstance(temperature, (int, float)) and temperature == 1:
        return pages
    within = pages.bias / temperature
    return dataclasses.replace(pages, bias=within, log_mass=logsumexp(within))


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
        out = lax.map(jax.checkpoint(block), cut)  # rows gathered are not kept
        out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)

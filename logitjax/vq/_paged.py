"""Paged heads: a sketch of all rows in four bits chooses pages, whose exact rows are read."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from logitjax.heads import Assignment, HeadCost, VocabularyHead
from logitjax.losses import Head
from logitjax.ops import Array, TopK, checks, gather_at, logsumexp, top_k
from logitjax.ops import mesh as on_mesh
from logitjax.vq._hidden_cache import head_statistics
from logitjax.vq._loss import on_batch
from logitjax.vq._screened import in_blocks
from logitjax.vq._targets import HeadTargets

#: Positions that share pages: a decoding batch, and half the columns of a small matrix product.
TOGETHER = 16
# Rows of the sketch in a step of its kernel; the width of a chip's registers.
_TILE, _LANES = 2048, 128
# Units of a token's digits, which all types hold exactly.
_RADICES = (16384, 128, 1)
# Shares of the largest number of a row that four bits span; the rest is cut off.
_SPANS = (0.9, 0.7, 0.55)
# Added to the variance of every direction, in units of the mean: other text varies along others.
_RIDGE = 10.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pages:
    """Rows of a head in the order of pages; the last one is padded."""

    # `[pages, size, width]`: rows, three columns with the base-128 digits of their tokens, and
    # padding to a multiple of 128, or a chip would store another order.
    rows: Any
    # `[pages * size]` or None.
    bias: Any
    # The sketch: int4 `[hidden, pages * size]`.
    codes: Any
    # Its scales and biases `[steps, 2, tile]`.
    lines: Any
    # `[hidden, hidden]`, to its coordinates.
    projection: Any
    # The row of each token `[vocab]`.
    places: Any

    @classmethod
    def of(cls, head: Head, counts: np.ndarray, statistics: Any, size: int) -> "Pages":
        """Pages of alike tokens of about the same expected count, and a sketch of their rows."""
        vocab = head.rows.shape[0]
        # Tiles are whole, and the last one has a token.
        tile = min(_TILE, -(-vocab // _LANES) * _LANES)
        order = np.argsort(-np.asarray(counts), kind="stable")
        codes, *rest = _sketch(head.rows, statistics.mean, statistics.cov)

        def padded(array: Any, fill: float = 0) -> jax.Array:
            sides = [(0, -vocab % tile)] + [(0, 0)] * (array.ndim - 1)
            return jnp.pad(array, sides, constant_values=fill)

        here = padded(jnp.ones(vocab), 0.0) > 0
        by_page = _grouped(padded(codes[order] * rest[0][order, None]), here, tile, size)
        order = order[np.asarray(by_page)[:vocab]]
        places = np.empty(vocab, np.int32)
        places[order] = np.arange(vocab)
        (scales, offsets), projection = (x[order] for x in rest[:2]), rest[2]
        digits = jnp.stack([order // radix % 128 for radix in _RADICES], 1)
        rows = jnp.concatenate([jnp.asarray(head.rows)[order], digits], 1, dtype=jnp.bfloat16)
        codes = codes[order]
        bias = None if head.bias is None else jnp.asarray(head.bias, jnp.float32)[order]
        offsets = offsets if bias is None else offsets + bias
        lines = padded(scales), padded(offsets, -np.inf)
        rows = padded(jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % _LANES))))
        return cls(
            rows=rows.reshape(-1, size, rows.shape[1]),
            bias=None if bias is None else padded(bias),
            codes=padded(codes).T.astype(jnp.int4),
            lines=jnp.stack([line.reshape(-1, tile) for line in lines], 1),
            projection=projection,
            places=jnp.asarray(places),
        )

    # Variables of flax are read by `[...]`.
    def __getitem__(self, index: Any) -> "Pages":
        return self

    def tuned(self, imitate: Callable[..., Any]) -> tuple["Pages", list[float]]:
        """Another scale and bias for each row of the sketch, by `Tuning.imitate`; its losses."""
        scales, offsets = (self.lines[:, i].reshape(-1) for i in range(2))
        rows = (self.projection.T.astype(jnp.float32) @ self.codes.astype(jnp.float32) * scales).T

        def head_of(params: Any, rows: Any) -> Head:
            gains, offsets = params
            return Head(rows * jnp.exp(gains)[:, None], offsets, vocab_axis=0)

        params = jnp.zeros(self.places.shape), offsets[self.places]
        (gains, tuned), losses = imitate(head_of, params, rows[self.places])
        scales = scales.at[self.places].multiply(jnp.exp(gains))
        lines = scales, offsets.at[self.places].set(tuned)
        tile = self.lines.shape[2]
        stacked = jnp.stack([line.reshape(-1, tile) for line in lines], 1)
        return dataclasses.replace(self, lines=stacked), losses

    def sketched(self, hidden: jax.Array) -> jax.Array:
        """Approximate logits ``[n, pages, size]``."""
        coordinates = hidden.astype(jnp.float32) @ self.projection.T.astype(jnp.float32)
        products = coordinates @ self.codes.astype(jnp.float32)
        scales, offsets = (self.lines[:, i].reshape(-1) for i in range(2))
        return (products * scales + offsets).reshape(-1, *self.rows.shape[:2])

    def mass(self, hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``[n, pages]``, logsumexp of a page's approximate logits; ``[n, 1]``, of all."""

        def plain(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            mass = logsumexp(self.sketched(hidden))
            return mass, logsumexp(mass)[:, None]

        if not _kernels(hidden):
            return plain(hidden)
        from logitjax.vq._page_kernels import page_mass

        def kernel(hidden: jax.Array) -> tuple[jax.Array, jax.Array]:
            return page_mass(hidden, self.projection, self.codes, self.lines, self.rows.shape[1])

        return _with_gradient(kernel, plain)(hidden)

    def exact(self, hidden: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``[n, chosen * size]``, the logits of chosen pages by their rows, and their tokens."""
        (_, size, width), own = self.rows.shape, hidden.shape[1]
        # One more position reads the digits, where XLA would gather from all tokens.
        reader = jnp.zeros((1, width), hidden.dtype).at[0, own : own + 3].set(_RADICES)
        hidden = jnp.concatenate([jnp.pad(hidden, ((0, 0), (0, width - own))), reader])

        def tiles(hidden: jax.Array, rows: jax.Array, ids: jax.Array) -> jax.Array:
            read = rows.at[ids].get(mode="promise_in_bounds").astype(hidden.dtype)
            wide = jnp.promote_types(hidden.dtype, jnp.float32)
            products = jnp.einsum("nd,psd->nps", hidden, read, preferred_element_type=wide)
            return products.reshape(len(hidden), -1)

        at = (ids[:, None] * size + jnp.arange(size)).reshape(-1)
        products = tiles
        if _kernels(hidden):
            from logitjax.vq._page_kernels import page_products

            products = _with_gradient(page_products, tiles)
        products = products(hidden, self.rows, ids)
        products, tokens = products[:-1], products[-1].astype(jnp.int32)
        # The last page's padding.
        products = jnp.where(at < self.places.size, products, -jnp.inf)
        return products if self.bias is None else products + self.bias[at], tokens


class PagedHead(VocabularyHead):
    """A head for accelerators: it reads a sketch of all rows, and whole pages of exact rows.

    A page is a block of memory with rows of alike tokens of about the same expected count, so that
    the positions of a batch often need the same pages. A sketch of the rows, of four bits a number,
    predicts each page's probability. The likeliest pages are read, once for up to 16 positions,
    which share them: their logits are those of the rows. All others are the sketch's, shifted as in
    a `ScreenedHead`. On TPUs kernels stream sketch and pages; elsewhere XLA multiplies, which on a
    CPU is slower than a `ScreenedHead`. ::

        s = sketch(h),   M_p = logsumexp_{v in p} s_v,   pages = the num_pages largest of M
        l_v = w_v . h + a_v     v in a page that is read
              s_v + shift(h)    otherwise

    Args:
        pages: the rows, of `PagedHead.fit`.
        num_pages: number of pages that up to 16 positions read together.
        dtype: type of the products.
    """

    screens = True

    def __init__(self, pages: Pages, *, num_pages: int, dtype: Any = jnp.float32):
        checks.between(num_pages, 1, pages.rows.shape[0], "num_pages")
        self.pages: Any = Assignment(pages)
        self.num_pages, self.dtype = num_pages, dtype

    @classmethod
    def fit(
        cls,
        head: Head,
        hidden: np.ndarray,
        targets: HeadTargets,
        *,
        page_size: int = 8,
        share: float = 0.28,
        imitate: Callable[..., Any] | None = None,
        dtype: Any = jnp.float32,
    ) -> tuple["PagedHead", list[float]]:
        """Sketch a full head's rows; returns the head and the losses of tuning its sketch.

        ValueError if the head has a soft cap.

        Args:
            hidden, targets: positions, and ``head``'s outputs on them, `HiddenCache.head_targets`.
            page_size: tokens a page, a divisor of 128.
            share: what sketch and pages read, of the bytes of all rows in bfloat16.
            imitate: tunes a head that amounts to rows, `Tuning.imitate`; None leaves the sketch.
        """
        if head.soft_cap is not None:
            raise ValueError(f"head: expected one without a soft cap, got {head.soft_cap}")
        if page_size < 1 or 128 % page_size:
            raise ValueError(f"page_size: expected a divisor of 128, got {page_size}")
        counts, statistics = np.asarray(targets.counts), head_statistics(hidden)
        pages, losses = Pages.of(head, counts, statistics, page_size), []
        if imitate is not None:
            pages, losses = pages.tuned(imitate)
        made = cls(pages, num_pages=1, dtype=dtype)
        # Pages are copied together.
        step, most = _LANES // page_size, pages.rows.shape[0]
        one, two = (cls(pages, num_pages=n).cost().read_bytes for n in (1, 2))
        left = (share * 2 * head.rows.size - one) / (two - one)
        made.num_pages = min(most, max(step, int(left) // step * step))
        return made, losses

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        # Files have no type of four bits.
        pages = dataclasses.replace(self.pages[...], codes=self.pages[...].codes.astype(jnp.int8))
        tensors = {k: np.asarray(v) for k, v in vars(pages).items() if v is not None}
        return tensors, {"num_pages": self.num_pages}

    @classmethod
    def of_record(cls, tensors: Any, **options: Any) -> "PagedHead":
        """The head that `save` wrote."""
        arrays = {name: jnp.asarray(array) for name, array in tensors.items()}
        arrays["codes"] = arrays["codes"].astype(jnp.int4)
        return cls(Pages(**{"bias": None} | arrays), **options)

    def _by_groups(self, fn: Callable, out_ndims: tuple, hidden: Array, *others: Array) -> Any:
        """`fn(pages, ids, mass, log_z, hidden, *others)` over groups that share pages."""
        hidden = jnp.asarray(hidden, self.dtype)
        batch, flat = hidden.shape[:-1], hidden.reshape(-1, hidden.shape[-1])
        others = tuple(jnp.asarray(x).reshape(-1, *jnp.shape(x)[len(batch) :]) for x in others)

        def run(flat: jax.Array, pages: Pages, *others: jax.Array) -> Any:
            def group(inputs: tuple[jax.Array, ...]) -> Any:
                hidden, exists, *others = inputs
                mass, log_z = pages.mass(hidden)
                # What pads the last group chooses nothing, nor does a row of nan for others.
                counts = exists[:, None] & ~jnp.isnan(log_z)
                score = jnp.where(counts, mass - log_z, -jnp.inf).max(0)
                # In the order of memory.
                ids = jnp.sort(lax.top_k(lax.stop_gradient(score), self.num_pages)[1])
                return fn(pages, ids, mass, log_z, hidden, *others)

            return in_blocks(group, (flat, jnp.ones(len(flat), bool), *others), TOGETHER)

        out = on_batch(run, out_ndims, flat, self.pages[...], *others)
        return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), out)

    def __call__(self, hidden: Array, embedding: Array | None = None) -> jax.Array:
        return self._by_groups(lambda *args: (_logits(*args),), (2,), hidden)[0]

    def nll(
        self,
        hidden: Array,
        labels: Array,
        embedding: Array | None = None,
        *,
        temperature: float | Array = 1.0,
        z_loss: float = 0.0,
    ) -> jax.Array:
        """Cross-entropy over the whole vocabulary; the choice of pages has no gradient."""
        if jnp.shape(labels) != jnp.shape(hidden)[:-1]:
            shapes = jnp.shape(hidden)[:-1], jnp.shape(labels)
            raise ValueError("labels: expected shape {}, got {}".format(*shapes))
        checks.positive(temperature, "temperature")

        def loss(*args: Any) -> tuple[jax.Array]:
            logits = _logits(*args[:-1]) / temperature
            log_z = logsumexp(logits)
            nll = log_z - gather_at(logits, args[-1][:, None])[:, 0]
            return (nll + z_loss * log_z**2 if z_loss else nll,)

        return self._by_groups(loss, (1,), hidden, labels)[0]

    def top_k(self, hidden: Array, k: int, embedding: Array | None = None) -> TopK:
        """The k best tokens of the pages that are read; ``log_z`` is over the whole vocabulary.

        ValueError if ``k`` is not from 1 to the number of tokens that are read.
        """
        tokens = self.pages[...].rows.shape[1] * self.num_pages
        checks.between(k, 1, tokens, "k")

        def best(
            pages: Pages, ids: Any, mass: Any, log_z: Any, hidden: Any
        ) -> tuple[jax.Array, ...]:
            exact, tokens = pages.exact(hidden, ids)
            # In one stage: what two would save, their copies cost.
            values, found = top_k(exact, k, group_size=exact.shape[-1])
            log_z = log_z[:, 0] + _shift(exact, mass, ids)
            # Beside zeros, since a gather of a few numbers moves a thousand on TPUs.
            here = found[..., None] == jnp.arange(tokens.size)
            return values, jnp.where(here, tokens, 0).sum(-1), log_z

        return TopK(*self._by_groups(best, (2, 2, 1), hidden))

    def cost(self, embedding: Array | None = None) -> HeadCost:
        """Return its `HeadCost`, for a single position."""
        pages = self.pages[...]
        (count, size, padded), (width, total) = pages.rows.shape, pages.codes.shape
        row = padded * pages.rows.dtype.itemsize + 4
        sketch = total * (width // 2 + 8) + pages.projection.size * 2
        flops = 2 * (total * width + width * width + self.num_pages * size * padded)
        return HeadCost(
            parameters=total * (width + 1),
            stored_bytes=sketch + total * row + 4 * pages.places.size,
            read_bytes=sketch + self.num_pages * size * row,
            decode_flops=flops,
            train_flops=3 * flops,
            exact=self.num_pages == count,
        )


@jax.jit
def _sketch(rows: Array, mean: Array, cov: Array) -> Any:
    """Rows in coordinates of about equal importance to logits, in four bits."""
    rows, width = jnp.asarray(rows, jnp.float32), rows.shape[1]
    values, vectors = jnp.linalg.eigh(cov + _RIDGE * jnp.trace(cov) / width * jnp.eye(width))
    # A rotation at random spreads a row's size over all dimensions, so that one scale will do.
    mixing = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (width, width)))[0]
    projection = (vectors / jnp.sqrt(values) @ mixing).T.astype(jnp.bfloat16)
    # The variance of a logit is |S' w|^2 if the covariance is S S'.
    coordinates = rows @ (vectors * jnp.sqrt(values)) @ mixing
    largest = jnp.maximum(jnp.abs(coordinates).max(-1), 1e-30)
    scales = largest / 7
    error = jnp.full_like(scales, jnp.inf)
    for span in _SPANS:
        tried = largest * (span / 7)
        coded = jnp.clip(jnp.round(coordinates / tried[:, None]), -8, 7) * tried[:, None]
        missed = ((coded - coordinates) ** 2).sum(-1)
        scales, error = jnp.where(missed < error, tried, scales), jnp.minimum(missed, error)
    codes = jnp.clip(jnp.round(coordinates / scales[:, None]), -8, 7)
    # No error at the mean hidden state.
    offsets = rows @ mean - (codes @ (projection @ mean)) * scales
    return codes.astype(jnp.int8), scales, offsets, projection


@jax.jit(static_argnames=("tile", "size"))
def _grouped(coordinates: jax.Array, exists: jax.Array, tile: int, size: int) -> jax.Array:
    """An order in which each tile's pages are alike: halves along its leading direction, halved."""
    order, length = jnp.arange(len(exists)), tile
    start = jax.random.normal(jax.random.key(0), coordinates.shape[1:])
    while length % (2 * size) == 0:
        order = order.reshape(-1, length)
        x, here = coordinates[order], exists[order]
        x = jnp.where(here[..., None], x - x.mean(1, keepdims=True), 0)
        direction = jnp.broadcast_to(start, (len(x), x.shape[-1]))
        for _ in range(6):
            direction = jnp.einsum("gmr,gm->gr", x, jnp.einsum("gmr,gr->gm", x, direction))
            direction /= jnp.linalg.norm(direction, axis=-1, keepdims=True) + 1e-30
        along = jnp.where(here, jnp.einsum("gmr,gr->gm", x, direction), jnp.inf)
        # Padding remains at the end.
        order = jnp.take_along_axis(order, jnp.argsort(along, stable=True), -1)
        length //= 2
    return order.reshape(-1)


def _shift(exact: jax.Array, mass: jax.Array, ids: jax.Array) -> jax.Array:
    """``[n]``, what makes the pages that were read keep their predicted share."""
    return logsumexp(exact) - logsumexp(mass[:, ids])


def _logits(pages: Pages, ids: jax.Array, mass: Any, log_z: Any, hidden: jax.Array) -> jax.Array:
    exact, _ = pages.exact(hidden, ids)
    # Of the same products as the approximate logits beside them.
    sketched = pages.sketched(hidden)
    shift = _shift(exact, logsumexp(sketched), ids)
    exact = exact.reshape(len(exact), len(ids), -1)
    logits = (sketched + shift[:, None, None]).at[:, ids].set(exact)
    return logits.reshape(len(hidden), -1)[:, pages.places]


def _kernels(hidden: jax.Array) -> bool:
    """Whether kernels run: on a TPU, unless a mesh of several chips splits the positions."""
    mesh = jax.sharding.get_abstract_mesh()
    chips = math.prod(mesh.shape[name] for name in on_mesh.free_axes())
    return on_mesh.platform_of(hidden) == "tpu" and chips == 1


def _with_gradient(kernel: Callable, plain: Callable) -> Callable:
    """The kernel, with the derivative of the same function in XLA."""
    run = jax.custom_jvp(kernel)

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        return run(*primals), jax.jvp(plain, primals, tangents)[1]

    return run

"""Compressed heads of others: FlashHead and SVD-softmax from their papers, and FAISS' fast scan."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.vq_head.arms import TOP, Converted, Trial, Variants, cost_of
from experiments.vq_head.data import Context
from logitjax import losses, ops
from logitjax.kernels import native

_CLUSTER = 16


def flash(ctx: Context, trial: Trial) -> Variants:
    """FlashHead (arXiv:2603.14591), greedy: the rows of the clusters nearest in angle.

    V / 16 spherical clusters of 16 tokens; the 1/16 of them with the largest `h . c / |c|` are
    read, or twice and four times as many. Bytes are counted for centres and rows of bfloat16, as
    it is published, though both are float32 here. It has no probabilities.
    """
    members, centres = balanced_clusters(ctx.rows, _CLUSTER, seed=trial.seed)
    arrays = {
        "rows": ctx.rows,
        "bias": ctx.row_bias,
        "centres": jnp.asarray(centres),
        "members": jnp.asarray(members),
    }
    count, width = centres.shape

    def made(probes: int) -> Converted:
        def decode(arrays: Any, hidden: Any) -> Any:
            best = ops.top_k(hidden @ arrays["centres"].T, probes)[1]
            tokens = arrays["members"][best].reshape(len(hidden), -1)
            return _best(arrays, hidden, tokens)

        def outputs(arrays: Any, hidden: Any, _: Any) -> Any:
            best = ops.top_k(hidden @ arrays["centres"].T, probes)[1]
            read = jnp.zeros((len(hidden), count), bool)
            read = read.at[jnp.arange(len(hidden))[:, None], best].set(True)
            logits = losses.Head(arrays["rows"], arrays["bias"], vocab_axis=0).logits(hidden)
            logits = jnp.where(read[:, arrays["cluster"]], logits, -jnp.inf)
            return jnp.full(len(hidden), jnp.nan), ops.top_k(logits, TOP)[1]

        bytes_read = 2 * width * (count + probes * _CLUSTER)
        kept = 0 if ctx.tied else 2 * ctx.rows.size
        cost = cost_of(ctx, 2 * centres.size + 4 * members.size + kept, bytes_read)
        return Converted(outputs=outputs, decode=decode, arrays=arrays, cost=cost)

    cluster = np.zeros(ctx.vocab, np.int32)
    cluster[members.reshape(-1)] = np.repeat(np.arange(count), _CLUSTER)
    arrays["cluster"] = jnp.asarray(cluster)
    default = max(1, count // 16)
    return {f"flash x{factor}": made(min(count, factor * default)) for factor in (1, 2, 4)}


def svd(ctx: Context, trial: Trial) -> Variants:
    """SVD-softmax (Shim et al., 2017): a quarter of the rotated state previews, rows score again.

    As many rows as the largest screen of ours; others keep the preview's logits.
    """
    width, count = ctx.width // 4, ctx.config.candidates[-1]
    _, turn = jnp.linalg.eigh(jnp.einsum("vi,vj->ij", ctx.rows, ctx.rows))
    turn = turn[:, ::-1][:, :width]
    arrays = {"rows": ctx.rows, "bias": ctx.row_bias, "turn": turn, "preview": ctx.rows @ turn}

    def preview(arrays: Any, hidden: Any) -> tuple[Any, Any]:
        head = losses.Head(arrays["preview"], arrays["bias"], vocab_axis=0)
        scores = head.logits(hidden @ arrays["turn"])
        return scores, ops.top_k(scores, count, group_size=8)[1]

    def decode(arrays: Any, hidden: Any) -> Any:
        return _best(arrays, hidden, preview(arrays, hidden)[1])

    def outputs(arrays: Any, hidden: Any, labels: Any) -> Any:
        scores, tokens = preview(arrays, hidden)
        exact = _products(arrays, hidden, tokens)
        scores = scores.at[jnp.arange(len(hidden))[:, None], tokens].set(exact)
        best = jnp.take_along_axis(tokens, ops.top_k(exact, TOP)[1], axis=1)
        return losses.cross_entropy(scores, labels), best

    kept = 0 if ctx.tied else 4 * ctx.rows.size
    own = 4 * (ctx.vocab + ctx.width) * width
    cost = cost_of(ctx, own + kept, own + 4 * count * ctx.width)
    return {"svd": Converted(outputs=outputs, decode=decode, arrays=arrays, cost=cost)}


def faiss(ctx: Context, trial: Trial) -> Variants:
    """FAISS' IndexPQFastScan on rows whitened by the covariance; exact rows score 512 again."""
    import faiss  # pyright: ignore[reportMissingImports]

    count = min(512, ctx.config.candidates[-1])
    values, vectors = np.linalg.eigh(np.asarray(ctx.statistics.cov, np.float64))
    scale = np.sqrt(np.maximum(values, 1e-6 * values[-1]))
    root, inverse = ((vectors * s).astype(np.float32) for s in (scale, 1 / scale))
    rows, groups = np.asarray(ctx.rows), ctx.width // (3 if ctx.width % 3 == 0 else 4)
    index = faiss.IndexPQFastScan(ctx.width, groups, 4, faiss.METRIC_INNER_PRODUCT)
    white = rows @ root
    index.train(white[:: max(1, len(white) // 50_000)])
    index.add(white)

    def decode(arrays: Any, hidden: Any) -> Any:
        hidden = np.asarray(hidden)
        tokens = index.search(hidden @ inverse, count)[1]
        exact = np.einsum("nd,nkd->nk", hidden, rows[tokens])
        return np.take_along_axis(tokens, np.argsort(-exact, axis=1)[:, :TOP], axis=1)

    def outputs(arrays: Any, hidden: Any, labels: Any) -> Any:
        return np.full(len(hidden), np.nan), decode(arrays, hidden)

    own = ctx.vocab * groups / 2 + 4 * 16 * ctx.width
    cost = cost_of(ctx, own, own + 4 * count * ctx.width)
    made = Converted(outputs=outputs, decode=decode, arrays=None, cost=cost)
    return {"faiss": dataclasses.replace(made, compiled=False)}


def _products(arrays: Any, hidden: Any, tokens: Any) -> Any:
    def gathered(hidden: Any, rows: Any, tokens: Any) -> Any:
        return jnp.einsum("nd,nkd->nk", hidden, rows[tokens])

    exact = native.on_cpu(native.row_products, gathered, hidden, arrays["rows"], tokens)
    return exact if arrays["bias"] is None else exact + arrays["bias"][tokens]


def _best(arrays: Any, hidden: Any, tokens: Any) -> Any:
    places = lax.top_k(_products(arrays, hidden, tokens), TOP)[1]
    return jnp.take_along_axis(tokens, places, axis=1)


def balanced_clusters(rows: Any, size: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of `size` rows each by angle: their tokens `[count, size]`, their unit centres.

    In two levels: spherical k-means into parts, and inside each into clusters of one size. Short
    ones repeat a token.
    """
    rows, random = np.asarray(rows), np.random.default_rng(seed)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    parts = max(1, round((len(rows) / size) ** 0.5 / 2))
    labels = _spherical(unit, parts, random)
    members = []
    for part in range(parts):
        tokens = np.flatnonzero(labels == part)
        if not len(tokens):
            continue
        points, count = unit[tokens], -(-len(tokens) // size)
        centres = points[random.choice(len(points), count, replace=False)]
        nearest = _equal(points @ centres.T, size)
        for _ in range(4):
            centres = _centres(points, nearest, count)
            nearest = _equal(points @ centres.T, size)
        for cluster in range(count):
            chosen = tokens[nearest == cluster]
            if len(chosen):
                members.append(np.pad(chosen, (0, size - len(chosen)), mode="edge"))
    members = np.stack(members).astype(np.int32)
    means = unit[members].mean(1)
    return members, means / np.linalg.norm(means, axis=1, keepdims=True)


def _spherical(unit: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    centres = unit[random.choice(len(unit), count, replace=False)]
    labels = np.zeros(len(unit), np.int64)
    for _ in range(8):
        labels = (unit @ centres.T).argmax(1)
        centres = _centres(unit, labels, count)
    return labels


def _centres(points: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    sums = np.zeros((count, points.shape[1]), np.float32)
    np.add.at(sums, labels, points)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def _equal(scores: np.ndarray, size: int) -> np.ndarray:
    """The best cluster of each point, at most `size` in one: those nearest to it stay."""
    free = np.full(scores.shape[1], size)
    labels = np.full(len(scores), -1)
    while len(waiting := np.flatnonzero(labels < 0)):
        offers = np.where(free > 0, scores[waiting], -np.inf)
        wanted, score = offers.argmax(1), offers.max(1)
        order = np.lexsort((-score, wanted))
        starts = np.searchsorted(wanted[order], np.arange(len(free)))
        rank = np.arange(len(order)) - starts[wanted[order]]
        taken = order[rank < free[wanted[order]]]
        labels[waiting[taken]] = wanted[taken]
        free -= np.bincount(wanted[taken], minlength=len(free))
    return labels

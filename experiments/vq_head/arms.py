"""Converting one head into each of its cheaper relatives, all with the same budget."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.vq_head.context import Context, Split, in_blocks
from logitjax import heads, losses, ops, vq

#: Mapping and bias of the VQ arms; ``labels`` arms go on to the next-token loss.
VQ_ARMS = {
    "vq_paper": ("kmeans", False),
    "vq_plain": ("weighted_kmeans", False),
    "vq_random": ("random", True),
    "vq_bias": ("weighted_kmeans", True),
    "vq_likelihood": ("likelihood", True),
}
BASELINES = (
    "low_rank",
    "product",
    "packed_product",
    "wide_low_rank",
    "adaptive",
    "full_bias_labels",
    "full_labels",
)
#: Heads that make V cheap logits, for exact rows to re-score the best of.
SCREENS = ("product", "packed_product", "wide_low_rank")
#: What a head is given rather than trains.
_GIVEN = frozenset(
    {"rows", "row_bias", "pages", "tables", "product", "assignment", "order", "rank"}
)
ARMS = (*VQ_ARMS, "vq_likelihood_labels", *BASELINES)


@dataclasses.dataclass(frozen=True)
class Converted:
    """A converted head as functions of arrays.

    Attributes:
      nll: ``(params, hidden, labels) -> [n]``.
      top_k: ``(params, hidden) -> tokens [n, 5]``.
      params: their first argument.
      cost: counted, not timed.
      floor: the perplexity below which the head without bias could not come, if it is a VQ head.
      curve: training loss by step.
      moved: tokens that changed their code, by reassignment.
      head: the module, if it is a VQ head.
      logits: ``(params, hidden) -> [n, vocab]``, of a head that can screen.
      decode: as ``top_k``, where decoding takes another way to the same tokens.
    """

    nll: Callable[..., Any]
    top_k: Callable[..., Any]
    params: Any
    cost: heads.HeadCost
    floor: float | None = None
    curve: tuple[float, ...] = ()
    moved: tuple[float, ...] = ()
    head: Any = None
    logits: Callable[..., Any] | None = None
    decode: Callable[..., Any] | None = None


def convert(ctx: Context, arm: str, codes: int, seed: int, lr: float, config: Any) -> Converted:
    """Fits and tunes one arm."""
    if arm in VQ_ARMS or arm == "vq_likelihood_labels":
        return _vq(ctx, arm, codes, seed, lr, config)
    if arm in ("low_rank", "wide_low_rank"):
        # As many numbers as a codebook of that size has, or as many as may be read.
        rank = max(1, round(codes * ctx.width / (ctx.vocab + ctx.width)))
        rank = rank if arm == "low_rank" else config.screen_rank
        return _linear(ctx, arm, seed, lr, config, *_low_rank(ctx, rank))
    if arm in ("product", "packed_product"):
        packed = arm == "packed_product"
        parts = _product(ctx, seed, config, packed=packed)
        tuned = _linear(ctx, arm, seed, lr, config, *parts)
        return _packed(tuned) if packed else tuned
    if arm == "adaptive":
        return _adaptive(ctx, seed, lr, config)
    return _full(ctx, arm, seed, lr, config)


def measure(converted: Converted, ctx: Context, split: Split) -> dict[str, float]:
    """Held-out perplexity ratio to the old head, and agreement with its first choices."""
    nll_fn, top_fn = jax.jit(converted.nll), jax.jit(converted.top_k)
    nll = in_blocks(lambda h, y: nll_fn(converted.params, h, y), split.hidden, split.labels)
    tokens = in_blocks(lambda h: top_fn(converted.params, h), split.hidden)
    teacher = split.targets.top_tokens[:, : tokens.shape[1]]
    return {
        "nll": float(nll.mean()),
        "ratio": float(np.exp(nll.mean() - split.targets.nll.mean())),
        "top1": float((tokens[:, 0] == teacher[:, 0]).mean()),
        "top5": float((tokens[:, :, None] == teacher[:, None, :]).any(1).mean()),
        "accuracy": float((tokens[:, 0] == split.labels).mean()),
    }


def training_step(converted: Converted) -> Callable[..., Any] | None:
    """Loss and gradients, for the head's parameters and the trunk: ``(hidden, labels) -> ...``.

    None for a screen with exact rows, which has nothing of its own to train, and for packed codes,
    which train as product quantisation does.
    """
    if "screen" in converted.params or "packed" in converted.params:
        return None
    given = {name: x for name, x in converted.params.items() if name in _GIVEN}
    trained = {name: x for name, x in converted.params.items() if name not in _GIVEN}

    def loss(trained: Any, given: Any, hidden: Any, labels: Any) -> Any:
        return converted.nll(trained | given, hidden, labels).mean()

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 2)))
    return lambda hidden, labels: step(trained, given, hidden, labels)


def cost_of(head: Callable[..., Any], *sizes: int, **options: Any) -> heads.HeadCost:
    """The cost of a head of these sizes, without making its arrays."""
    return nnx.eval_shape(lambda: head(*sizes, **options, rngs=nnx.Rngs(0))).cost()


def _full_cost(ctx: Context, *, bias: bool) -> heads.HeadCost:
    if ctx.tied:
        start = jnp.zeros(ctx.vocab) if bias else None
        return heads.TiedHead(bias=start).cost(ctx.rows)
    return cost_of(heads.LinearHead, ctx.width, ctx.vocab, use_bias=bias)


def full(ctx: Context) -> Converted:
    """The head that there was."""
    cost = _full_cost(ctx, bias=ctx.row_bias is not None)
    params = {"kernel": ctx.rows}
    if ctx.row_bias is not None:
        params["bias"] = ctx.row_bias
    return Converted(_linear_nll, _linear_top_k, params, cost)


def _vq(ctx: Context, arm: str, codes: int, seed: int, lr: float, config: Any) -> Converted:
    labels_too = arm.endswith("_labels")
    method, use_bias = VQ_ARMS[arm.removesuffix("_labels")]
    train = ctx.splits["train"]
    options = vq.ConvertConfig(
        num_codes=codes,
        method=method,
        use_bias=use_bias,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate[0] if labels_too else lr,
        reassign_every=config.reassign_every,
        seed=seed,
    )
    kmeans = "weighted_kmeans" if method == "likelihood" else method
    head, history = vq.fit_vq_head(
        ctx.rows,
        ctx.row_bias,
        train.hidden,
        train.targets,
        options,
        statistics=ctx.statistics,
        start=ctx.fit(kmeans, codes, seed, config.kmeans_iterations),
        mesh=ctx.mesh,
    )
    bias = jnp.zeros(ctx.vocab) if head.bias is None else head.bias[...]
    params = {"codebook": head.codebook[...], "bias": bias}
    assignment = head.assignment[...]
    curve = history["loss"]
    if labels_too:
        params, _, curve = vq.tune_head(
            vq.vq_label_loss,
            params,
            [train.hidden, train.labels],
            steps=config.steps,
            batch_size=config.batch_size,
            learning_rate=lr,
            constants={"assignment": assignment},
            seed=seed,
            mesh=ctx.mesh,
        )
        head.load(params["codebook"], params["bias"], assignment)
    floor = vq.perplexity_floor(assignment, np.asarray(ctx.unigram))
    tables = vq.vq_tables(params["bias"], assignment, codes, width=5)

    def nll(params: Any, hidden: Any, labels: Any) -> Any:
        return vq.vq_nll(hidden, params["codebook"], params["bias"], params["assignment"], labels)

    def top_k(params: Any, hidden: Any) -> Any:
        return vq.vq_topk(hidden, params["codebook"], params["tables"], 5).indices

    return Converted(
        nll,
        top_k,
        params | {"assignment": assignment, "tables": tables},
        cost_of(vq.VQHead, ctx.width, ctx.vocab, codes, use_bias=use_bias),
        floor.perplexity,
        tuple(curve),
        tuple(history["moved"]),
        head,
    )


def _linear_logits(params: Any, hidden: Any) -> Any:
    if "down" in params:
        return heads.low_rank_logits(hidden, params["down"], params["kernel"], params["bias"])
    return heads.linear_logits(hidden, params["kernel"], params.get("bias"), vocab_axis=0)


def _packed(tuned: Converted) -> Converted:
    """The same codes, two a byte: everything is measured with the logits that decoding has."""
    codebooks, codes = tuned.params["product"]
    params = {"codebooks": codebooks, "packed": vq.pack_codes(codes)}
    params["bias"] = tuned.params["bias"]

    def logits(params: Any, hidden: Any) -> Any:
        return vq.packed_logits(hidden, params["codebooks"], params["packed"], params["bias"])

    return dataclasses.replace(
        tuned,
        params=params,
        logits=logits,
        nll=lambda params, h, y: losses.cross_entropy(logits(params, h), y),
        top_k=lambda params, h: ops.top_k(logits(params, h), 5)[1],
        decode=None,
    )


def lookup_logits(params: Any, hidden: Any) -> Any:
    """Of a product-quantised head, by look-ups: the sums of `_linear_logits`, less to read."""
    return vq.product_logits(hidden, *params["product"], params["bias"])


def _lookup_top_k(params: Any, hidden: Any) -> Any:
    return ops.top_k(lookup_logits(params, hidden), 5)[1]


def _linear_nll(params: Any, hidden: Any, labels: Any) -> Any:
    hidden = hidden @ params["down"] if "down" in params else hidden
    head = losses.Head(params["kernel"], params.get("bias"), vocab_axis=0)
    return losses.linear_cross_entropy(hidden, head, labels)


def _linear_top_k(params: Any, hidden: Any) -> Any:
    return ops.top_k(_linear_logits(params, hidden), 5)[1]


def _low_rank(ctx: Context, rank: int) -> tuple[Any, Any, Any, Any]:
    down, kernel, bias = heads.fit_low_rank(
        ctx.rows, ctx.unigram, ctx.statistics.mean, ctx.statistics.cov, rank, row_bias=ctx.row_bias
    )
    params = {"down": down, "kernel": kernel, "bias": bias}
    cost = cost_of(heads.LowRankHead, ctx.width, ctx.vocab, rank)
    return params, {}, lambda params, constants: params, cost


def _product(
    ctx: Context, seed: int, config: Any, *, packed: bool = False
) -> tuple[Any, Any, Any, Any]:
    groups = config.packed_groups if packed else config.product_groups
    num_codes = min(16 if packed else config.product_codes, ctx.vocab)
    codebooks, codes = vq.fit_product_codes(
        ctx.rows,
        ctx.unigram,
        ctx.statistics.cov,
        groups=groups,
        num_codes=num_codes,
        key=jax.random.key(seed),
        iterations=config.kmeans_iterations,
    )
    kernel = vq.product_kernel(codebooks, codes)
    bias = (ctx.rows - kernel) @ ctx.statistics.mean
    bias = bias if ctx.row_bias is None else bias + ctx.row_bias

    def effective(params: Any, constants: Any) -> Any:
        product = (params["codebooks"], constants["codes"])
        rows = vq.product_kernel(*product)
        return {"kernel": rows, "bias": params["bias"], "product": product}

    shape: Any = dict(groups=groups, num_codes=num_codes, packed=packed)
    cost = cost_of(vq.ProductHead, ctx.width, ctx.vocab, **shape)
    return {"codebooks": codebooks, "bias": bias}, {"codes": codes}, effective, cost


def _linear(
    ctx: Context,
    arm: str,
    seed: int,
    lr: float,
    config: Any,
    params: Any,
    constants: Any,
    effective: Callable[..., Any],
    cost: heads.HeadCost,
) -> Converted:
    """Heads that are a kernel in the end: tuned to the old head's distribution, as VQ heads are."""
    train = ctx.splits["train"]
    targets = train.targets

    def loss(params: Any, constants: Any, hidden: Any, probs: Any, tokens: Any) -> Any:
        real = effective(params, constants)
        sums = constants["rest"]
        if "down" in real:
            hidden, sums = hidden @ real["down"], sums @ real["down"]
        kernel, bias = real["kernel"], real["bias"]
        first = tokens[:, 0]
        nll = losses.linear_cross_entropy(hidden, losses.Head(kernel, bias, vocab_axis=0), first)
        logits = jnp.einsum("nd,nkd->nk", hidden, kernel[tokens]) + bias[tokens]
        far = (kernel * sums).sum() + (bias * constants["rest_counts"]).sum()
        return nll + logits[:, 0] - (probs * logits).sum(-1) - far

    # Fewer of the top tokens: their rows are gathered, which VQ heads need not do.
    top = min(16, targets.top_tokens.shape[1])
    probs, tokens = targets.top_probs, targets.top_tokens
    constants = constants | _rest_without_top(ctx, train, top)
    params, _, curve = vq.tune_head(
        loss,
        params,
        [train.hidden, probs[:, :top], tokens[:, :top]],
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=lr,
        constants=constants,
        seed=seed,
        mesh=ctx.mesh,
    )
    real = jax.jit(effective)(params, constants)
    return Converted(
        _linear_nll,
        _linear_top_k,
        real,
        cost,
        curve=tuple(loss - targets.entropy for loss in curve),
        logits=_linear_logits,
        decode=_lookup_top_k if "product" in real else None,
    )


def _rest_without_top(ctx: Context, train: Split, top: int) -> dict[str, jax.Array]:
    """What lies outside the first ``top`` tokens of each position, over all positions."""
    import scipy.sparse

    targets, count = train.targets, len(train.labels)
    probs, tokens = targets.top_probs[:, :top], targets.top_tokens[:, :top]
    places = np.repeat(np.arange(count), top)
    kept = scipy.sparse.csr_matrix(
        (probs.reshape(-1), (tokens.reshape(-1), places)), shape=(ctx.vocab, count)
    )
    sums = targets.sums - kept @ np.asarray(train.hidden)
    counts = targets.counts - np.asarray(kept.sum(1))[:, 0]
    return {"rest": jnp.asarray(sums / count), "rest_counts": jnp.asarray(counts / count)}


def _adaptive(ctx: Context, seed: int, lr: float, config: Any) -> Converted:
    """On labels: its log-probabilities are not linear in anything the old head's sums hold."""
    train, vocab = ctx.splits["train"], ctx.vocab
    options = heads.AdaptiveConfig(
        vocab_size=vocab,
        hidden_size=ctx.width,
        cutoffs=(vocab // 24, vocab // 5),
        div_value=config.adaptive_div,
    )
    params = heads.fit_adaptive_softmax(
        options, ctx.rows, ctx.unigram, ctx.statistics.mean, ctx.statistics.cov
    )
    tables = {name: params.pop(name) for name in ("order", "rank")}
    params, _, curve = vq.tune_head(
        lambda params, tables, h, y: heads.adaptive_nll(h, params | tables, y),
        params,
        [train.hidden, train.labels],
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=lr,
        constants=tables,
        seed=seed,
        mesh=ctx.mesh,
    )
    ranks = np.asarray(tables["rank"])[train.labels]
    labels_in = [float(((ranks >= start) & (ranks < stop)).mean()) for start, stop in options.tails]
    head = heads.AdaptiveHead(options, ctx.unigram, params=params | tables, rngs=nnx.Rngs(0))
    return Converted(
        lambda params, h, y: heads.adaptive_nll(h, params, y),
        lambda params, h: heads.adaptive_topk(h, params, 5).indices,
        params | tables,
        head.cost(labels_in=labels_in),
        curve=tuple(curve),
    )


def _full(ctx: Context, arm: str, seed: int, lr: float, config: Any) -> Converted:
    """Controls: what tuning a full head on the labels of the same text gives by itself."""
    train = ctx.splits["train"]
    bias = jnp.zeros(ctx.vocab) if ctx.row_bias is None else ctx.row_bias
    params: dict[str, Any] = {"bias": bias}
    constants: dict[str, Any] = {}
    (params if arm == "full_labels" else constants)["kernel"] = ctx.rows
    params, _, curve = vq.tune_head(
        lambda params, constants, h, y: _linear_nll(params | constants, h, y),
        params,
        [train.hidden, train.labels],
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=lr,
        constants=constants,
        seed=seed,
        mesh=ctx.mesh,
    )
    cost = _full_cost(ctx, bias=True)
    return Converted(_linear_nll, _linear_top_k, params | constants, cost, curve=tuple(curve))

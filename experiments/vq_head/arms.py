"""Converting one head into each of its cheaper relatives, all with the same budget."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.vq_head.adaptive import AdaptiveConfig, adaptive_cost, adaptive_nll, adaptive_topk
from experiments.vq_head.data import Context
from logitjax import heads, losses, ops, vq

#: Mapping and bias of the VQ arms.
VQ_ARMS: Mapping[str, tuple[Any, bool]] = {
    "vq_paper": ("kmeans", False),
    "vq_plain": ("weighted_kmeans", False),
    "vq_random": ("random", True),
    "vq_bias": ("weighted_kmeans", True),
    "vq_likelihood": ("likelihood", True),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of one arm: its size, its seed, its peak learning rate."""

    arm: str
    codes: int
    seed: int
    rate: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """A converted head as functions of arrays.

    Attributes:
        nll: `(arrays, hidden, labels) -> [n]`.
        top_k: `(arrays, hidden) -> tokens [n, 5]`.
        params: Arrays that training would train.
        given: The other arrays.
        cost: Counted, not timed.
        trains: Whether training it is of interest; not for a screen with exact rows, which has
            nothing of its own to train, nor for packed codes, which train like unpacked ones.
        floor: For a VQ head, a lower bound of its perplexity without bias.
        curve: Training loss by step.
        moved: Tokens that changed their code, by reassignment.
        head: The module, if it is a VQ head.
        logits: `(arrays, hidden) -> [n, vocab]`, for a head that can screen.
        lookup: Like `logits`, if decoding computes the same numbers differently.
        decode: Like `top_k`, computed that way.
    """

    nll: Callable[..., Any]
    top_k: Callable[..., Any]
    params: Mapping[str, Any]
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cost: heads.HeadCost
    trains: bool = True
    floor: float | None = None
    curve: tuple[float, ...] = ()
    moved: tuple[float, ...] = ()
    head: Any = None
    logits: Callable[..., Any] | None = None
    lookup: Callable[..., Any] | None = None
    decode: Callable[..., Any] | None = None

    @property
    def arrays(self) -> dict[str, Any]:
        return {**self.params, **self.given}


def convert(ctx: Context, trial: Trial) -> Converted:
    """Fits and tunes one arm."""
    return FITS[trial.arm](ctx, trial)


def full(ctx: Context) -> Converted:
    """The original head."""
    params = {"kernel": ctx.rows}
    if ctx.row_bias is not None:
        params["bias"] = ctx.row_bias
    return _linear(params, {}, _full_cost(ctx, bias=ctx.row_bias is not None))


def tune(
    ctx: Context,
    trial: Trial,
    loss: Callable[..., Any],
    params: Any,
    arrays: list[np.ndarray],
    constants: Any,
) -> tuple[Any, tuple[float, ...]]:
    """Tuned parameters and the loss by step, with the budget that all arms share."""
    tuning = _tuning(ctx, trial)
    params, curve, _ = tuning.run(loss, params, arrays, constants=constants, mesh=ctx.mesh)
    return params, tuple(curve)


def _tuning(ctx: Context, trial: Trial) -> vq.Tuning:
    config = ctx.config
    return vq.Tuning(
        steps=config.steps, batch_size=config.batch_size, learning_rate=trial.rate, seed=trial.seed
    )


def cost_of(head: Callable[..., Any], *sizes: int, **options: Any) -> heads.HeadCost:
    """The cost of a head of these sizes, without making its arrays."""
    return nnx.eval_shape(lambda: head(*sizes, **options, rngs=nnx.Rngs(0))).cost()


def label_loss(params: Any, constants: Any, hidden: Any, labels: Any) -> jax.Array:
    """Cross-entropy of a VQ head on the labels."""
    return vq.vq_nll(
        hidden, params["codebook"], params.get("bias"), constants["assignment"], labels
    )


def product_codes(ctx: Context, groups: int, num_codes: int, seed: int) -> vq.ProductCodes:
    """Codes of the old rows, and a bias that corrects their error at the mean state."""
    result = vq.ProductCodes.fit(
        ctx.rows,
        ctx.unigram,
        ctx.statistics.cov,
        groups=groups,
        num_codes=min(num_codes, ctx.vocab),
        key=jax.random.key(seed),
        iterations=ctx.config.kmeans_iterations,
    )
    bias = (ctx.rows - result.kernel()) @ ctx.statistics.mean
    bias = bias if ctx.row_bias is None else bias + ctx.row_bias
    return dataclasses.replace(result, bias=bias)


def _vq(ctx: Context, trial: Trial) -> Converted:
    config, train, codes = ctx.config, ctx.splits["train"], trial.codes
    method, use_bias = VQ_ARMS[trial.arm]
    options = vq.ConvertConfig(
        num_codes=codes,
        use_bias=use_bias,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=trial.rate,
        reassign_every=config.reassign_every if method == "likelihood" else 0,
        seed=trial.seed,
    )
    head, history = options.fit(
        losses.Head(ctx.rows, ctx.row_bias, vocab_axis=0),
        train.hidden,
        train.targets,
        statistics=ctx.statistics,
        start=ctx.fit("weighted_kmeans" if method == "likelihood" else method, codes, trial.seed),
        mesh=ctx.mesh,
    )
    bias = jnp.zeros(ctx.vocab) if head.bias is None else head.bias[...]
    params = {"codebook": head.codebook[...], "bias": bias}
    assignment = head.assignment[...]
    tables = vq.VQTables.of(params["bias"], assignment, codes, width=5)

    def top_k(arrays: Any, hidden: Any) -> Any:
        return arrays["tables"].top_k(hidden, arrays["codebook"], 5).indices

    return Converted(
        nll=lambda arrays, hidden, labels: label_loss(arrays, arrays, hidden, labels),
        top_k=top_k,
        params=params,
        given={"assignment": assignment, "tables": tables},
        cost=cost_of(vq.VQHead, ctx.width, ctx.vocab, codes, use_bias=use_bias),
        floor=vq.perplexity_floor(assignment, np.asarray(ctx.unigram)).perplexity,
        curve=tuple(history["loss"]),
        moved=tuple(history["moved"]),
        head=head,
    )


def _linear_logits(arrays: Any, hidden: Any) -> Any:
    return losses.Head(arrays["kernel"], arrays.get("bias"), vocab_axis=0).logits(hidden)


def _linear_nll(arrays: Any, hidden: Any, labels: Any) -> Any:
    head = losses.Head(arrays["kernel"], arrays.get("bias"), vocab_axis=0)
    return losses.linear_cross_entropy(hidden, head, labels)


def _top_5(logits: Callable[..., Any]) -> Callable[..., Any]:
    return lambda arrays, hidden: ops.top_k(logits(arrays, hidden), 5)[1]


def _linear(params: Any, given: Any, cost: heads.HeadCost, **changes: Any) -> Converted:
    return Converted(
        nll=_linear_nll,
        top_k=_top_5(_linear_logits),
        params=params,
        given=given,
        cost=cost,
        logits=_linear_logits,
        **changes,
    )


def _product(ctx: Context, trial: Trial) -> Converted:
    config, packed = ctx.config, trial.arm == "packed_product"
    groups = config.packed_groups if packed else config.product_groups
    fit = product_codes(ctx, groups, 16 if packed else config.product_codes, trial.seed)

    def head_of(params: Any, codes: Any) -> losses.Head:
        rows = vq.ProductCodes(params["codebooks"], codes).kernel()
        return losses.Head(rows, params["bias"], vocab_axis=0)

    start = {"codebooks": fit.codebooks, "bias": fit.bias}
    train, tuning = ctx.splits["train"], _tuning(ctx, trial)
    sample = (train.hidden, train.targets)
    params, curve = tuning.imitate(head_of, start, *sample, ctx.mesh, constants=fit.codes)
    num_codes = fit.codebooks.shape[1]
    shape: Any = dict(groups=groups, num_codes=num_codes, packed=packed)
    cost = cost_of(vq.ProductHead, ctx.width, ctx.vocab, **shape)
    tuned = vq.ProductCodes(params["codebooks"], fit.codes, params["bias"])
    if packed:
        return _packed(tuned, cost, tuple(curve))

    def lookup(arrays: Any, hidden: Any) -> Any:
        """The sums of `_linear_logits`, with less to read."""
        return dataclasses.replace(arrays["product"], bias=arrays["bias"]).logits(hidden)

    real = {"kernel": jax.jit(vq.ProductCodes.kernel)(tuned), "bias": params["bias"]}
    given = {"product": dataclasses.replace(tuned, bias=None)}
    ways: Any = dict(lookup=lookup, decode=_top_5(lookup))
    return _linear(real, given, cost, curve=tuple(curve), **ways)


def _packed(codes: vq.ProductCodes, cost: heads.HeadCost, curve: tuple[float, ...]) -> Converted:
    """The same codes, two a byte; everything is measured with the logits used in decoding."""

    def logits(arrays: Any, hidden: Any) -> Any:
        return arrays["packed"].logits(hidden)

    return Converted(
        nll=lambda arrays, h, y: losses.cross_entropy(logits(arrays, h), y),
        top_k=_top_5(logits),
        params={},
        given={"packed": codes.packed()},
        cost=cost,
        trains=False,
        curve=curve,
        logits=logits,
    )


def _adaptive(ctx: Context, trial: Trial) -> Converted:
    """Trained on labels: its log-probabilities are not linear in the old head's sums."""
    train, vocab = ctx.splits["train"], ctx.vocab
    options = AdaptiveConfig(
        vocab_size=vocab,
        hidden_size=ctx.width,
        cutoffs=(vocab // 24, vocab // 5),
        div_value=ctx.config.adaptive_div,
    )
    params = options.fit(ctx.rows, ctx.unigram, ctx.statistics.mean, ctx.statistics.cov)
    tables = {name: params.pop(name) for name in ("order", "rank")}
    params, curve = tune(
        ctx,
        trial,
        lambda params, tables, h, y: adaptive_nll(h, params | tables, y),
        params,
        [train.hidden, train.labels],
        tables,
    )
    ranks = np.asarray(tables["rank"])[train.labels]
    labels_in = [float(((ranks >= start) & (ranks < stop)).mean()) for start, stop in options.tails]
    return Converted(
        nll=lambda arrays, h, y: adaptive_nll(h, arrays, y),
        top_k=lambda arrays, h: adaptive_topk(h, arrays, 5).indices,
        params=params,
        given=tables,
        cost=adaptive_cost(params, tables, labels_in),
        curve=curve,
    )


def _full_cost(ctx: Context, *, bias: bool) -> heads.HeadCost:
    if ctx.tied:
        start = jnp.zeros(ctx.vocab) if bias else None
        return heads.TiedHead(bias=start).cost(ctx.rows)
    return cost_of(heads.LinearHead, ctx.width, ctx.vocab, use_bias=bias)


def _full(ctx: Context, trial: Trial) -> Converted:
    """The control: the effect of tuning a full head's biases on the labels of the text."""
    train, constants = ctx.splits["train"], {"kernel": ctx.rows}
    params = {"bias": jnp.zeros(ctx.vocab) if ctx.row_bias is None else ctx.row_bias}
    params, curve = tune(
        ctx,
        trial,
        lambda params, constants, h, y: _linear_nll(params | constants, h, y),
        params,
        [train.hidden, train.labels],
        constants,
    )
    return _linear(params | constants, {}, _full_cost(ctx, bias=True), curve=curve)


#: The fitting function of each arm.
FITS: Mapping[str, Callable[[Context, Trial], Converted]] = {
    **dict.fromkeys(VQ_ARMS, _vq),
    **dict.fromkeys(("product", "packed_product"), _product),
    "adaptive": _adaptive,
    "full_bias_labels": _full,
}

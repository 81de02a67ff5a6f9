"""Converting one head into each of its cheaper relatives, all with the same budget."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from experiments.vq_head.adaptive import AdaptiveConfig, adaptive_cost, adaptive_nll, adaptive_topk
from experiments.vq_head.data import Context
from logitjax import heads, losses, ops, vq

#: Mapping and bias of the VQ arms.
VQ_ARMS: Mapping[str, tuple[Any, bool]] = {
    "vq_paper": ("kmeans", False),
    "vq_plain": ("weighted_kmeans", False),
    "vq_bias": ("weighted_kmeans", True),
}
TOP = 5


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
        outputs: `(arrays, hidden, labels) -> losses [n], tokens [n, 5]`.
        decode: `(arrays, hidden) -> tokens [n, 5]`, as when decoding.
        cost: Counted, not timed.
        compiled: Whether the functions are JAX's.
        floor: For a VQ head, a lower bound of its perplexity without bias.
        curve: Loss by step of a VQ head's tuning.
        head: The module, if it is one of the library.
        sure: `(arrays, hidden) -> [n]`, whether the best token is certain without a full read.
    """

    outputs: Callable[..., Any]
    decode: Callable[..., Any]
    arrays: Any
    cost: heads.HeadCost
    compiled: bool = True
    floor: float | None = None
    curve: tuple[float, ...] = ()
    head: Any = None
    sure: Callable[..., Any] | None = None


#: Heads by the name of their rows in tables; the first one chooses the learning rate.
Variants = dict[str, Converted]


def of_logits(logits: Callable[..., Any], arrays: Any, cost: heads.HeadCost) -> Converted:
    """A head that is its logits, `(arrays, hidden) -> [n, vocab]`."""

    def outputs(arrays: Any, hidden: Any, labels: Any) -> Any:
        scores = logits(arrays, hidden)
        return losses.cross_entropy(scores, labels), ops.top_k(scores, TOP)[1]

    def decode(arrays: Any, hidden: Any) -> Any:
        return ops.top_k(logits(arrays, hidden), TOP)[1]

    return Converted(outputs=outputs, decode=decode, arrays=arrays, cost=cost)


def of_head(ctx: Context, head: Any) -> Converted:
    """A head of the library, which scores again with the old rows."""
    graphdef, state = nnx.split(head)
    rows, exact = ctx.rows, isinstance(head, vq.ScreenedHead)
    certified = exact and head.errors is not None
    options: dict[str, Any] = {"with_log_z": False} if exact else {}

    def outputs(arrays: Any, hidden: Any, labels: Any) -> Any:
        head = nnx.merge(graphdef, arrays["head"])
        scores = head(hidden, arrays["rows"])
        tokens = head.top_k(hidden, TOP, arrays["rows"], **options).indices
        return losses.cross_entropy(scores, labels), tokens

    def decode(arrays: Any, hidden: Any) -> Any:
        head = nnx.merge(graphdef, arrays["head"])
        return head.top_k(hidden, TOP, arrays["rows"], **options).indices

    def sure(arrays: Any, hidden: Any) -> Any:
        return nnx.merge(graphdef, arrays["head"]).certified(hidden, 1, arrays["rows"])

    cost = head.cost(rows)
    if not ctx.tied and getattr(head, "rows", True) is None:
        # Rows that score again have to be kept where no embedding is.
        cost = dataclasses.replace(cost, stored_bytes=cost.stored_bytes + rows.nbytes)
    return Converted(
        outputs=outputs,
        decode=decode,
        arrays={"head": state, "rows": rows},
        cost=cost,
        head=head,
        sure=sure if certified else None,
    )


def full(ctx: Context) -> Converted:
    """The original head."""
    arrays = {"kernel": ctx.rows, "bias": ctx.row_bias}
    return of_logits(_linear_logits, arrays, cost_of(ctx, ctx.rows.nbytes))


@functools.lru_cache(maxsize=1)
def references(ctx: Context) -> Variants:
    """Heads that every other one is timed beside."""
    return {"float32": full(ctx), "bf16": _narrow(ctx), "int8": _eight_bits(ctx)}


def _narrow(ctx: Context) -> Converted:
    rows = jax.jit(lambda rows: rows.astype(jnp.bfloat16))(ctx.rows)

    def logits(arrays: Any, hidden: Any) -> Any:
        # On a CPU, a bfloat16 product of one row takes ten times as long as one of two.
        twice = jnp.concatenate([hidden, hidden]) if len(hidden) == 1 else hidden
        scores = _linear_logits(arrays, twice.astype(jnp.bfloat16))
        return scores[: len(hidden)].astype(jnp.float32)

    return of_logits(logits, {"kernel": rows, "bias": ctx.row_bias}, cost_of(ctx, rows.nbytes))


def _eight_bits(ctx: Context) -> Converted:
    codes = jax.jit(lambda rows: ops.Codes.of(rows, "int8"))(ctx.rows)

    def logits(arrays: Any, hidden: Any) -> Any:
        scores = arrays["codes"].product(hidden)
        return scores if arrays["bias"] is None else scores + arrays["bias"]

    arrays = {"codes": codes, "bias": ctx.row_bias}
    return of_logits(logits, arrays, cost_of(ctx, codes.nbytes))


def cost_of(ctx: Context, stored: float, read: float | None = None) -> heads.HeadCost:
    """The cost of a head that is known by its bytes."""
    size = ctx.rows.size
    return heads.HeadCost(
        parameters=size,
        stored_bytes=int(stored),
        read_bytes=int(stored if read is None else read),
        decode_flops=2 * size,
        train_flops=6 * size,
    )


def _linear_logits(arrays: Any, hidden: Any) -> Any:
    return losses.Head(arrays["kernel"], arrays["bias"], vocab_axis=0).logits(hidden)


def label_loss(params: Any, constants: Any, hidden: Any, labels: Any) -> jax.Array:
    """Cross-entropy of a VQ head on the labels."""
    return vq.vq_nll(
        hidden, params["codebook"], params.get("bias"), constants["assignment"], labels
    )


def _fit(ctx: Context, trial: Trial, kind: Any, start: Any = None, **options: Any) -> Any:
    """A head of the library, with the budget that all arms share, and the loss by step."""
    config, train = ctx.config, ctx.splits["train"]
    convert = vq.ConvertConfig(
        kind=kind,
        kmeans_iterations=config.kmeans_iterations,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=trial.rate,
        seed=trial.seed,
        candidates=config.candidates[0],
        **options,
    )
    return convert.fit(
        losses.Head(ctx.rows, ctx.row_bias, vocab_axis=0),
        train.hidden,
        train.targets,
        statistics=ctx.statistics,
        start=start,
        mesh=ctx.mesh,
    )


def _vq(ctx: Context, trial: Trial) -> Variants:
    method, use_bias = VQ_ARMS[trial.arm]
    head, curve = _fit(
        ctx,
        trial,
        "vq",
        num_codes=trial.codes,
        use_bias=use_bias,
        start=ctx.fit(method, trial.codes, trial.seed),
    )
    assignment = head.assignment[...]
    bias = jnp.zeros(ctx.vocab) if head.bias is None else head.bias[...]
    arrays = {"codebook": head.codebook[...], "bias": bias, "assignment": assignment}
    arrays["tables"] = vq.VQTables.of(bias, assignment, trial.codes, width=TOP)

    def decode(arrays: Any, hidden: Any) -> Any:
        return arrays["tables"].top_k(hidden, arrays["codebook"], TOP).indices

    def outputs(arrays: Any, hidden: Any, labels: Any) -> Any:
        return label_loss(arrays, arrays, hidden, labels), decode(arrays, hidden)

    made = Converted(
        outputs=outputs,
        decode=decode,
        arrays=arrays,
        cost=head.cost(),
        floor=vq.perplexity_floor(assignment, np.asarray(ctx.unigram)).perplexity,
        curve=tuple(curve),
        head=head,
    )
    return {trial.arm: made}


def _screens(
    ctx: Context, name: str, screen: Any, counts: Sequence[int], tail: float = 0.0
) -> Variants:
    """A head of the library, and with exact rows for each number of candidates."""
    made, more = {name: of_head(ctx, screen)}, {"row_bias": ctx.row_bias, "tail": tail}
    for count in counts:
        head = vq.ScreenedHead(screen, num_candidates=count, **more)
        made[f"{name}+{count}"] = of_head(ctx, head)
    return made


def _screened(ctx: Context, trial: Trial) -> Variants:
    head = _fit(ctx, trial, "screened")[0]
    # Much the same number for few candidates and many.
    return _screens(ctx, "packed", head.screen, ctx.config.candidates, head.tail or 0.0)


def _rounded(ctx: Context, trial: Trial) -> Variants:
    counts = ctx.config.candidates[1:2] if trial.arm == "int4" else ()
    return _screens(ctx, trial.arm, _fit(ctx, trial, trial.arm)[0], counts)


def _as_fitted(ctx: Context, trial: Trial) -> Variants:
    return {trial.arm: of_head(ctx, _fit(ctx, trial, trial.arm)[0])}


def _paged(ctx: Context, trial: Trial) -> Variants:
    shared = _as_fitted(ctx, trial)["paged"]

    def outputs(arrays: Any, *positions: Any) -> Any:
        def alone(position: Any) -> Any:
            return shared.outputs(arrays, *jax.tree.map(lambda x: x[None], position))

        return jax.tree.map(lambda x: x[:, 0], lax.map(alone, positions, batch_size=16))

    return {"paged": shared, "paged alone": dataclasses.replace(shared, outputs=outputs)}


def _adaptive(ctx: Context, trial: Trial) -> Variants:
    """Trained on labels: its log-probabilities are not linear in the old head's sums."""
    train, vocab, config = ctx.splits["train"], ctx.vocab, ctx.config
    options = AdaptiveConfig(
        vocab_size=vocab,
        hidden_size=ctx.width,
        cutoffs=(vocab // 24, vocab // 5),
        div_value=config.adaptive_div,
    )
    params = options.fit(ctx.rows, ctx.unigram, ctx.statistics.mean, ctx.statistics.cov)
    tables = {name: params.pop(name) for name in ("order", "rank")}
    tuning = vq.Tuning(
        steps=config.steps, batch_size=config.batch_size, learning_rate=trial.rate, seed=trial.seed
    )
    params, _ = tuning.run(
        lambda params, tables, h, y: adaptive_nll(h, params | tables, y),
        params,
        [train.hidden, train.labels],
        constants=tables,
        mesh=ctx.mesh,
    )

    def decode(arrays: Any, hidden: Any) -> Any:
        return adaptive_topk(hidden, arrays, TOP)

    made = Converted(
        outputs=lambda arrays, h, y: (adaptive_nll(h, arrays, y), decode(arrays, h)),
        decode=decode,
        arrays=params | tables,
        cost=adaptive_cost(params, tables),
    )
    return {"adaptive": made}


#: The fitting function of each arm that the library or this folder has a head for.
FITS: dict[str, Callable[[Context, Trial], Variants]] = {
    **dict.fromkeys(VQ_ARMS, _vq),
    "full": lambda ctx, _: {"full": full(ctx)},
    "bf16": lambda ctx, _: {"bf16": references(ctx)["bf16"]},
    "int8_plain": lambda ctx, _: {"int8_plain": references(ctx)["int8"]},
    **dict.fromkeys(("int8", "int4"), _rounded),
    "screened": _screened,
    "certified": _as_fitted,
    "paged": _paged,
    "adaptive": _adaptive,
}
#: Arms that no learning rate changes.
UNTUNED = ("full", "bf16", "int8_plain", "certified", "flash", "svd", "faiss")

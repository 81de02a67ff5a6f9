"""A small language model trained from scratch with each head; the trunk is the same."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from experiments.shared.small_text import Text, small_text
from experiments.vq_head.context import Context
from logitjax import heads, losses, models, training, vq

ARMS = (
    "full_bias",
    "full",
    "vq_bias",
    "vq_reassigned",
    "vq_random",
    "vq_plain",
    "low_rank",
    "adaptive",
)


def shape_of(vocab: int, width: int) -> models.DecoderConfig:
    """The model that every head is trained with: two layers."""
    return models.DecoderConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        tie_embeddings=False,
    )


def train(ctx: Context, text: Text, arm: str, seed: int, lr: float, config: Any) -> dict[str, Any]:
    """Trains one model and returns its held-out loss, the time of a step, and the curve."""
    vocab, width = len(text.unigram), config.scratch_width
    shape = shape_of(vocab, width)
    codes = max(2, vocab // 16)
    head, nll = _head(ctx, text, arm, codes, width, seed)
    trunk = models.Decoder(shape, rngs=nnx.Rngs(seed), head=nnx.Module())
    graphdef, params, rest = nnx.split(trunk, nnx.Param, ...)
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, 20, max(21, config.scratch_steps))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def hidden_of(trunk_params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, trunk_params, rest)
        return model.hidden_states(tokens)[0][:, :-1]

    def loss_fn(
        params: Mapping[str, Any], batch: Mapping[str, Any], rng: Any, fixed: Any
    ) -> tuple[Any, Any, dict]:
        hidden = hidden_of(params["trunk"], batch["tokens"])
        mask = batch["mask"][:, 1:]
        losses_ = nll(params["head"], fixed, hidden, batch["tokens"][:, 1:])
        return (losses_ * mask).sum(), mask.sum(), {}

    mesh = ctx.mesh
    start = {"trunk": nnx.to_pure_dict(params), "head": head["params"]}
    state = training.create_train_state(start, tx, mesh=mesh, seed=seed)
    step = training.make_train_step(loss_fn, tx, mesh=mesh)
    share = training.local_rows(mesh, config.scratch_batch)
    everywhere = NamedSharding(mesh, PartitionSpec())
    fixed = jax.device_put(head["fixed"], everywhere)
    curve = []
    for index in range(config.scratch_steps):
        batch = text.batch(index, seed=seed, size=config.scratch_batch)
        batch = {name: rows[share] for name, rows in batch.items()}
        state, output = step(state, batch, fixed)
        if index % 10 == 0 or index == config.scratch_steps - 1:
            total, count = output.metrics["loss"]
            curve.append((index, float(total) / float(count)))
        halves = {config.scratch_steps // 3, 2 * config.scratch_steps // 3}
        if arm == "vq_reassigned" and index in halves:
            run = jax.jit(hidden_of)
            state, fixed = _reassigned(state, fixed, run, text, config, everywhere)
    evaluate = training.make_eval_step(loss_fn, mesh=mesh)

    def blocks(split: str) -> Iterator[dict[str, np.ndarray]]:
        for block in text.blocks(split):
            mine = training.local_rows(mesh, len(block["tokens"]))
            yield {name: rows[mine] for name, rows in block.items()}

    held_out = {
        name: training.evaluate(evaluate, state.params, blocks(split), fixed)["loss"]
        for name, split in (("validation_nll", "validation"), ("nll", "test"))
    }
    size = sum(x.size for x in jax.tree.leaves(head["params"]))
    return held_out | {"parameters": size, "curve": curve}


def _head(
    ctx: Context, text: Text, arm: str, codes: int, width: int, seed: int
) -> tuple[dict[str, Any], Callable[..., Any]]:
    vocab = len(text.unigram)
    key = jax.random.key(seed + 1000)
    log_unigram = jnp.log(jnp.asarray(text.unigram / text.unigram.sum(), jnp.float32))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * width**-0.5

    if arm in ("full", "full_bias"):
        params = {"kernel": normal(vocab, width)}
        if arm == "full_bias":
            params["bias"] = log_unigram
        return {"params": params, "fixed": {}}, _full_nll
    if arm == "low_rank":
        rank = max(1, codes * width // (vocab + width))
        params = {"down": normal(width, rank), "kernel": normal(vocab, rank), "bias": log_unigram}
        return {"params": params, "fixed": {}}, _full_nll
    if arm == "adaptive":
        config = heads.AdaptiveConfig(
            vocab_size=vocab, hidden_size=width, cutoffs=(vocab // 20, vocab // 4), div_value=4.0
        )
        params = heads.init_adaptive_softmax(key, config, jnp.asarray(text.unigram))
        tables = {name: params.pop(name) for name in ("order", "rank")}
        return {"params": params, "fixed": tables}, lambda params, fixed, h, y: heads.adaptive_nll(
            h, params | fixed, y
        )
    if arm == "vq_random":
        assignment = jax.random.permutation(key, jnp.arange(vocab) * codes // vocab)
    else:
        # Rows of the pretrained head: the map imports what it knows. Others share one mean row.
        rows = jnp.concatenate([ctx.rows[text.kept], ctx.rows.mean(0, keepdims=True)])
        assignment = vq.fit_assignment(
            rows,
            jnp.asarray(text.unigram, jnp.float32),
            ctx.statistics.mean,
            ctx.statistics.cov,
            codes,
            key=key,
            iterations=10,
        ).assignment
    params = {"codebook": normal(codes, width)}
    if arm != "vq_plain":
        params["bias"] = log_unigram
    return {"params": params, "fixed": {"assignment": assignment.astype(jnp.int32)}}, _vq_nll


def _full_nll(params: Any, fixed: Any, hidden: Any, labels: Any) -> Any:
    hidden = hidden @ params["down"] if "down" in params else hidden
    head = losses.Head(params["kernel"], params.get("bias"), vocab_axis=0)
    return losses.linear_cross_entropy(hidden, head, labels)


def _vq_nll(params: Any, fixed: Any, hidden: Any, labels: Any) -> Any:
    return vq.vq_nll(hidden, params["codebook"], params.get("bias"), fixed["assignment"], labels)


def _reassigned(
    state: Any, fixed: Any, run: Callable[..., Any], text: Text, config: Any, everywhere: Any
) -> tuple[Any, Any]:
    """Tokens move to the code under which their labels are most likely, by what was just seen."""
    rng = np.random.default_rng(int(state.step))
    hidden, labels = [], []
    for _ in range(config.scratch_reassign_batches):
        rows = rng.integers(0, len(text.train), config.scratch_batch)
        states = np.asarray(run(state.params["trunk"], text.train[rows]))
        mask = text.train_mask[rows][:, 1:]
        hidden.append(states[mask])
        labels.append(text.train[rows][:, 1:][mask])
    # On the host: every process does the same, on its own device.
    held = jax.tree.map(np.asarray, state.params["head"] | fixed)
    new, bias, _ = vq.reassign_from_labels(
        held["codebook"],
        held["bias"],
        held["assignment"],
        np.concatenate(hidden),
        np.concatenate(labels),
    )
    new, bias = jax.device_put((new, bias), everywhere)
    head = state.params["head"] | {"bias": bias}
    return state.replace(params=state.params | {"head": head}), {"assignment": new}


@functools.lru_cache(maxsize=1)
def text_of(ctx: Context, config: Any) -> Text:
    return small_text(ctx.packed, np.asarray(ctx.unigram), config.scratch_vocab)

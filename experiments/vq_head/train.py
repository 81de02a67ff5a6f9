"""A small language model trained from scratch with each head; the trunk is the same."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from experiments.shared import fit
from experiments.shared.records import Record
from experiments.vq_head import arms
from experiments.vq_head.adaptive import AdaptiveConfig, adaptive_nll
from experiments.vq_head.config import Config
from experiments.vq_head.data import Context, Text
from logitjax import losses, models, training, vq

#: `(params, given, hidden, labels)` to the loss of each position.
Nll = Callable[[Any, Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Head:
    """A head before training: its trained and its given arrays, and its loss."""

    params: Any
    given: Any
    nll: Nll


def make_trunk(config: Config, vocab: int, *, seed: int = 0, abstract: bool = False) -> Any:
    """The model that every head is trained with: `nnx.split` into graph, parameters and rest."""
    width = config.scratch_width
    shape = models.DecoderConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=3 * width,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=width // 4,
        tie_embeddings=False,
    )

    def build() -> models.Decoder:
        return models.Decoder(shape, rngs=nnx.Rngs(seed), head=nnx.Module())

    graphdef, params, rest = nnx.split(
        nnx.eval_shape(build) if abstract else build(), nnx.Param, ...
    )
    return graphdef, nnx.to_pure_dict(params), rest


def make_loss(graphdef: Any, rest: Any, nll: Nll) -> Callable[..., Any]:
    """Summed loss of a head and its trunk, for `training.TrainStep`."""

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any, given: Any) -> Any:
        model = nnx.merge(graphdef, params["trunk"], rest)
        hidden = model.hidden_states(batch["tokens"])[0][:, :-1]
        mask = batch["mask"][:, 1:]
        values = nll(params["head"], given, hidden, batch["tokens"][:, 1:])
        return (values * mask).sum(), mask.sum(), {}

    return loss_fn


def make_update(loss_fn: Callable[..., Any], config: Config, mesh: Any, rate: float) -> fit.Update:
    """The compiled update of a small model, whatever its head."""
    steps = max(21, config.scratch_steps)
    schedule = training.Schedule(rate, warmup=20, total_steps=steps, final=0.0)
    return fit.make_update(loss_fn, schedule, mesh=mesh, weight_decay=0.0, b2=0.999)


def train(ctx: Context, directory: epath.Path, arm: str, seed: int, rate: float) -> Record:
    """Trains one model; returns its held-out loss, the numbers in its head, and the curve."""
    logging.info("from scratch: %s, seed %d, learning rate %g", arm, seed, rate)
    config, text, mesh = ctx.config, ctx.text, ctx.mesh
    head = start_head(ctx, arm, seed)
    graphdef, trunk, rest = make_trunk(config, len(text.unigram), seed=seed)
    loss_fn = make_loss(graphdef, rest, head.nll)
    update = make_update(loss_fn, config, mesh, rate)
    state = update.start({"trunk": trunk, "head": head.params}, seed)
    given = update.rules.place(head.given, mesh)
    directory = directory / f"scratch_{arm}_{seed}_{rate:g}"
    writer = training.make_writer(directory)
    state = training.train_loop(
        state,
        lambda state, batch: update.step(state, batch, given),
        lambda step: fit.share(mesh, text.batch(step, seed=seed, size=config.scratch_batch)),
        total_steps=config.scratch_steps,
        writer=writer,
    )
    evaluate = training.EvalStep(loss_fn, mesh=mesh)

    def blocks(split: str, size: int = 16) -> Iterator[dict[str, np.ndarray]]:
        return (fit.share(mesh, block) for block in text.blocks(split, size))

    held_out: Record = {
        name: evaluate.means(state.params, blocks(split), given)["loss"]
        for name, split in (("validation_nll", "validation"), ("nll", "test"))
    }
    # Every device has to have a row.
    units = blocks("test", max(4, mesh.size))
    held_out["units"] = [evaluate.means(state.params, [one], given)["loss"] for one in units]
    size = sum(x.size for x in jax.tree.leaves(head.params))
    return held_out | {
        "arm": arm,
        "seed": seed,
        "lr": rate,
        "scratch": True,
        "parameters": size,
        "curve": fit.curve(directory),
    }


def start_head(ctx: Context, arm: str, seed: int) -> Head:
    """A head of a small model before training."""
    text, width = ctx.text, ctx.config.scratch_width
    vocab = len(text.unigram)
    codes = ctx.config.scratch_codes or codes_of(vocab)
    key = jax.random.key(seed + 1000)
    log_unigram = jnp.log(jnp.asarray(text.unigram / text.unigram.sum(), jnp.float32))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape) * width**-0.5

    if arm in ("full", "full_bias"):
        params = {"kernel": normal(vocab, width)}
        if arm == "full_bias":
            params["bias"] = log_unigram
        return Head(params, {}, _full_nll)
    if arm == "adaptive":
        config = AdaptiveConfig(
            vocab_size=vocab, hidden_size=width, cutoffs=(vocab // 20, vocab // 4), div_value=4.0
        )
        params = config.init(key, jnp.asarray(text.unigram))
        tables = {name: params.pop(name) for name in ("order", "rank")}
        return Head(params, tables, lambda params, given, h, y: adaptive_nll(h, params | given, y))
    if arm in ("vq_random", "random_map"):
        assignment = jax.random.permutation(key, jnp.arange(vocab) * codes // vocab)
    elif arm == "frequency_map":
        # Blocks of ranks that grow from single tokens, of about the same mass by Zipf's law.
        start = codes / np.log(vocab / codes)
        blocks = np.log1p(np.arange(vocab) / start) / np.log1p(vocab / start) * codes
        assignment = jnp.asarray(blocks)[np.argsort(np.argsort(-text.unigram, kind="stable"))]
    else:
        if arm == "neighbour_map":
            rows = _neighbours(text)
            mean, cov = np.zeros(rows.shape[1], np.float32), np.eye(rows.shape[1], dtype=np.float32)
        else:
            # Rows of the pretrained head: the map imports its knowledge. Others share a mean row.
            rows = jnp.concatenate([ctx.rows[text.kept], ctx.rows.mean(0, keepdims=True)])
            mean, cov = ctx.statistics.mean, ctx.statistics.cov
        unigram = jnp.asarray(text.unigram, jnp.float32)
        options: Any = dict(key=key, iterations=10)
        assignment = vq.fit_assignment(rows, unigram, mean, cov, codes, **options).assignment
    params = {"codebook": normal(codes, width)}
    if arm in ("vq_bias", "vq_random"):
        params["bias"] = log_unigram
    return Head(params, {"assignment": assignment.astype(jnp.int32)}, arms.label_loss)


def _neighbours(text: Text, most: int = 256) -> np.ndarray:
    """Roots of the shares with which the most frequent tokens precede each token."""
    column, most = np.full(len(text.unigram), -1), min(most, len(text.unigram))
    column[np.argsort(-text.unigram)[:most]] = np.arange(most)
    before, token = column[text.train[:, :-1]], text.train[:, 1:]
    where = text.train_mask[:, 1:] & (before >= 0)
    counts = np.zeros((len(column), most), np.float32)
    np.add.at(counts, (token[where], before[where]), 1)
    return np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def _full_nll(params: Any, given: Any, hidden: Any, labels: Any) -> Any:
    head = losses.Head(params["kernel"], params.get("bias"), vocab_axis=0)
    return losses.linear_cross_entropy(hidden, head, labels)


def codes_of(vocab: int) -> int:
    """Codes of a VQ head over a small vocabulary."""
    return max(2, vocab // 16)

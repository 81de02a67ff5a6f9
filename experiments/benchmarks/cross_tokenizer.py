"""Losses across tokenizers beside KL of one tokenizer: seconds and memory.

    python -m experiments.benchmark cross_tokenizer

Time and scratch memory are of a forward and backward pass to hidden states and head, float32. The
projections are synthetic: every token of the student stands for one of the teacher's, and tokens of
low ids for more of ours than others, like the short pieces of real vocabularies; the teacher's
other tokens count as such a piece.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import suite, timing
from logitjax import distillation, losses, ops

# (T, H, our V, their V): a small model with SmolLM2's vocabulary under Gemma's, and Qwen's.
SHAPES = ((1024, 576, 49152, 262144), (1024, 576, 152064, 49152))
# As wide: with a narrow head almost all the time would be the loss's.
SMOKE_SHAPES = ((64, 576, 8192, 16384),)
K = 64
PEERS = ("dense KL", "same tokenizer", "first_piece", "alm")
Shape = tuple[int, int, int, int]


def _projection(shape: Shape) -> distillation.TokenProjection:
    _, _, ours, other = shape
    rng = np.random.default_rng(0)
    # Most tokens exist on both sides; the rest gather on pieces of low ids.
    ids = np.where(np.arange(ours) < other, np.arange(ours), 0)
    moved = (rng.random(ours) < 0.06) | (np.arange(ours) >= other)
    ids = np.where(moved, (rng.random(ours) ** 3 * min(2048, other)).astype(np.int64), ids)
    local, pieces = np.arange(other), rng.random(other) ** 3 * min(2048, other)
    return distillation.TokenProjection(
        ids=ids[:, None].astype(np.int32),
        weights=np.ones((ours, 1), np.float32),
        size=other,
        merges=np.where(np.isin(local, ids), local, pieces).astype(np.int32),
    )


def _inputs(shape: Shape) -> dict[str, jax.Array]:
    tokens, width, ours, other = shape
    rng = np.random.default_rng(0)
    few = rng.standard_normal(1_000_003, np.float32)
    top = np.sort(rng.normal(size=(tokens, K)), axis=-1)[:, ::-1].astype(np.float32)
    return {
        "hidden": jnp.asarray(np.resize(few, (tokens, width))),
        "head": jnp.asarray(np.resize(few * np.float32(2 * width**-0.5), (width, ours))),
        "values": jnp.asarray(top),
        "same": jnp.asarray(_distinct(rng, tokens, ours)),
        "other": jnp.asarray(_distinct(rng, tokens, other)),
        "labels": jnp.asarray(rng.integers(0, ours, tokens)),
    }


def _distinct(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    start, step = rng.integers(0, vocab, (rows, 1)), rng.integers(1, vocab // K, (rows, 1))
    return ((start + step * np.arange(K)) % vocab).astype(np.int32)


def _top(inputs: Any, which: str) -> ops.TopK:
    return ops.TopK(inputs["values"], inputs[which], ops.logsumexp(inputs["values"]) + 0.1)


def step(shape: Shape, peer: str, projection: distillation.TokenProjection) -> Callable[[Any], Any]:
    """Mean loss with its gradients by the hidden states and the head."""
    tokens = np.arange(shape[0], dtype=np.int32)
    words = distillation.TokenSet(np.arange(shape[2]) % 3 == 0)
    vocabularies = distillation.Vocabularies(
        projections={"first_piece": projection}, boundary=words
    )
    present = np.ones(shape[0], bool)
    # Each token is a chunk, after which a word begins.
    chunks = distillation.ChunkScores(
        ids=tokens, ends=tokens, scores=np.full(shape[0], -1, np.float32), where=present
    )

    def loss(hidden: Any, head: Any, inputs: Any) -> Any:
        if peer == "dense KL":
            logits = hidden @ head
            # The student's memory in a dense loss across vocabularies.
            return losses.sparse_kl_divergence(logits, _top(inputs, "same")).mean()
        if peer == "same tokenizer":
            return losses.linear_sparse_kl_divergence(hidden, head, _top(inputs, "same")).mean()
        top = _top(inputs, "other")
        statistics = losses.GraphStatistics(values=top.values, indices=top.indices, log_z=top.log_z)
        teacher = distillation.Teacher(
            statistics=statistics, chunks=chunks, vocabularies=vocabularies
        )
        objective = distillation.Objective(terms=distillation.parse_terms([peer]))
        value, count, _ = objective.value(
            hidden, head, {"labels": inputs["labels"]}, [teacher], where=present
        )
        return value / count

    def run(inputs: Any) -> Any:
        return jax.value_and_grad(loss, (0, 1))(inputs["hidden"], inputs["head"], inputs)

    return run


def _measure(shape: Shape, options: suite.Options) -> list[dict[str, Any]]:
    inputs, projection = _inputs(shape), _projection(shape)
    peers = {peer: step(shape, peer, projection) for peer in PEERS}
    rows: list[dict[str, Any]] = []
    sizes = dict(zip(("T", "H", "ours", "theirs"), shape))
    for peer, function in peers.items():
        members = projection.capacity(K) if "first" in peer else None
        row = sizes | {"loss": peer, "members": members}
        rows.append(row | {"temp MiB": suite.temp_bytes(function, inputs) / 2**20})
    calls = {
        peer: functools.partial(jax.jit(function), inputs)
        for peer, function in peers.items()
        if peer != "dense KL"
    }
    seconds = timing.paired_seconds(calls, repeats=options.repeats)
    for row in rows:
        peer = row["loss"]
        if peer in seconds:
            row["seconds"] = sorted(seconds[peer])[len(seconds[peer]) // 2]
            row["/ same tokenizer"] = timing.paired_ratio(seconds[peer], seconds["same tokenizer"])
    return rows


def _bars(rows: list[dict[str, Any]]) -> list[suite.Bar]:
    bars = []
    for row in rows:
        if row["loss"] in ("dense KL", "same tokenizer"):
            continue
        where = f"{row['loss']}, V={row['ours']} from {row['theirs']}"
        bars.append(
            suite.at_most(f"{where}: seconds / same tokenizer", row["/ same tokenizer"], 1.3)
        )
        if row["ours"] >= 150_000:
            dense = next(r for r in rows if r["loss"] == "dense KL" and r["ours"] == row["ours"])
            # Student and teacher are dense elsewhere; only the student's half is counted here.
            share = row["temp MiB"] / dense["temp MiB"]
            bars.append(suite.at_most(f"{where}: scratch / dense", share, 0.1))
    return bars


def run(options: suite.Options) -> suite.Result:
    rows: list[dict[str, Any]] = []
    for shape in SMOKE_SHAPES if options.smoke else SHAPES:
        rows += _measure(shape, options)
    return suite.Result(rows=rows, bars=[] if options.smoke else _bars(rows))

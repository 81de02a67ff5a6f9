"""Losses across tokenizers beside KL of one tokenizer: seconds, memory, overlap of tokenizers.

    python -m experiments.benchmark cross_tokenizer

Time and scratch memory are of a forward and backward pass to hidden states and head, float32. The
projections are made up: every token of the student stands for one of the teacher's, tokens of low
ids for more of ours than others, as the short pieces of real vocabularies do; the teacher's others
count as such a piece. The second table is
of real tokenizers that are there (SmolLM2; Gemma after `make gemma`; GPT-2, Qwen and Llama 2 after
`make tokenizers`): chunks of a licence, of Markdown, of Python and of many scripts, against a slow
search.
"""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import _tokenizers
from experiments.shared import suite, timing
from logitjax import distillation, losses, models, ops

# (T, H, our V, their V): a small model with SmolLM2's vocabulary under Gemma's, and Qwen's.
SHAPES = ((1024, 576, 49152, 262144), (1024, 576, 152064, 49152))
# As wide: with a narrow head the loss is all there is to time.
SMOKE_SHAPES = ((64, 576, 8192, 16384),)
K = 64
PEERS = ("dense KL", "same tokenizer", "first_piece", "alm")
TEXTS = {"licence": "LICENSE", "Markdown": "docs/distil.md", "Python": "experiments/benchmark.py"}
# Characters of two to four bytes, which vocabularies cut inside.
SCRIPTS = "naïve Straße 🙂 東京の夜 Ωμέγα مرحبا नमस्ते 𝛼𝛽 한국어 👩‍🚀\n"
GEMMA = ".cache/models/gemma-3-270m.gguf"

Shape = tuple[int, int, int, int]


def _projection(shape: Shape) -> distillation.TokenProjection:
    _, _, ours, theirs = shape
    rng = np.random.default_rng(0)
    # Most tokens are there on both sides; the rest gather on pieces of low ids.
    ids = np.where(np.arange(ours) < theirs, np.arange(ours), 0)
    moved = (rng.random(ours) < 0.06) | (np.arange(ours) >= theirs)
    ids = np.where(moved, (rng.random(ours) ** 3 * min(2048, theirs)).astype(np.int64), ids)
    own, pieces = np.arange(theirs), rng.random(theirs) ** 3 * min(2048, theirs)
    return distillation.TokenProjection(
        ids=ids[:, None].astype(np.int32),
        weights=np.ones((ours, 1), np.float32),
        size=theirs,
        merges=np.where(np.isin(own, ids), own, pieces).astype(np.int32),
    )


def _inputs(shape: Shape) -> dict[str, jax.Array]:
    tokens, width, ours, theirs = shape
    rng = np.random.default_rng(0)
    few = rng.standard_normal(1_000_003, np.float32)
    top = np.sort(rng.normal(size=(tokens, K)), axis=-1)[:, ::-1].astype(np.float32)
    return {
        "hidden": jnp.asarray(np.resize(few, (tokens, width))),
        "head": jnp.asarray(np.resize(few * np.float32(2 * width**-0.5), (width, ours))),
        "values": jnp.asarray(top),
        "same": jnp.asarray(_distinct(rng, tokens, ours)),
        "other": jnp.asarray(_distinct(rng, tokens, theirs)),
        "labels": jnp.asarray(rng.integers(0, ours, tokens)),
    }


def _distinct(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Different ids in each row."""
    start, step = rng.integers(0, vocab, (rows, 1)), rng.integers(1, vocab // K, (rows, 1))
    return ((start + step * np.arange(K)) % vocab).astype(np.int32)


def _top(inputs: Any, which: str) -> ops.TopK:
    return ops.TopK(inputs["values"], inputs[which], ops.logsumexp(inputs["values"]) + 0.1)


def step(shape: Shape, peer: str, projection: distillation.TokenProjection) -> Callable[[Any], Any]:
    """Mean loss with its gradients by the hidden states and the head."""
    tokens = np.arange(shape[0], dtype=np.int32)
    words = distillation.TokenSet(np.arange(shape[2]) % 3 == 0)
    known = distillation.Vocabularies(projections={"first_piece": projection}, boundary=words)
    there = np.ones(shape[0], bool)
    # Each token is a chunk, after which a word begins.
    chunks = distillation.ChunkScores(
        ids=tokens, ends=tokens, scores=np.full(shape[0], -1, np.float32), where=there
    )

    def loss(hidden: Any, head: Any, inputs: Any) -> Any:
        if peer == "dense KL":
            logits = hidden @ head
            # What a dense loss across vocabularies holds of the student.
            return losses.sparse_kl_divergence(logits, _top(inputs, "same")).mean()
        if peer == "same tokenizer":
            return losses.linear_sparse_kl_divergence(hidden, head, _top(inputs, "same")).mean()
        top = _top(inputs, "other")
        statistics = losses.GraphStatistics(values=top.values, indices=top.indices, log_z=top.log_z)
        teacher = distillation.Teacher(statistics=statistics, chunks=chunks, vocabularies=known)
        objective = distillation.Objective(terms=distillation.parse_terms([peer]))
        value, count, _ = objective.value(
            hidden, head, {"labels": inputs["labels"]}, [teacher], where=there
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
            # Student and teacher are dense elsewhere: of this only the student's half is counted.
            share = row["temp MiB"] / dense["temp MiB"]
            bars.append(suite.at_most(f"{where}: scratch / dense", share, 0.1))
    return bars


def slow_cuts(ours: np.ndarray, theirs: np.ndarray) -> list[tuple[int, int]]:
    """How many tokens of each side every chunk has, looking at one byte after the other."""
    ends = [set(np.cumsum(x).tolist()) for x in (ours, theirs)]
    total, counts, out = int(min(ours.sum(), theirs.sum())), [0, 0], []
    for byte in range(1, total + 1):
        for side in (0, 1):
            counts[side] += byte in ends[side]
        if byte in ends[0] and byte in ends[1]:
            out.append((counts[0], counts[1]))
            counts = [0, 0]
    return out


def meetings() -> list[dict[str, Any]]:
    """How each two tokenizers cut texts, and whether the alignment is the slow search's."""
    names = {"tiny": "tiny", "SmolLM2": "smollm2"}
    if pathlib.Path(GEMMA).exists():
        names["Gemma"] = GEMMA
    known = {name: models.load_tokenizer(spec) for name, spec in names.items()}
    known |= _tokenizers.found()
    home = pathlib.Path(__file__).parents[2]
    texts = {kind: (home / place).read_text()[:20_000] for kind, place in TEXTS.items()}
    texts["scripts"] = SCRIPTS * 40
    rows = []
    for (first, ours), (second, theirs) in itertools.combinations(known.items(), 2):
        met = {kind: meet(ours, theirs, text) for kind, text in texts.items()}
        shares = {f"{kind}: labels in 1:1 %": found["labels"] for kind, found in met.items()}
        longest = max(found["longest"] for found in met.values())
        row = {"ours": first, "theirs": second, **shares, "longest": longest}
        rows.append(row | {"as slow": all(found["as slow"] for found in met.values())})
    return rows


def meet(ours: models.Tokenizer, theirs: models.Tokenizer, text: str) -> dict[str, Any]:
    """Chunks of one text: their longest, and whether they are those of `slow_cuts`."""
    lengths = [t.byte_lengths() for t in (ours, theirs)]
    ids = [np.array(t.encode(text)) for t in (ours, theirs)]
    spelt = [length[tokens] for length, tokens in zip(lengths, ids)]
    # Llama 2 writes a space before a text.
    prefixes = [int(sizes.sum()) - len(text.encode()) for sizes in spelt]
    size = max(map(len, ids)) + 1

    def columns(tokens: np.ndarray, special: int) -> dict[str, np.ndarray]:
        row = np.full((1, size), special)
        row[0, 1 : len(tokens) + 1] = tokens
        there = (np.arange(size) <= len(tokens))[None]
        return {
            "tokens": row,
            "segment_ids": there.astype(int),
            "positions": np.arange(size)[None] * there,
            "loss_mask": there & (np.arange(size) > 0)[None],
        }

    chunks = distillation.align_chunks(
        columns(ids[0], ours.eos_id or 0),
        columns(ids[1], theirs.eos_id or 0),
        our_lengths=lengths[0],
        their_lengths=lengths[1],
        our_prefix=prefixes[0],
        their_prefix=prefixes[1],
    )
    count = int(chunks.counts[0])
    found = list(zip(chunks.our_sizes[0, :count].tolist(), chunks.their_sizes[0, :count].tolist()))
    for sizes, prefix in zip(spelt, prefixes):
        sizes[0] -= prefix
    single = sum(pair == (1, 1) for pair in found)
    return {
        "labels": 100 * single / max(len(ids[0]), 1),
        "longest": max(map(max, found), default=0),
        "as slow": found == slow_cuts(*spelt),
    }


def run(options: suite.Options) -> suite.Result:
    rows: list[dict[str, Any]] = []
    for shape in SMOKE_SHAPES if options.smoke else SHAPES:
        rows += _measure(shape, options)
    met = meetings()
    bars = [] if options.smoke else _bars(rows)
    wrong = sum(not row["as slow"] for row in met)
    name = "pairs of tokenizers that the slow search cuts otherwise"
    bars.append(suite.at_most(name, wrong, 0))
    return suite.Result(rows=[*rows, *met], bars=bars)

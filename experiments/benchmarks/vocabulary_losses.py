"""Cross-entropy and KL of large vocabularies: dense, checkpointed chunks, and the blocked sweep.

Forward and backward, gradients of hidden states and head, float32. ``chunked`` is the scan over
token chunks under ``jax.checkpoint`` that other trainers use. Ours comes in two forms: ``blocked
scalar`` (``weights=``, what a training step uses) and ``blocked unreduced``, which like the
chunked scan has to form every logit twice: 6 matmuls for KL where dense and scalar take 4.

Bars are about KL: scratch memory at V = 152,064 at most a tenth of dense; seconds of the scalar
form at most dense's (1.2 times at H = 2048), and of both forms never more than the chunked scan's.

``--against=COMMIT`` times our two forms alone beside those of an earlier commit, float32 and
bfloat16, calls in turns; a second process of that commit says how far two of the same differ.
"""

import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.benchmarks import _commits, _suite
from experiments.shared import timing
from logitjax import losses, storage
from logitjax.commands import figures

# (T, H, V): a small model, one with Qwen's vocabulary, one with Gemma's.
SHAPES = ((2048, 576, 49152), (2048, 1024, 152064), (1024, 2048, 262144))
SMOKE_SHAPES = ((256, 32, 8192),)
# What a commit is compared at.
AGAINST_SHAPE = (1024, 576, 49152)
CHUNK = 256
PEERS = ("dense", "chunked", "blocked scalar", "blocked unreduced")

Shape = tuple[int, int, int]


def _inputs(shape: Shape) -> dict[str, jax.Array]:
    tokens, width, vocab = shape
    rng = np.random.default_rng(0)

    def normal(rows: int, columns: int, scale: float = 1.0) -> jax.Array:
        # A million draws, repeated: every process makes its own, and large heads take minutes.
        few = rng.standard_normal(min(rows * columns, 1_000_003), np.float32) * np.float32(scale)
        return jnp.asarray(np.resize(few, (rows, columns)))

    return {
        "hidden": normal(tokens, width),
        "head": normal(width, vocab, scale=2 * width**-0.5),
        "teacher_hidden": normal(tokens, width),
        "teacher_head": normal(width, vocab, scale=2 * width**-0.5),
        "labels": jnp.asarray(rng.integers(0, vocab, tokens)),
    }


def _dense(kind: str, hidden: Any, head: Any, teacher: Any, teacher_head: Any, labels: Any) -> Any:
    logits = hidden @ head
    if kind == "cross-entropy":
        return losses.cross_entropy(logits, labels)
    return losses.kl_divergence(logits, jax.lax.stop_gradient(teacher @ teacher_head))


def _chunked(
    kind: str, hidden: Any, head: Any, teacher: Any, teacher_head: Any, labels: Any
) -> Any:
    @jax.checkpoint
    def body(total: Any, chunk: Any) -> Any:
        here, there, ids = chunk
        return total + _dense(kind, here, head, there, teacher_head, ids).sum(), None

    size = min(CHUNK, len(hidden))
    chunks = [x.reshape(-1, size, *x.shape[1:]) for x in (hidden, teacher, labels)]
    return jax.lax.scan(body, 0.0, tuple(chunks))[0] / len(hidden)


def _blocked(
    kind: str, weighted: bool, hidden: Any, head: Any, teacher: Any, teacher_head: Any, labels: Any
) -> Any:
    weights = jnp.full(len(hidden), 1 / len(hidden)) if weighted else None
    if kind == "cross-entropy":
        return losses.linear_cross_entropy(hidden, head, labels, weights=weights)
    return losses.linear_kl_divergence(hidden, head, teacher, teacher_head, weights=weights)


def step(kind: str, peer: str) -> Callable[[Mapping[str, jax.Array]], Any]:
    """Mean loss with its gradients by the hidden states and the head."""

    def loss(hidden: Any, head: Any, rest: Mapping[str, jax.Array]) -> Any:
        arguments = (hidden, head, rest["teacher_hidden"], rest["teacher_head"], rest["labels"])
        if peer == "dense":
            return _dense(kind, *arguments).mean()
        if peer == "chunked":
            return _chunked(kind, *arguments)
        return _blocked(kind, peer == "blocked scalar", *arguments).mean()

    def run(inputs: Mapping[str, jax.Array]) -> Any:
        rest = {k: v for k, v in inputs.items() if k not in ("hidden", "head")}
        return jax.value_and_grad(loss, (0, 1))(inputs["hidden"], inputs["head"], rest)

    return run


def peak_rss(shape: Shape, kind: str, peer: str) -> int:
    """The most memory a fresh process has held after a step, in bytes."""
    run, inputs = jax.jit(step(kind, peer)), _inputs(shape)
    jax.block_until_ready(run(inputs))
    return _suite.peak_rss_bytes()


def _in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def _measure(shape: Shape, kind: str, options: _suite.Options) -> list[dict[str, Any]]:
    abstract = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype)
        for name, x in jax.eval_shape(functools.partial(_abstract_inputs, shape)).items()
    }
    rows = []
    for peer in PEERS:
        row = {"loss": kind, "T": shape[0], "H": shape[1], "V": shape[2], "form": peer}
        row["temp MiB"] = _suite.temp_bytes(step(kind, peer), abstract) / 2**20
        try:
            row["peak RSS MiB"] = _in_fresh_process(peak_rss, shape, kind, peer) / 2**20
        except concurrent.futures.process.BrokenProcessPool:
            logging.warning("%s %s at %s does not fit into memory", kind, peer, shape)
            row["peak RSS MiB"] = None
        rows.append(row)
    inputs = _inputs(shape)
    fitting = [row for row in rows if row["peak RSS MiB"] is not None]
    compiled = {row["form"]: jax.jit(step(kind, row["form"])) for row in fitting}
    calls = {name: functools.partial(function, inputs) for name, function in compiled.items()}
    seconds = timing.paired_seconds(calls, repeats=options.repeats)
    for row in fitting:
        name = row["form"]
        row["seconds"] = sorted(seconds[name])[len(seconds[name]) // 2]
        for other in ("dense", "chunked"):
            if other in seconds:
                row[f"/ {other}"] = timing.paired_ratio(seconds[name], seconds[other])
    return rows


def _abstract_inputs(shape: Shape) -> dict[str, jax.Array]:
    tokens, width, vocab = shape
    return {
        "hidden": jnp.zeros((tokens, width)),
        "head": jnp.zeros((width, vocab)),
        "teacher_hidden": jnp.zeros((tokens, width)),
        "teacher_head": jnp.zeros((width, vocab)),
        "labels": jnp.zeros(tokens, jnp.int32),
    }


def _bars(rows: list[dict[str, Any]]) -> list[_suite.Bar]:
    bars = []
    held = {(r["loss"], r["V"], r["form"]): r for r in rows}
    for (kind, vocab, form), row in held.items():
        if kind != "kl" or not form.startswith("blocked") or vocab < 150_000:
            continue
        where = f"KL, H={row['H']}, V={vocab}, {form}"
        dense = held[kind, vocab, "dense"]
        share = row["temp MiB"] / dense["temp MiB"]
        if row["H"] <= 1024:
            bars.append(_suite.Bar(name=f"{where}: scratch memory / dense", value=share, limit=0.1))
        limit = 1.0 if row["H"] <= 1024 else 1.2
        for other, most in (("dense", limit), ("chunked", 1.0)):
            ratio = row.get(f"/ {other}")
            # Unreduced losses form logits twice: the chunked scan is their peer, not dense.
            if ratio is not None and (other == "chunked" or form == "blocked scalar"):
                name = f"{where}: seconds / {other}"
                bars.append(_suite.Bar(name=name, value=ratio, limit=most))
    return bars


def picture(rows: Sequence[Mapping[str, Any]]) -> figures.Picture:
    """Seconds and scratch memory of every form, by shape."""
    shapes = list(dict.fromkeys((r["T"], r["H"], r["V"]) for r in rows))
    ticks = {f"{t} x\n{h} x\n{v}": float(i) for i, (t, h, v) in enumerate(shapes)}

    def panel(kind: str, column: str, unit: str) -> figures.Panel:
        series = []
        for form in PEERS:
            points = [
                (float(shapes.index((r["T"], r["H"], r["V"]))), r[column])
                for r in rows
                if (r["loss"], r["form"]) == (kind, form) and r.get(column)
            ]
            series.append(figures.Series(name=form, runs=[points]))
        return figures.Panel(
            x="positions x width x vocabulary",
            y=unit,
            title=kind,
            log="y",
            x_ticks=ticks,
            series=series,
        )

    return figures.Picture(
        panels=[
            panel(kind, *column)
            for column in (("seconds", "seconds"), ("temp MiB", "scratch memory, MiB"))
            for kind in dict.fromkeys(r["loss"] for r in rows)
        ],
        columns=2,
    )


def _against(options: _suite.Options) -> _suite.Result:
    """Seconds of ours as it is, of a commit's, and of the same commit's once more."""
    shape = SMOKE_SHAPES[0] if options.smoke else AGAINST_SHAPE
    script = pathlib.Path(__file__).with_name("_vocabulary_worker.py")
    rows, bars = [], []
    with contextlib.ExitStack() as stack:
        before = stack.enter_context(_commits.checkout(options.against))
        ask = {
            name: stack.enter_context(_commits.worker(script, package, [str(n) for n in shape]))
            for name, package in {"now": _commits.ROOT, "before": before, "again": before}.items()
        }
        cases = itertools.product(
            ("cross-entropy", "kl"), ("float32", "bfloat16"), ("scalar", "unreduced")
        )
        for kind, dtype, form in cases:
            seconds: dict[str, list[float]] = {name: [] for name in ask}
            for turn in range(options.repeats + 1):
                for name in list(ask)[:: 1 if turn % 2 else -1]:
                    seconds[name].append(float(ask[name](f"{kind} {dtype} {form}")))
            # The first call compiles.
            seconds = {name: found[1:] for name, found in seconds.items()}
            row = {"loss": kind, "type": dtype, "form": form}
            row |= {"T": shape[0], "H": shape[1], "V": shape[2]}
            row |= {f"seconds, {name}": statistics.median(seconds[name]) for name in ask}
            for name in ("now", "again"):
                row[f"{name} / before"] = timing.paired_ratio(seconds[name], seconds["before"])
            rows.append(row)
            logging.info("%s, %s, %s: done", kind, dtype, form)
    for dtype in ("float32", "bfloat16"):
        ratios = [row["now / before"] for row in rows if row["type"] == dtype]
        name = f"{dtype}: seconds / those of {options.against}, geometric mean"
        bars.append(_suite.Bar(name=name, value=statistics.geometric_mean(ratios), limit=1.02))
    return _suite.Result(rows=rows, bars=bars)


def run(options: _suite.Options) -> _suite.Result:
    if options.against:
        return _against(options)
    # Half an hour's work: what is measured is kept, and a run that was killed goes on from it.
    kept = options.directory / f"{options.scale}-{options.repeats}.partial.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    done = {(r["loss"], r["T"], r["H"], r["V"]) for r in rows}
    for shape in SMOKE_SHAPES if options.smoke else SHAPES:
        for kind in ("cross-entropy", "kl"):
            if (kind, *shape) in done:
                continue
            rows += _measure(shape, kind, options)
            options.directory.mkdir(parents=True, exist_ok=True)
            storage.write_atomic(kept, json.dumps(rows))
            logging.info("%s at T, H, V = %s done", kind, shape)
    kept.unlink()
    pictures = {"vocabulary_losses": picture(rows)}
    return _suite.Result(rows=rows, bars=_bars(rows), pictures=pictures)

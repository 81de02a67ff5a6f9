"""Cross-entropy and KL of large vocabularies: dense, checkpointed chunks, and the blocked sweep.

Forward and backward, gradients of hidden states and head, float32. ``chunked`` is the scan over
token chunks under ``jax.checkpoint`` that other trainers use. Ours comes in two forms: ``blocked
scalar`` (``weights=``, what a training step uses) and ``blocked unreduced``, which like the
chunked scan has to form every logit twice: 6 matmuls for KL where dense and scalar take 4.

Bars are about KL: scratch memory at V = 152,064 at most a tenth of dense; seconds of the scalar
form at most dense's (1.2 times at H = 2048), and of both forms never more than the chunked scan's.

``--against=COMMIT`` compares both forms with those of a commit, and the scalar one with dense:
CPU-seconds of steps in turns, on one thread each, in processes that differ in the losses alone.
``--only=kl`` leaves the other loss out.
"""

import concurrent.futures
import contextlib
import functools
import io
import itertools
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from experiments.benchmarks import _vocabulary as vocabulary
from experiments.benchmarks._vocabulary import KINDS, PEERS, Shape
from experiments.shared import figures, peers, records, suite, timing

# (T, H, V): a small model, one with Qwen's vocabulary, one with Gemma's.
SHAPES = ((2048, 576, 49152), (2048, 1024, 152064), (1024, 2048, 262144))
SMOKE_SHAPES = ((256, 32, 8192),)
# `--against` runs these on one thread: positions of a small step, and GPT-2's vocabulary.
AGAINST_SHAPE = (512, 256, 50257)
# Processes of each side: memory placement makes one 2 % slower than its twin.
_STARTS = 5


def peak_rss(shape: Shape, kind: str, peer: str) -> int:
    """The most memory a fresh process has held after a step, in bytes."""
    run, inputs = jax.jit(vocabulary.form_step(kind, peer)), vocabulary.inputs(shape)
    jax.block_until_ready(run(inputs))
    return suite.memory_bytes("VmHWM")


def _measure(shape: Shape, kind: str, options: suite.Options) -> list[dict[str, Any]]:
    abstract = {
        name: jax.ShapeDtypeStruct(size, jnp.int32 if name == "labels" else jnp.float32)
        for name, size in vocabulary.sizes(shape).items()
    }
    rows = []
    for peer in PEERS:
        row = {"loss": kind, "T": shape[0], "H": shape[1], "V": shape[2], "form": peer}
        row["temp MiB"] = suite.temp_bytes(vocabulary.form_step(kind, peer), abstract) / 2**20
        try:
            peak = suite.in_fresh_process(peak_rss, shape, kind, peer)
            row["peak RSS MiB"] = peak / 2**20
        except concurrent.futures.process.BrokenProcessPool:
            logging.warning("%s %s at %s does not fit into memory", kind, peer, shape)
            row["peak RSS MiB"] = None
        rows.append(row)
    inputs = vocabulary.inputs(shape)
    fitting = [row for row in rows if row["peak RSS MiB"] is not None]
    compiled = {row["form"]: jax.jit(vocabulary.form_step(kind, row["form"])) for row in fitting}
    calls = {name: functools.partial(function, inputs) for name, function in compiled.items()}
    seconds = timing.paired_seconds(calls, repeats=options.repeats)
    for row in fitting:
        name = row["form"]
        row["seconds"] = sorted(seconds[name])[len(seconds[name]) // 2]
        for other in ("dense", "chunked"):
            if other in seconds:
                row[f"/ {other}"] = timing.paired_ratio(seconds[name], seconds[other])
    return rows


def _bars(rows: list[dict[str, Any]]) -> list[suite.Bar]:
    bars = []
    entries = {(r["loss"], r["V"], r["form"]): r for r in rows}
    for (kind, vocab, form), row in entries.items():
        if kind != "kl" or not form.startswith("blocked") or vocab < 150_000:
            continue
        where = f"KL, H={row['H']}, V={vocab}, {form}"
        dense = entries[kind, vocab, "dense"]
        share = row["temp MiB"] / dense["temp MiB"]
        if row["H"] <= 1024:
            bars.append(suite.at_most(f"{where}: scratch memory / dense", share, 0.1))
        limit = 1.0 if row["H"] <= 1024 else 1.2
        for other, most in (("dense", limit), ("chunked", 1.0)):
            ratio = row.get(f"/ {other}")
            # Unreduced losses form logits twice: the chunked scan is their peer, not dense.
            if ratio is not None and (other == "chunked" or form == "blocked scalar"):
                name = f"{where}: seconds / {other}"
                bars.append(suite.at_most(name, ratio, most))
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


def _steps(tree: Path, *arguments: Any) -> Any:
    """A process that runs steps of a form, by the losses of a tree, and says their times."""
    one = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-P", vocabulary.__file__, *arguments)
    return peers.asking(*command, **one, PYTHONPATH=os.fspath(tree))


def _against(options: suite.Options) -> suite.Result:
    rows, bars = [], []
    shape = SMOKE_SHAPES[0] if options.smoke else AGAINST_SHAPE
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "archive", options.against, "logitjax"]
        packed = subprocess.run(archive, cwd=suite.ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as tree:
            tree.extractall(folder, filter="data")
        for kind, form in itertools.product(options.parts(KINDS), PEERS[2:]):
            sides = {"now": (suite.ROOT, form), "before": (Path(folder), form)}
            sides |= {"dense": (suite.ROOT, "dense")} if form == "blocked scalar" else {}
            seconds: dict[str, list[float]] = {name: [] for name in sides}
            for start in range(min(_STARTS, options.repeats)):
                with contextlib.ExitStack() as stack:
                    steps = {
                        name: stack.enter_context(_steps(tree, kind, what, *shape))
                        for name, (tree, what) in sides.items()
                    }
                    for turn in range(start, options.repeats, _STARTS):
                        # Forward and backward order, so that none is always first.
                        for name in list(steps)[:: 1 if turn % 2 else -1]:
                            seconds[name].append(steps[name]())
            row: dict[str, Any] = {"loss": kind, "T": shape[0], "H": shape[1], "V": shape[2]}
            row |= {"form": form, "CPU-seconds": statistics.median(seconds["now"])}
            for name, most in (("before", 1.02), ("dense", 1.05)):
                if name in seconds:
                    row[f"/ {name}"] = timing.paired_ratio(seconds["now"], seconds[name])
                    if name == "before" or kind == "cross-entropy":
                        what = f"{kind}, {form}: CPU-seconds / {name}"
                        bars.append(suite.at_most(what, row[f"/ {name}"], most))
            rows.append(row)
            logging.info("%s", row)
    return suite.Result(rows=rows, bars=bars)


def run(options: suite.Options) -> suite.Result:
    if options.against:
        return _against(options)
    # Half an hour's work: measurements are kept, and a killed run continues.
    parts = epath.Path(options.directory) / f"{options.scale}-{options.repeats}-parts"
    rows: list[dict[str, Any]] = []
    for shape in SMOKE_SHAPES if options.smoke else SHAPES:
        for kind in options.parts(KINDS):
            path = parts / f"{kind}-{'-'.join(map(str, shape))}.json"
            rows += records.kept(path, functools.partial(_measure, shape, kind, options))
            logging.info("%s at T, H, V = %s done", kind, shape)
    parts.rmtree()
    pictures = {"vocabulary_losses": picture(rows)}
    return suite.Result(rows=rows, bars=_bars(rows), pictures=pictures)

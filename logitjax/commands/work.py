"""Estimates of a run's inputs, outputs and cost before it begins: `--dry_run`."""

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from logitjax import data, losses, models, storage
from logitjax.commands import _flags

# Few layers compile within seconds.
_TIMED_LAYERS = 2
# Measured on a CPU: libraries with compiled programs, and a step's peak over its arrays.
_HOST_BYTES, _PEAK = 9e8, 1.4


def check_length(spec: str, length: int, name: str = "seq_len") -> None:
    """Refuse rows that are longer than a model reads: GPT-2 has no positions beyond."""
    longest = models.load_config(spec).max_length
    if length > longest:
        raise ValueError(
            f"{name}: expected at most {longest}, the length that {spec!r} reads, got {length}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """Tokens that pass through a decoder, `batch` rows at once."""

    model: str
    shape: models.DecoderConfig
    tokens: float
    batch: tuple[int, int]
    trained: bool = False

    @classmethod
    def reading(cls, model: str, rows: float, batch: tuple[int, int]) -> "Pass":
        """Rows that a model reads once."""
        shape = models.load_config(model)
        return cls(model=model, shape=shape, tokens=rows * batch[1], batch=batch)

    @property
    def weights(self) -> int:
        decoder = nnx.eval_shape(lambda: models.Decoder(self.shape, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))

    @property
    def memory(self) -> float:
        """Bytes of weights, gradients, AdamW's two moments, and activations."""
        # Activations that a layer keeps for its gradient; without a gradient they are reused.
        kept = 12 * self.shape.hidden_size + 4 * self.shape.intermediate_size
        layers = self.shape.num_layers if self.trained else 1
        activations = 4.0 * self.batch[0] * self.batch[1] * kept * layers
        return self.weights * (16 if self.trained else 4) + activations

    @property
    def products(self) -> float:
        """Work, in tokens times weights; a forward pass is a third of a training step."""
        return self.tokens * self.weights * (1 if self.trained else 1 / 3)

    def pace(self) -> float:
        """Products per second, from a second of gradients through the first layers."""
        shape = shortened(self.shape, _TIMED_LAYERS)
        make = nnx.jit(lambda: models.Decoder(shape, rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(make())
        tokens = jnp.zeros(self.batch, jnp.int32)

        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden, _ = model.hidden_states(tokens)
            return losses.linear_cross_entropy(hidden, model.head_of(), tokens).mean()

        step = jax.jit(jax.grad(loss))
        # The first call compiles.
        jax.block_until_ready(step(params))
        begin, count = time.perf_counter(), 0
        while not count or time.perf_counter() - begin < 1.0:
            jax.block_until_ready(step(params))
            count += 1
        timed = dataclasses.replace(self, shape=shape, trained=True, tokens=tokens.size)
        return timed.products * count / (time.perf_counter() - begin)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The work of a run: sources, bytes by file, passes through models, steps."""

    reads: Sequence[str]
    writes: Mapping[str, float] = dataclasses.field(default_factory=dict)
    passes: Sequence[Pass] = ()
    steps: int = 0

    def lines(self, program: str, out: epath.Path) -> Iterator[str]:
        """Lines of `--dry_run`; the time comes last because it must be measured."""
        yield f"dry run of {program}: nothing is written"
        for name in dict.fromkeys(self.reads):
            yield f"reads   {name}, {_bytes(size)}" if (size := _size(name)) else f"reads   {name}"
        yield from (f"writes  {out / name}, {_bytes(size)}" for name, size in self.writes.items())
        yield f"disk    {_bytes(sum(self.writes.values()))} of {_free_disk(out)} free"
        for one in self.passes:
            verb = "is trained on" if one.trained else "reads"
            yield f"tokens  {one.model} {verb} {one.tokens:,.0f}"
        if self.steps:
            yield f"steps   {self.steps}"
        if not self.passes:
            return
        # A model that is both trained and scored is in memory once.
        ascending = sorted(self.passes, key=lambda one: one.memory)
        memory = sum({one.model: one.memory for one in ascending}.values())
        if jax.devices()[0].platform == "cpu":
            memory = _HOST_BYTES + _PEAK * memory
        yield f"memory  about {_bytes(memory)} of {_memory()}"
        storage.progress.mark("timing two layers")
        minutes = sum(one.products for one in self.passes) / self.passes[0].pace() / 60
        yield f"time    about {minutes:.1f} minutes plus compilation, measured on two layers"


def estimate(config: _flags.Dataclass) -> Work:
    """The work of a command, derived from the names and values of its flags."""
    v = _flags.flatten(config)
    names = ("student", "model", "expert", "base", "reference", "encoder", "auxiliary", "teacher")
    decoders = _specs(v, names[:5])
    prunes = any(v.get(name) for name in ("drop_layers", "drop_share", "keep_layers", "kv_heads"))
    teachers = _specs(v, ("teacher",)) or (decoders[:1] if prunes else [])
    sources = _specs(v, ("data", "text", "choices", "forget", "retain", "holdout", "features"))
    if v.get("data") and v["data"].startswith(("text:", "jsonl:", "parquet:", "mix:")):
        # Refuses invalid settings.
        data.load_examples(v["data"])
    batch = (
        v.get("batch_size") or v.get("batch_rows") or 1,
        v.get("seq_len") or v.get("max_length") or v.get("prompt_length") or 128,
    )
    steps, trains = v.get("steps") or 0, "student" in v or "forget" in v
    passes, writes, more = [], {}, {}
    if trains and steps:
        spec = decoders[0]
        shape = models.load_config(spec)
        dropped = v.get("drop_layers") or round((v.get("drop_share") or 0) * shape.num_layers)
        shape = shortened(shape, len(v.get("keep_layers") or ()) or shape.num_layers - dropped)
        tokens = steps * batch[0] * batch[1]
        student = Pass(model="the student", shape=shape, tokens=tokens, batch=batch, trained=True)
        rows = steps * batch[0] + 2 * (v.get("eval_rows") or 0)
        # Test rows before and after; validation rows at every evaluation and at the last step.
        looks = 2 + -(-steps // v["eval_every"]) if v.get("eval_every") else 2
        scored = looks * (v.get("eval_rows") or 0) * batch[1]
        passes = [student, dataclasses.replace(student, trained=False, tokens=scored)]
        # The whole model is scored, too, and reads text to choose what to prune.
        more = {spec: (v.get("eval_rows") or 0) + v.get("calibration_rows", 0)} if prunes else {}
        # Weights and two moments in each of the last two checkpoints.
        stored = min(2, -(-steps // (v.get("checkpoint_every") or steps)))
        writes = {"model": 4.0 * student.weights, "checkpoints": 12.0 * stored * student.weights}
        decoders = []
    else:
        # A token is about four bytes of text.
        size = sum(map(_size, sources)) / 4 or 1e5
        rows = min(size, v.get("max_tokens") or size) / batch[1]
    read = [spec for spec in [*decoders, *teachers] if not spec.startswith(("cache:", "api:"))]
    passes += [Pass.reading(spec, rows + more.pop(spec, 0), batch) for spec in read]
    passes += [Pass.reading(spec, count, batch) for spec, count in more.items()]
    passes = [one for one in passes if one.tokens]
    if v.get("cache_top_k") and v.get("teacher_reads") != "live":
        # A number and an id for each cached token, and two moments.
        kept = rows * batch[1] * (4 * v["cache_top_k"] + 8)
        writes |= {f"teacher {spec}": kept for spec in teachers if spec in read}
    return Work(reads=[*_specs(v, names), *sources], writes=writes, passes=passes, steps=steps)


def _specs(values: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    entries = [values[name] for name in names if values.get(name)]
    return [spec for one in entries for spec in ([one] if isinstance(one, str) else one)]


def shortened(shape: models.DecoderConfig, layers: int) -> models.DecoderConfig:
    """The configuration of a decoder's first layers."""
    layers = min(layers, shape.num_layers)
    windows = shape.windows[:layers]
    return dataclasses.replace(shape, num_layers=layers, windows=windows, segment_boundaries=())


def _size(name: str) -> float:
    """Size in bytes of the file or folder that a source names, 0 if it names none."""
    kind, _, path = name.partition(":")
    file = pathlib.Path(path if kind in ("text", "jsonl", "parquet", "cache", "folder") else name)
    files = file.rglob("*") if file.is_dir() else [file]
    return float(sum(one.stat().st_size for one in files if one.is_file()))


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _free_disk(out: epath.Path) -> str:
    if "://" in str(out):
        return "an unknown amount"
    near = next(path for path in (out, *out.absolute().parents) if path.exists())
    return _bytes(shutil.disk_usage(near).free)


def _memory() -> str:
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    # CPU devices share the memory of the machine.
    limit = limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{_bytes(limit)} ({device.device_kind})"

"""What a run would read, write and cost, before it begins: `--dry_run`."""

import dataclasses
import os
import pathlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from logitjax import losses, models, storage

# Of a forward and a backward pass the forward is a third.
_FORWARD = 1 / 3
# Layers that are timed: few, so that they compile within seconds.
_TIMED_LAYERS = 2
# Float32 weights, gradients and AdamW's two moments.
_TRAINED_BYTES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """Tokens that go through a decoder.

    Attributes:
        model: Name of the decoder.
        shape: Its configuration.
        tokens: Number of tokens.
        batch: Rows and tokens of a batch.
        trained: Whether gradients are taken.
    """

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
        """Number of its weights."""
        decoder = nnx.eval_shape(lambda: models.Decoder(self.shape, rngs=nnx.Rngs(0)))
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(decoder, nnx.Param)))

    @property
    def memory(self) -> float:
        """Bytes of weights, of what an optimiser keeps, and of activations."""
        count = self.batch[0] * self.batch[1]
        # What a layer keeps for its gradient, in units of its width; without one it is reused.
        kept = 12 * self.shape.hidden_size + 4 * self.shape.intermediate_size
        layers = self.shape.num_layers if self.trained else 1
        return self.weights * (_TRAINED_BYTES if self.trained else 4) + 4.0 * count * kept * layers

    @property
    def products(self) -> float:
        """Its work, as products of a token and a weight whose gradient is taken."""
        return self.tokens * self.weights * (1.0 if self.trained else _FORWARD)

    def pace(self, dtype: str) -> float:
        """Products a second, from a second of gradients through the first layers."""
        shape = shortened(self.shape, _TIMED_LAYERS)
        graphdef, params = nnx.split(
            nnx.jit(lambda: models.Decoder(shape, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))()
        )
        tokens = jnp.zeros(self.batch, jnp.int32)

        def loss(params: Any) -> jax.Array:
            model = nnx.merge(graphdef, params)
            hidden, _ = model.hidden_states(tokens)
            return losses.linear_cross_entropy(hidden, model.head_of(), tokens).mean()

        step = jax.jit(jax.grad(loss))
        jax.block_until_ready(step(params))  # The first call compiles.
        begin, count = time.perf_counter(), 0
        while not count or time.perf_counter() - begin < 1.0:
            jax.block_until_ready(step(params))
            count += 1
        each = (time.perf_counter() - begin) / count
        timed = dataclasses.replace(self, shape=shape, trained=True, tokens=tokens.size)
        return timed.products / each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a configuration asks for.

    Attributes:
        reads: What is read.
        writes: Bytes by file or folder, below the folder of the run.
        passes: Tokens that go through models. Those that are held together are one list.
        steps: Number of optimiser steps.
        dtype: Compute type.
    """

    reads: Sequence[str]
    writes: Mapping[str, float]
    passes: Sequence[Pass] = ()
    steps: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def lines(self, program: str, out: epath.Path) -> Iterator[str]:
        """What `--dry_run` prints; the time, which has to be measured, comes last."""
        yield f"dry run of {program}: nothing is written"
        yield from (f"reads   {name}{_size_of(name)}" for name in dict.fromkeys(self.reads))
        yield from (f"writes  {out / name}, {_bytes(size)}" for name, size in self.writes.items())
        yield f"disk    {_bytes(sum(self.writes.values()))} of {_free_disk(out)} free"
        for one in self.passes:
            verb = "learns from" if one.trained else "reads"
            yield f"tokens  {one.model} {verb} {one.tokens:,.0f}"
        if self.steps:
            yield f"steps   {self.steps}"
        if self.passes:
            # A model that is trained and scored is there once.
            memory = {
                one.model: one.memory for one in sorted(self.passes, key=lambda one: one.memory)
            }
            yield f"memory  about {_bytes(sum(memory.values()))} of {_memory()}"
            storage.progress.mark("timing two layers")
            products = sum(one.products for one in self.passes)
            minutes = products / self.passes[0].pace(self.dtype) / 60
            yield (
                f"time    about {minutes:.1f} minutes on this machine without compilation, estimated "
                f"from {_TIMED_LAYERS} layers"
            )


def shortened(shape: models.DecoderConfig, layers: int) -> models.DecoderConfig:
    """The configuration of a decoder's first layers."""
    layers = min(layers, shape.num_layers)
    return dataclasses.replace(
        shape, num_layers=layers, windows=shape.windows[:layers], segment_boundaries=()
    )


def _size_of(name: str) -> str:
    """The size of the file that a source names, where it names one."""
    kind, _, path = name.partition(":")
    file = pathlib.Path(path if kind in ("text", "jsonl", "cache") else name)
    if not file.exists():
        return ""
    files = file.rglob("*") if file.is_dir() else [file]
    return f", {_bytes(sum(one.stat().st_size for one in files if one.is_file()))}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _free_disk(out: epath.Path) -> str:
    if "://" in str(out):
        return "an object store that does not say how much is"
    near = next(path for path in (out, *out.absolute().parents) if path.exists())
    return _bytes(shutil.disk_usage(near).free)


def _memory() -> str:
    """Memory of the first device, or of the machine where devices are CPUs."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return f"{_bytes(stats['bytes_limit'])} of a {jax.devices()[0].device_kind}"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{_bytes(total)} of this machine"

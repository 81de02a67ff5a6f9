"""Vocabulary losses compiled for absent TPUs: bytes, work, and the compiler's estimate of time.

Cross-entropy and KL with their gradients in bfloat16, at 4096 x 1024 x 151,936, 8192 x 4096 x
131,072 and 32768 x 4096 x 128,256 (positions, hidden, vocabulary): dense, chunks of 1,024 positions
under ``jax.checkpoint``, Liger's chunks, tokamax's chunked form, its kernels and levanter's where
they are installed (``pip install tokamax marin-levanter``), and ours by default, with the engine
``rows``, unreduced, and by kernels.
Nothing runs: a TPU's compiler, which the extra ``plan`` brings on Python 3.12 or newer, reports
what a program would hold and take. The smoke scale compiles for the CPU.

``--only=v5p,kl,small`` compiles for one chip, one loss, one shape: names of `CHIPS`, `KINDS` and
`SHAPES`. ``--only=axes`` counts, on eight CPU devices, how often heads are
gathered on the meshes of other trainers (`MESHES`). With ``models`` the heads of all models, or of
the named ones, are compiled instead, into a file a chip, ``kernels/v5p.json``, with the tiles of
the kernels and the refusals; the file keeps earlier rows. `tiles` turns these files into
``losses/sweep/tiles.json``. Columns: F is the work of one product of positions, hidden and
vocabulary; the roofline's time is the longer of all products at the chip's peak and of reading
arguments and writing results once; cycles are the TPU compiler's own, loops as often as they run,
and estimated time is these over the chip's clock, if that is known.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from experiments.benchmarks import _vocabulary as vocabulary
from experiments.benchmarks._vocabulary import KINDS, Loss, Shape
from experiments.plan import chips, costs
from experiments.shared import figures, records, suite
from logitjax import losses, training

SHAPES = {
    "small": (4096, 1024, 151936),
    "wide": (8192, 4096, 131072),
    "large": (32768, 4096, 128256),
}
SMOKE_SHAPES = {"smoke": (2048, 32, 8192)}
# Output heads by hidden size and vocabulary, most of which tokamax tunes for; positions.
MODELS = {
    "SmolLM2 135M": (576, 49152),
    "Gemma 3 270M": (640, 262144),
    "Qwen3 0.6B": (1024, 151936),
    "Gemma 3 1B": (1152, 262144),
    "SmolLM2 1.7B": (2048, 49152),
    "Llama 3.2 1B": (2048, 128256),
    "Gemma 3 4B": (2560, 262144),
    "gpt-oss-120b": (2880, 201088),
    "Gemma 3 12B": (3840, 262144),
    "Llama 3.1 8B": (4096, 128256),
    "Qwen3 8B": (4096, 151936),
    "Qwen3 32B": (5120, 151936),
    "DeepSeek-V3": (7168, 129280),
    "Llama 3.1 405B": (16384, 128256),
}
_MODEL_POSITIONS = 8192
CHIPS = {"v5e": "v5e:1x1", "v5p": "v5p:1x1x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1"}
# Meshes of 2 x 4: axes, their kind, and the sharding of hidden states and heads.
MESHES = {
    "ours": ("fsdp tensor", AxisType.Auto, ("fsdp",), ("fsdp", "tensor")),
    "ours, no set_mesh": ("fsdp tensor", AxisType.Auto, ("fsdp",), ("fsdp", "tensor")),
    "tunix": ("fsdp tp", AxisType.Auto, ("fsdp",), ("fsdp", "tp")),
    "t5x, levanter": ("data model", AxisType.Auto, ("data",), (None, "model")),
    "sequence": ("fsdp context", AxisType.Auto, ("fsdp", "context"), ("fsdp",)),
    "Explicit": ("fsdp tensor", AxisType.Explicit, ("fsdp",), ("fsdp",)),
}
_CHUNK = 1024
# levanter leaves its kernels' on-chip memory to a flag: three quarters, or nearly all.
_VMEM_KIB = {"v5e": "98304", "v6e": "98304", "v5p": "64000", "tpu7x": "64000"}
_KERNELS = ("ours, pallas", "tokamax, Mosaic", "levanter, Mosaic")
_PARTS = "parts"


def _tokamax(form: str, x: Mapping[str, jax.Array]) -> jax.Array:
    import tokamax

    return tokamax.linear_softmax_cross_entropy_loss(
        x["hidden"], x["labels"], x["head"], reduction="mean", implementation=form
    )


def _levanter(x: Mapping[str, jax.Array]) -> jax.Array:
    from levanter.kernels.pallas import fused_cross_entropy_loss as levanter

    (rows, width), vocab = x["hidden"].shape, x["head"].shape[1]
    kind = jax.devices()[0].device_kind
    sizes = levanter.infer_block_sizes(
        rows, width, vocab, dtype=jnp.float32, x_dtype=x["hidden"].dtype, device_kind=kind
    )
    return levanter.fused_cross_entropy_loss_and_logsumexp_penalty(
        x["hidden"], x["labels"], x["head"], block_sizes=sizes, implementation="pallas_tpu"
    )


@contextlib.contextmanager
def _cross_compiling() -> Iterator[None]:
    """Have other libraries choose their kernels for the mesh's chip, not for this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("tokamax"):
            import tokamax

            stack.enter_context(tokamax.config.cross_compile(True))
        if device is not None and device.platform == "tpu":
            # levanter asks for the default device.
            entries = {"default_backend": lambda: "tpu", "devices": lambda *_: [device]}
            stack.enter_context(mock.patch.multiple(jax, **entries))
        yield


@jax.custom_vjp
def _liger_sum(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> jax.Array:
    return _liger_forward(hidden, head, labels)[0]


def _liger_forward(hidden: jax.Array, head: jax.Array, labels: jax.Array) -> Any:
    # Its own rule: a chunk's logits take as many bytes as the hidden states.
    count = -(-head.shape[1] // head.shape[0])
    size = min(len(hidden), 2 ** math.ceil(math.log2(-(-len(hidden) // count))))

    def chunk(carry: Any, some: Any) -> Any:
        def total(hidden: jax.Array, head: jax.Array) -> jax.Array:
            return losses.cross_entropy(hidden @ head, some[1]).sum()

        value, (d_hidden, d_head) = jax.value_and_grad(total, (0, 1))(some[0], head)
        return (carry[0] + value, carry[1] + d_head), d_hidden

    chunks = hidden.reshape(-1, size, hidden.shape[1]), labels.reshape(-1, size)
    (value, d_head), d_hidden = jax.lax.scan(chunk, (jnp.float32(0), jnp.zeros_like(head)), chunks)
    return value, (d_hidden.reshape(hidden.shape), d_head)


def _liger_backward(saved: Any, cotangent: jax.Array) -> Any:
    return *(x * cotangent.astype(x.dtype) for x in saved), None


_liger_sum.defvjp(_liger_forward, _liger_backward)


def _liger(x: Mapping[str, jax.Array]) -> jax.Array:
    """Liger's cross-entropy in JAX: chunks of positions, their gradients formed with the loss."""
    return _liger_sum(x["hidden"], x["head"], x["labels"]) / len(x["hidden"])


def forms(kind: str) -> dict[str, Loss]:
    """The compared losses by name, unreduced or their mean."""
    entries: dict[str, Loss] = {
        "dense": functools.partial(vocabulary.dense, kind),
        "chunks + checkpoint": functools.partial(vocabulary.chunked, kind, size=_CHUNK),
    }
    if kind == "cross-entropy":
        entries["Liger's chunks"] = _liger
        if importlib.util.find_spec("tokamax"):
            entries["tokamax, chunked"] = functools.partial(_tokamax, "chunked_xla")
            entries["tokamax, Mosaic"] = functools.partial(_tokamax, "mosaic_tpu")
        if importlib.util.find_spec("levanter"):
            entries["levanter, Mosaic"] = _levanter

    def ours(engine: Any, weighted: bool) -> Loss:
        blocks = losses.Blocks(engine=engine)
        return functools.partial(vocabulary.ours, kind, weighted=weighted, blocks=blocks)

    entries["ours, default"] = ours(None, True)
    entries["ours, rows"] = ours("rows", True)
    entries["ours, unreduced"] = ours(None, False)
    entries["ours, pallas"] = ours("pallas", False)
    return entries


def arguments(shape: Shape, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the arrays, rows split over ``fsdp`` and heads over ``fsdp`` and ``tensor``."""

    def placed(name: str, size: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        axes = ("fsdp", "tensor") if name.endswith("head") else ("fsdp",)
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        dtype = jnp.int32 if name == "labels" else jnp.bfloat16
        return jax.ShapeDtypeStruct(size, dtype, sharding=sharding)

    return {name: placed(name, size) for name, size in vocabulary.sizes(shape).items()}


def _compile(loss: Loss, shape: Shape, device: Any, options: Any = None) -> Any:
    mesh = Mesh(np.array(device).reshape(1, 1), ("fsdp", "tensor"), (AxisType.Auto,) * 2)
    inputs = arguments(shape, mesh)
    placed = (inputs["hidden"].sharding, inputs["head"].sharding)
    replicated = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh), _cross_compiling():
        traced = jax.jit(vocabulary.step(loss), out_shardings=(replicated, placed)).trace(inputs)
        return traced, traced.lower().compile(options)


def _row(name: str, kind: str, shape: Shape, chip: chips.Chip, loss: Loss) -> dict[str, Any]:
    row: dict[str, Any] = {"chip": chip.name, "loss": kind}
    row |= {"T": shape[0], "H": shape[1], "V": shape[2], "form": name}
    try:
        options = None
        if name == "levanter, Mosaic":
            options = {"xla_tpu_scoped_vmem_limit_kib": _VMEM_KIB[chip.name]}
        traced, compiled = _compile(loss, shape, chips.devices_of(chip)[0], options)
    except Exception as error:
        # A program that does not fit a chip is a row of the table, as is an unsupported kernel.
        if name in _KERNELS:
            size = re.search(r"Scoped allocation with size .*? limit [\d.]+\w", str(error))
            reason = size[0] if size else str(error).splitlines()[0][:200]
            return row | {"refused": f"{type(error).__name__}: {reason}"}
        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        refused, expected = costs.out_of_memory(error)
        return row | {"temp MiB": expected and expected / 2**20, "does not fit": refused}
    memory, flops = compiled.memory_analysis(), training.matmul_flops(traced.jaxpr)
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    row["products, F"] = flops / (2.0 * shape[0] * shape[1] * shape[2])
    row["temp MiB"] = memory.temp_size_in_bytes / 2**20
    row["in and out MiB"] = moved / 2**20
    if chip.flops:
        row["roofline ms"] = 1e3 * max(flops / chip.flops, moved / chip.hbm)
    text = compiled.as_text()
    # The compiler has no cycles for a kernel.
    cycles = 0 if "tpu_custom_call" in text else costs.estimated_cycles(text)
    row["Mcycles"] = cycles / 1e6 or None
    if tiles := dict(re.findall(r"logitjax_(\w+?)_(\d+x\d+)", text)):
        row["tiles"] = ", ".join(f"{kernel} {size}" for kernel, size in tiles.items())
    if chip.clock and cycles:
        row["estimated ms"] = 1e3 * cycles / chip.clock
    return row


def _kept(options: suite.Options, *given: Any) -> dict[str, Any]:
    """A `_row`: hours of work, so compiled rows are kept, and a killed run continues."""
    name, kind, shape, chip, _ = given
    what = "-".join(map(str, (chip.name, kind, *shape, name)))
    path = epath.Path(options.directory) / _PARTS / f"{what}.json"
    row = records.kept(path, functools.partial(_row, *given))
    logging.info("%s: done", what)
    return row


def _compare(rows: list[dict[str, Any]]) -> None:
    dense = next(row for row in rows if row["form"] == "dense")
    for row in rows:
        for share, name in (("temp / dense", "temp MiB"), ("cycles / dense", "Mcycles")):
            if row.get(name) and dense.get(name):
                row[share] = row[name] / dense[name]


def _models(
    path: epath.Path, chip: chips.Chip, kinds: Sequence[str], models: Sequence[str]
) -> list[dict[str, Any]]:
    """Heads of models by kernels, with their tiles, and by `scan`; the file keeps its rows."""
    rows = json.loads(path.read_text()) if path.exists() else []
    compiled = {(row["model"], row["loss"], row["form"]) for row in rows}
    device = chips.devices_of(chip)[0].device_kind
    for name, model, kind in itertools.product((*_KERNELS[:2], "ours, unreduced"), models, kinds):
        if name in (table := forms(kind)) and (model, kind, name) not in compiled:
            row = _row(name, kind, (_MODEL_POSITIONS, *MODELS[model]), chip, table[name])
            row = {k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in row.items()}
            rows.append({"model": model, "device": device} | row)
            logging.info("%s, %s, %s: done", model, kind, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            # One line a row, so that tables can be joined and compared.
            path.write_text("[\n " + ",\n ".join(map(json.dumps, rows)) + "\n]\n")
    return rows


def tiles(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[list[int]]]:
    """Return the tiles that our kernels look up: those compiled, none if refused."""
    table: dict[str, list[list[int]]] = {}
    for row in rows:
        if row["form"] == "ours, pallas":
            sides = [str(2 * row["H"])] * (2 if row["loss"] == "kl" else 1)
            sizes = dict(re.findall(r"(\w+) (\d+x\d+)", row.get("tiles", "")))
            for kernel in ("state", "hidden", "head"):
                size = [[int(n) for n in sizes[kernel].split("x")]] if kernel in sizes else []
                table[f"{row['device']}, {kernel}, {' + '.join(sides)}"] = size
    return dict(sorted(table.items()))


def _bars(rows: Sequence[Mapping[str, Any]]) -> list[suite.Bar]:
    bars = []
    for row in rows:
        size, form = (row["T"], row["H"], row["V"]), row["form"].removeprefix("ours, ")
        where = f"{row['chip']}, {row['loss']}, T={size[0]}, H={size[1]}, {form}"
        if form == row["form"] or row["chip"] not in ("v5p", "v6e"):
            continue
        if form == "pallas" and size == SHAPES["wide"]:
            bars.append(suite.at_most(f"{where}: MiB", row.get("temp MiB", math.inf), 1.0))
        if form == "unreduced" and size == SHAPES["wide"] and row["loss"] == "cross-entropy":
            bars.append(suite.at_most(f"{where}: cycles / dense", row["cycles / dense"], 1.4))
        if form == "default":
            share = row["temp / dense"]
            bars.append(suite.at_most(f"{where}: temporaries / dense", share, 0.1))
        if form in ("default", "rows") and size == SHAPES["large"]:
            # `rows` forms a logit once, `scan` twice.
            limit = 1.1 if form == "rows" else 1.3
            bars.append(suite.at_most(f"{where}: cycles / dense", row["cycles / dense"], limit))
    return bars


def _axes_rows(names: Sequence[str], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """All-gathers of a step on eight devices, those in loops as often as they run."""
    rows = []
    sizes = {"hidden": (8, 512, 64), "labels": (8, 512), "weights": (8, 512), "head": (64, 8192)}
    for name, kind, weighted in itertools.product(names, kinds, (True, False)):
        axes, axis_type, positions, head = MESHES[name]
        mesh = jax.make_mesh((2, 4), tuple(axes.split()), (axis_type,) * 2)
        layouts = {n: head if n == "head" else positions for n in sizes}
        placed = {n: NamedSharding(mesh, PartitionSpec(*layout)) for n, layout in layouts.items()}
        inputs = {
            n: jax.ShapeDtypeStruct(
                shape, jnp.int32 if n == "labels" else jnp.float32, sharding=placed[n]
            )
            for n, shape in sizes.items()
        }

        def loss(x: Any, kind: str = kind, weighted: bool = weighted) -> jax.Array:
            given = {"weights": x["weights"]} if weighted else {}
            if kind == "cross-entropy":
                value = losses.linear_cross_entropy(x["hidden"], x["head"], x["labels"], **given)
            else:
                sides = (x["hidden"], x["head"], 2.0 * x["hidden"], jnp.cos(x["head"]))
                value = losses.linear_kl_divergence(*sides, **given)
            return value if weighted else value * x["weights"]

        layout = (None, (placed["hidden"], placed["head"]))
        step = jax.jit(vocabulary.step(loss), out_shardings=layout)
        existing = contextlib.nullcontext() if "no set_mesh" in name else jax.set_mesh(mesh)
        with existing:
            sent = costs.collectives(step.lower(inputs).compile().as_text() or "")
        row = {"mesh": name, "axes": axes, "loss": kind}
        row["form"] = "weights" if weighted else "unreduced"
        row["all-gathers"] = sent.calls.get("all-gather", 0)
        row["all-gather MiB"] = sent.collective_bytes.get("all-gather", 0.0) / 2**20
        rows.append(row)
    return rows


def _axes_bars(rows: Sequence[Mapping[str, Any]]) -> list[suite.Bar]:
    return [
        suite.at_most(
            f"{row['mesh']}, {row['loss']}, {row['form']}: all-gathers",
            row["all-gathers"],
            2 if row["loss"] == "kl" else 1,
        )
        for row in rows
    ]


def run(options: suite.Options) -> suite.Result:
    shapes: Mapping[str, Shape] = SMOKE_SHAPES if options.smoke else SHAPES
    named = {"cpu": "cpu:1"} if options.smoke else CHIPS
    parts = set(filter(None, options.only.split(",")))
    names = {*CHIPS, "cpu", "axes", "models"}
    groups = (names, set(KINDS), {*SHAPES, *SMOKE_SHAPES}, set(MODELS))
    if unknown := parts - set().union(*groups):
        raise ValueError(f"only: expected parts as in its help, got {', '.join(sorted(unknown))}")

    def chosen(name: str) -> bool:
        """Whether it was named, or nothing of its kind was."""
        group = next(group for group in groups if name in group)
        return name in parts or not parts & group

    kinds = [kind for kind in KINDS if chosen(kind)]
    if "axes" in parts:
        chips.prepare(chips.parse_chip("cpu:8"), "")
        gathers = _axes_rows(list(MESHES), kinds)
        return suite.Result(rows=gathers, bars=_axes_bars(gathers), pictures={})
    rows: list[dict[str, Any]] = []
    for chip_name in filter(chosen, named):
        chip = chips.parse_chip(named[chip_name])
        chips.prepare(chip, "data:1")
        if "models" in parts:
            path = epath.Path(options.directory) / "kernels" / f"{chip_name}.json"
            rows += _models(path, chip, kinds, list(filter(chosen, MODELS)))
            continue
        for size in filter(chosen, shapes):
            for kind in kinds:
                items = []
                for name, loss in forms(kind).items():
                    if chip.kind == "cpu" and name in _KERNELS and not name.startswith("ours"):
                        continue
                    items.append(_kept(options, name, kind, shapes[size], chip, loss))
                _compare(items)
                rows += items
    (epath.Path(options.directory) / _PARTS).rmtree(missing_ok=True)
    return suite.Result(rows=rows, bars=_bars(rows), pictures={"accelerator": picture(rows)})


def picture(rows: Sequence[Mapping[str, Any]]) -> figures.Picture:
    """Memory and estimated time beside dense's; the compiler estimates no time for kernels."""
    panels: dict[str, list[figures.Series]] = {}
    for row in rows:
        if row.get("cycles / dense"):
            of = f"{row['chip']}, {row['loss']}, {row['T']} x {row['H']} x {row['V']}"
            points = [[(row["temp / dense"], row["cycles / dense"])]]
            series = figures.Series(name=row["form"], runs=points, line=False)
            panels.setdefault(of, []).append(series)
    return figures.Picture(
        panels=[
            figures.Panel(
                x="scratch memory / dense's",
                y="estimated time / dense's",
                title=of,
                log="x",
                series=series,
                names="beside",
            )
            for of, series in panels.items()
        ],
        columns=2,
    )

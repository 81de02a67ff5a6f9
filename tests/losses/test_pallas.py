"""The kernels of a sweep's forward half: interpreted, and compiled for chips that are not there."""

import functools
import importlib.util
import math
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import losses, ops
from logitjax.losses import Blocks, Head, sweep
from logitjax.losses.sweep import _bins, _pallas, _tiles
from tests._marks import EVERY_CHANGE

HIDDEN = 16


def _case(vocab, length=35, seed=0):
    """Rows that end inside a tile, an entry that cannot be, the last entry as a label, a mask."""
    rng = np.random.default_rng(seed)
    x, tx = (rng.normal(size=(2, length, HIDDEN)).astype(np.float32) for _ in range(2))
    w, tw = (rng.normal(size=(vocab, HIDDEN)).astype(np.float32) for _ in range(2))
    labels = rng.integers(0, vocab, (2, length)).astype(np.int32)
    labels[0, 0] = vocab - 1
    bias, where = rng.normal(size=vocab).astype(np.float32), rng.random(vocab) < 0.8
    where[labels] = True
    bias[~where & (rng.random(vocab) < 0.5)] = -np.inf
    weights = rng.normal(size=(2, length)).astype(np.float32)
    return x, w, tx, tw.T, bias, labels, where, weights


def _cross_entropy(case, x, w, **options):
    bias, labels, where = case[4:7]
    head = Head(w, bias, vocab_axis=0, soft_cap=5.0)
    return losses.linear_cross_entropy(
        x, head, labels, z_loss=0.01, temperature=1.3, vocab_where=where, **options
    )


def _readout(case, x, w, **options):
    out = losses.linear_readout(
        x, Head(w, vocab_axis=0), labels=case[5], vocab_where=case[6], **options
    )
    return out.cross_entropy


def _cached(case):
    # In one tile and in several; of a small vocabulary some are the same.
    ids = np.stack([case[5] // (n + 1) for n in range(5)], -1)
    values = np.float32(-np.arange(5.0)) + np.zeros(ids.shape, np.float32)
    return ops.TopK(values, ids, np.full(ids.shape[:-1], 1.5, np.float32))


def _sparse(case, x, w, **options):
    head = Head(w, vocab_axis=0)
    return losses.linear_sparse_kl_divergence(x, head, _cached(case), **options)


def _teacher(case, x, w, **options):
    sides = (case[2], Head(case[3], vocab_axis=1)), {"labels": case[5]}
    reading = sweep.run(
        sweep.TeacherStatistic(),
        x,
        Head(w, vocab_axis=0),
        teacher=sides[0],
        tokens=sides[1],
        vocab_where=case[6],
        **options,
    )
    return reading.label + 2.0 * reading.entropy


def _of_two(loss, **settings):
    def call(case, x, w, **options):
        heads = Head(w, vocab_axis=0), Head(case[3], vocab_axis=1)
        return loss(x, heads[0], case[2], heads[1], vocab_where=case[6], **settings, **options)

    return call


LOSSES = {
    "cross_entropy": _cross_entropy,
    "readout": _readout,
    "kl": _of_two(losses.linear_kl_divergence, temperature=2.0),
    "reverse_kl": _of_two(losses.linear_kl_divergence, direction="reverse"),
    "jensen_shannon": _of_two(losses.linear_generalized_jensen_shannon),
    "sparse_kl": _sparse,
    "teacher": _teacher,
}


def _dense(loss, **settings):
    def call(case, z, t, **options):
        return loss(z, t, vocab_where=case[6], **settings)

    return call


def _teacher_of_logits(case, z, t):
    log_p = jax.nn.log_softmax(jnp.where(case[6], t, -jnp.inf))
    label = jnp.take_along_axis(log_p, case[5][..., None], -1)[..., 0]
    return label - 2.0 * (jnp.exp(log_p) * jnp.where(case[6], log_p, 0.0)).sum(-1) + 0.0 * z.sum(-1)


def _capped(case, z):
    return 5.0 * jnp.tanh((z + case[4]) / 5.0) / 1.3


# The same of logits, student's and teacher's.
DENSE = {
    "cross_entropy": lambda case, z, t: losses.cross_entropy(
        _capped(case, z), case[5], z_loss=0.01, vocab_where=case[6] & (case[4] > -np.inf)
    ),
    "readout": lambda case, z, t: losses.cross_entropy(z, case[5], vocab_where=case[6]),
    "kl": _dense(losses.kl_divergence, temperature=2.0),
    "reverse_kl": _dense(losses.kl_divergence, direction="reverse"),
    "jensen_shannon": _dense(losses.generalized_jensen_shannon),
    "sparse_kl": lambda case, z, t: losses.sparse_kl_divergence(z, _cached(case)),
    "teacher": _teacher_of_logits,
}


def _by(engine, case, names=tuple(LOSSES), gradients=True):
    """Losses, and the gradients of their sums with unequal weights, in one program."""
    # What is read has no weights.
    names = [name for name in names if engine != "rows" or name not in ("readout", "teacher")]

    def one(loss, x, w):
        def total(x, w):
            if engine == "dense":
                losses_by_row = loss(case, x @ w.T, case[2] @ case[3])
            elif engine == "rows":
                blocks = Blocks(engine=engine)
                return loss(case, x, w, weights=case[7], blocks=blocks), None
            else:
                losses_by_row = loss(case, x, w, blocks=Blocks(engine=engine))
            return (losses_by_row * case[7]).sum(), losses_by_row

        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, w) if gradients else total(x, w)

    def run(x, w):
        table = DENSE if engine == "dense" else LOSSES
        return {name: one(table[name], x, w) for name in names}

    return jax.device_get(jax.jit(run)(*case[:2]))


def _assert_close(got, want, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.abs(a - b).max() <= rtol * max(1.0, np.abs(b).max())


def _by_float64(case, names):
    with jax.enable_x64(True):
        wide = [x if x.dtype in (np.int32, np.bool_) else x.astype(np.float64) for x in case]
        return _by("dense", wide, names)


def _off(got, want):
    """The largest error of a gradient, over its norm."""
    pairs = [(a, b) for name in want for a, b in zip(got[name][1], want[name][1], strict=True)]
    return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1.0) for a, b in pairs)


RACED = ("cross_entropy", "kl", "sparse_kl")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(_tiles, "_ROWS", (32,))
    monkeypatch.setattr(_tiles, "_COLUMNS", (128,))


@pytest.mark.usefixtures("small_tiles")
def test_kernels_give_what_blocks_give():
    case, names = _case(300), ("cross_entropy", "jensen_shannon")
    # A position that does not count, of hidden states that are none.
    case[0][1, 3], case[7][1, 3] = np.nan, 0.0
    got, want = (_by(engine, case, names) for engine in ("pallas", "scan"))
    _assert_close(*(jax.tree.map(np.nan_to_num, leaves) for leaves in (got, want)))


@pytest.mark.slow
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("vocab", [1, 127, 128, 257, 1000, 1111])
def test_all_engines_give_what_float64_gives_at_every_edge(vocab):
    case = _case(vocab, length=3, seed=vocab)
    # Logits of about one: of larger ones float32 loses more, dense too.
    for hidden in (case[0], case[2]):
        hidden *= 0.25
    # A whole tile that does not exist, and labels that do.
    case[6][128:256] = False
    case[6][case[5]] = True
    names = tuple(LOSSES)
    want = _by_float64(case, names)
    totals = {name: (value[0], slopes) for name, (value, slopes) in want.items()}
    _assert_close(_by("scan", case, names), want)
    outputs = _by("pallas", case, names)
    _assert_close(outputs, want)
    assert _off(outputs, want) < 1e-6
    got = {name: (value[0], slopes) for name, (value, slopes) in _by("rows", case, names).items()}
    _assert_close(got, {name: totals[name] for name in got})


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.usefixtures("small_tiles")
def test_gradients_of_bfloat16_are_within_a_hundredth_of_float64():
    case = _case(300, length=3)
    case = tuple(x.astype(jnp.bfloat16) for x in case[:4]) + case[4:]
    assert _off(_by("pallas", case), _by_float64(case, tuple(LOSSES))) < 1e-2


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("on_wait", "cross_entropy"),
        *(pytest.param("on_wait", name, marks=pytest.mark.slow) for name in ("kl", "sparse_kl")),
        *(pytest.param("eager", name, marks=pytest.mark.slow) for name in RACED),
    ],
)
def test_copies_race_with_nothing_and_are_those_that_the_cost_counts(monkeypatch, mode, name):
    # No public name tells what the interpreter saw.
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    params = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", dma_execution_mode=mode
    )
    monkeypatch.setattr(_pallas, "INTERPRET", params)
    case = _case(300)
    run = jax.jit(functools.partial(LOSSES[name], case, blocks=Blocks(engine="pallas")))
    (call,) = _calls(jax.make_jaxpr(run)(*case[:2]).jaxpr)
    assert np.isfinite(run(*case[:2])).all()
    races: Any = interpreter.races
    assert not races.races_found
    copies = [
        copy
        for accesses in (races.reads, races.writes)
        for memory, moves in accesses.items()
        if memory[0] == "hbm"
        for copy in moves
        if len(copy[3]) == 2
    ]
    # What is read at last, whole, are the results.
    shapes = [v.aval.shape for v in call.outvars]
    ends = [tuple(slice(0, n, 1) for n in shape) for shape in shapes]
    copied = [copy[3] for copy in copies if copy[3] not in ends]
    sizes = [int(np.prod([s.stop - s.start for s in slices])) for slices in copied]
    cost = call.params["cost_estimate"]
    assert cost.flops == 2 * 70 * 300 * HIDDEN * (2 if name == "kl" else 1)
    # Tiles reach over the ends of arrays: 96 rows for 70, 384 columns for 300.
    assert cost.bytes_accessed <= 4 * sum(sizes) <= 1.4 * cost.bytes_accessed


def _calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _calls(inner)


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.usefixtures("small_tiles")
def test_vocabulary_shards_are_joined_and_second_derivatives_and_vmap_are_those_of_blocks():
    # Of a shard's 38 columns the tile reaches over its end, where the next one's ids begin.
    case = _case(304, length=3)
    case[5][1] = [38, 39, 37]
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    x, w, labels = case[0], case[1], case[5]

    def total(x, w, engine, axis_name=None):
        head = Head(w, vocab_axis=0)
        blocks = Blocks(engine=engine)
        nll = losses.linear_cross_entropy(x, head, labels, blocks=blocks, axis_name=axis_name)
        return (nll * case[7]).sum()

    def shard(x, w):
        return total(x, w, "pallas", "tensor")

    # The interpreter's own loop does not pass the check; compiled kernels do (see below).
    split = jax.shard_map(
        shard, mesh=mesh, in_specs=(P(), P("tensor")), out_specs=P(), check_vma=False
    )

    def curvature(engine, x, w):
        slope = jax.grad(functools.partial(total, engine=engine))
        return jax.grad(lambda x: (slope(x, w) ** 2).sum())(x)

    def run(x, w):
        sharded = jax.value_and_grad(split, (0, 1))(x, w)
        local = jax.value_and_grad(functools.partial(total, engine="scan"), (0, 1))(x, w)
        curved = [curvature(engine, x, w) for engine in ("pallas", "scan")]
        many = [
            jax.vmap(jax.grad(lambda w, e=e: total(x, w, e)))(jnp.stack([w, 2 * w]))
            for e in ("pallas", "scan")
        ]
        return (sharded, curved[0], many[0]), (local, curved[1], many[1])

    _assert_close(*jax.device_get(jax.jit(run)(x, w)))


def _largest(engine, x, w, bias, where, k):
    head = Head(w, bias, vocab_axis=0)
    blocks = Blocks(engine=engine)
    return losses.linear_readout(x, head, top_k=k, vocab_where=where, blocks=blocks).statistics


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.usefixtures("small_tiles")
def test_the_largest_come_by_bins_and_rows_that_dropped_one_are_read_again(monkeypatch):
    monkeypatch.setattr(_bins, "_LEAST_BINS", 128)
    x, w, *_, where, _ = _case(700, length=40)
    # Columns of one bin that many rows want: the bin drops some of them.
    crowded = np.zeros(700, np.float32)
    crowded[[5 + 128 * i for i in range(5)]] = 50.0
    ties = np.round(w), np.round(x)
    x[1, 7, 3] = np.nan  # which no comparison lets in, and a sort puts first

    def run(engine):
        hot = jnp.broadcast_to(jnp.where(jnp.arange(40) < 2, 1.0, 0.0)[:, None], (2, 40, 1))
        few = jnp.concatenate([x, hot], -1)
        wide = jnp.concatenate([w, crowded[:, None]], -1)
        return (
            _largest(engine, few, wide, None, where, 6),
            _largest(engine, x, w, crowded, None, 6),
            _largest(engine, ties[1], ties[0], None, None, 6),
        )

    got, want = (jax.device_get(jax.jit(functools.partial(run, e))()) for e in ("pallas", "scan"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.indices, b.indices)
        np.testing.assert_allclose(a.values, b.values, rtol=1e-5)
        np.testing.assert_allclose(a.std, b.std, rtol=1e-5)


@pytest.mark.usefixtures("small_tiles")
def test_a_statistic_whose_gradient_no_kernel_can_form_has_that_of_blocks():
    class Sorted(sweep.KLStatistic):
        gradient_in_tiles = False

    x, w, tx, tw, *_ = _case(130, length=3)

    def gradient(statistic, engine):
        def total(w):
            blocks = Blocks(engine=engine)
            return sweep.run(statistic, x, w, teacher=(tx, tw), blocks=blocks).sum()

        return jax.jit(jax.grad(total))

    of_kernels = gradient(Sorted(), "pallas")
    # The forward half is a kernel still, where the other has three.
    assert [
        len(list(_calls(jax.make_jaxpr(f)(w).jaxpr)))
        for f in (of_kernels, gradient(sweep.KLStatistic(), "pallas"))
    ] == [1, 3]
    _assert_close(of_kernels(w), gradient(Sorted(), "scan")(w))


def test_what_no_kernel_can_do_is_refused():
    class Sorted(sweep.KLStatistic):
        in_tiles = False

    x, w = np.ones((2, 3), np.float32), np.ones((3, 4), np.float32)
    refusal = r"blocks\.engine: expected 'scan' or 'rows' for Sorted, which no kernel can absorb"
    with pytest.raises(ValueError, match=refusal):
        sweep.run(Sorted(), x, w, teacher=(x, w), blocks=Blocks(engine="pallas"))
    gpu = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match="on a GPU, got"):
        jax.eval_shape(lambda: losses.linear_cross_entropy(x, w, np.ones(2, int), **GIVEN))
    with pytest.raises(ValueError, match=r"blocks\.engine: .* too wide for a tile, got 'pallas'"):
        _tiles.choose_tiles(4096, 1000, lambda rows, columns: rows * 1_000_000, [(128, 128)])


def _tpu_mesh(topology, sides, names):
    from jax.experimental import topologies

    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    devices = np.array(devices[: math.prod(sides)]).reshape(sides)
    return Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))


def _large(sharding=None, rows=4096, width=1024, vocab=151936):
    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    side = array(rows, width), array(vocab, width)
    ids = (array(rows, dtype=jnp.int32), array(rows, 64, dtype=jnp.int32))
    return side + side + ids


GIVEN: dict[str, Any] = {"temperature": 2.0, "blocks": Blocks(engine="pallas")}


def _every_statistic(x, w, tx, tw, labels, ids):
    top = losses.linear_readout(x, w, labels=labels, top_k=64, **GIVEN).statistics
    gathered = losses.linear_readout(x, w, ids=ids, **GIVEN).gathered
    capped = Head(w, jnp.zeros(w.shape[0], w.dtype), soft_cap=30.0)
    two = (x, w, tx, tw)
    return (
        losses.linear_cross_entropy(
            x,
            capped,
            labels,
            label_smoothing=0.1,
            z_loss=1e-4,
            vocab_where=jnp.arange(len(w)) > 3,
            **GIVEN,
        ),
        losses.linear_kl_divergence(*two, **GIVEN),
        losses.linear_kl_divergence(*two, direction="reverse", **GIVEN),
        losses.linear_generalized_jensen_shannon(*two, **GIVEN),
        top.values,
        gathered,
    )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")
@pytest.mark.parametrize(
    "topology", ["v5e:1x1", pytest.param("v5p:1x1x1", marks=EVERY_CHANGE), "v6e:1x1", "tpu7x:2x2x1"]
)
def test_every_statistic_compiles_for_a_tpu_and_holds_no_logits(topology):
    mesh = _tpu_mesh(topology, (1,), ("data",))
    # The lowering of a kernel asks the mesh for its device, where the default one is no TPU.
    with jax.set_mesh(mesh):
        traced = jax.jit(_every_statistic).trace(*_large(NamedSharding(mesh, P())))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    # A number a position takes the lanes of a register; the bins for the 64 largest take 64 MiB;
    # dense has 2,374 MiB of logits a side.
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 256 * 2**20


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")
@pytest.mark.parametrize(
    ("topology", "name"),
    [
        pytest.param("v5p:1x1x1", "cross_entropy", marks=EVERY_CHANGE),
        ("v5p:1x1x1", "jensen_shannon"),
        ("v6e:1x1", "cross_entropy"),
        ("v6e:1x1", "jensen_shannon"),
    ],
)
def test_a_step_compiles_for_a_tpu_and_holds_a_mebibyte(topology, name):
    def loss(x, w, tx, tw, labels):
        if name == "cross_entropy":
            return losses.linear_cross_entropy(x, w, labels, **GIVEN).sum()
        return losses.linear_generalized_jensen_shannon(x, w, tx, tw, **GIVEN).sum()

    mesh = _tpu_mesh(topology, (1,), ("data",))
    given = _large(NamedSharding(mesh, P()), rows=8192, width=4096, vocab=131072)[:-1]
    with jax.set_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*given)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes <= 2**20


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")
def test_kernels_are_split_over_a_mesh_whose_axes_are_checked():
    mesh = _tpu_mesh("v5p:2x2x1", (2, 2), ("fsdp", "tensor"))

    def array(shape, *spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    hidden = array((8, 512, 1024), "fsdp")
    labels = array((8, 512), "fsdp", dtype=jnp.int32)

    def loss(hidden, kernel, labels):
        blocks = Blocks(engine="pallas")
        return losses.linear_cross_entropy(hidden, kernel, labels, blocks=blocks).sum()

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1)))
        traced = step.trace(hidden, array((1024, 151936), "fsdp", "tensor"), labels)
        text = traced.lower().compile().as_text() or ""
    # The head is gathered over `fsdp` once; its shards share a largest logit and two sums.
    assert len(re.findall(r" = \S+ all-gather(?:-start)?\(", text)) == 1
    kernels = set(re.findall(r"logitjax_(state|hidden|head)_\d+x\d+", text))
    assert kernels == {"state", "hidden", "head"}

"""Blocked losses on 8 devices: vocabulary-parallel, gathered heads, Auto and Explicit meshes."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import losses, ops
from tests._compiled import compiled
from tests._marks import EVERY_CHANGE

BATCH, LENGTH, HIDDEN, VOCAB = 4, 6, 8, 4 * 50
BLOCKS = losses.Blocks(vocab=24, tokens=4)


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, W = _normal(0, BATCH, LENGTH, HIDDEN), _normal(1, HIDDEN, VOCAB)
TX, TW = _normal(2, BATCH, LENGTH, HIDDEN), _normal(3, HIDDEN, VOCAB)
Y = np.random.default_rng(4).integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
WEIGHTS = _normal(5, BATCH, LENGTH)
TEACHER = jax.device_get(compiled(ops.TopK.of)(TX @ TW, 7))


def _mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))


def _other_scalar(x, w, y, weights, tx, tw, teacher, axis_name=None):
    # By the other engine, whose weights come after the sweep.
    blocks = losses.Blocks(vocab=24, tokens=4, engine="scan")
    options = dict(weights=weights, axis_name=axis_name, blocks=blocks)
    return losses.linear_sparse_kl_divergence(x, w, teacher, **options)


def _others(x, w, y, weights, tx, tw, teacher, axis_name=None):
    """One number per position that depends on the losses that the forms below lack."""
    options = dict(axis_name=axis_name, blocks=BLOCKS)
    total = losses.linear_cross_entropy(x, w, y, label_smoothing=0.1, z_loss=0.01, **options)
    total += losses.linear_generalized_jensen_shannon(x, w, tx, tw, **options)
    return total + losses.linear_total_variation(x, w, tx, tw, **options)


def _unreduced(x, w, y, weights, tx, tw, teacher, axis_name=None):
    """Two heads, and all that one sweep may give: what a mesh lays out is the same for others."""
    options = dict(axis_name=axis_name, blocks=BLOCKS)
    total = losses.linear_kl_divergence(x, w, tx, tw, direction="reverse", **options)
    readout = losses.linear_readout(x, w, labels=y, ids=teacher.indices, top_k=5, **options)
    s = readout.statistics
    total += losses.sparse_kl_divergence(readout.gathered_top_k(teacher.indices), teacher)
    return total + s.std + s.mean + jnp.cos(s.values + s.indices).sum(-1)


def _scalar(x, w, y, weights, tx, tw, teacher, axis_name=None):
    options = dict(axis_name=axis_name, blocks=BLOCKS)

    def loss(readout, teacher):
        student = readout.gathered_top_k(teacher.indices)
        return losses.sparse_kl_divergence(student, teacher) + 0.5 * readout.cross_entropy

    total = losses.linear_kl_divergence(x, w, tx, tw, weights=weights, **options)
    return (
        total
        + losses.linear_fused_loss(
            x, w, loss, teacher, weights, labels=y, ids=teacher.indices, **options
        )[0]
    )


ARGUMENTS = (X, W, Y, WEIGHTS, TX, TW, TEACHER)


FORMS = {
    "scalar": _scalar,
    "other_scalar": _other_scalar,
    "unreduced": lambda *a, **o: (_unreduced(*a, **o) * a[3]).sum(),
    "others": lambda *a, **o: (_others(*a, **o) * a[3]).sum(),
}
TOGETHER = {"everything": ("others", "unreduced"), "every_scalar": ("other_scalar", "scalar")}


def _loss(form, *arguments, **options):
    return sum(FORMS[part](*arguments, **options) for part in TOGETHER.get(form, (form,)))


@functools.cache
def _local():
    """Values and gradients of each form on one device, in one program."""

    def run(*arguments):
        return {name: jax.value_and_grad(f, (0, 1))(*arguments) for name, f in FORMS.items()}

    return jax.device_get(jax.jit(run)(*ARGUMENTS))


def _expected(form):
    parts = [_local()[part] for part in TOGETHER.get(form, (form,))]
    return jax.tree.map(lambda *x: sum(x), *parts)


def _close(got, want):
    got = jax.device_get(got)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for a, b in zip(got[1], want[1], strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()


def _vocabulary_parallel(form, check_vma):
    head = P(None, "tensor")
    rows = P("data")

    def local(*arguments):
        return lax.psum(_loss(form, *arguments, axis_name="tensor"), "data")

    return jax.shard_map(
        local,
        mesh=_mesh(),
        in_specs=(rows, head, rows, rows, rows, head, rows),
        out_specs=P(),
        check_vma=check_vma,
    )


@pytest.mark.parametrize("form", ["everything", pytest.param("every_scalar", marks=EVERY_CHANGE)])
def test_vocabulary_parallel_equals_local(form):
    run = jax.jit(jax.value_and_grad(_vocabulary_parallel(form, True), (0, 1)))
    _close(run(*ARGUMENTS), _expected(form))


def test_vocabulary_parallel_without_vma_checks():
    run = jax.jit(jax.value_and_grad(_vocabulary_parallel("scalar", False), (0, 1)))
    _close(run(*ARGUMENTS), _expected("scalar"))


def test_vocabulary_parallel_kl_needs_few_reductions_and_gathers_no_logits():
    rows, head = P(), P(None, "tensor")
    eight = losses.Blocks(vocab=8)

    def local(x, w, tx, tw):
        return losses.linear_kl_divergence(x, w, tx, tw, axis_name="tensor", blocks=eight).sum()

    run = jax.shard_map(local, mesh=_mesh(), in_specs=(rows, head, rows, head), out_specs=P())
    compiled = jax.jit(jax.value_and_grad(run, (0, 1))).lower(X, W, TX, TW).compile()
    text = compiled.as_text()
    assert "all-gather" not in text
    # Two maxima, two sums, the values, the gradient of the hidden states: not per block.
    assert (
        0 < len(re.findall(r"= \S+ all-reduce(?:-start)?\(|\) all-reduce(?:-start)?\(", text)) <= 6
    )


def test_heads_gathered_over_fsdp():
    def local(x, w, y, weights, tx, tw, teacher):
        w = lax.all_gather(w, "data", axis=0, tiled=True)
        arguments = (x, w, y, weights, tx, tw, teacher)
        return lax.psum(_loss("scalar", *arguments, axis_name="tensor"), "data")

    rows = P("data")
    run = jax.shard_map(
        local,
        mesh=_mesh(),
        in_specs=(rows, P("data", "tensor"), rows, rows, rows, P(None, "tensor"), rows),
        out_specs=P(),
    )
    _close(jax.jit(jax.value_and_grad(run, (0, 1)))(*ARGUMENTS), _expected("scalar"))


@pytest.mark.parametrize("form", ["unreduced", "scalar"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_sharded_under_jit(kind, form):
    mesh = _mesh(kind)
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    shardings = (rows, whole, rows, rows, rows, whole, rows)
    placed = tuple(
        jax.tree.map(lambda leaf, s=s: jax.device_put(leaf, s), a)
        for a, s in zip(ARGUMENTS, shardings, strict=True)
    )
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(functools.partial(_loss, form), (0, 1)))(*placed)
    _close(got, _expected(form))


def _collectives_by_place(mesh, form, known):
    """Collectives (in loops, outside of loops) of a step whose head lies as FSDP lays it."""
    layouts = (("fsdp",), ("fsdp", "tensor"), ())
    rows, head, whole = (NamedSharding(mesh, P(*axes)) for axes in layouts)
    shardings = (rows, head, rows, rows, rows, whole, rows)
    placed = tuple(
        jax.tree.map(lambda leaf, s=s: jax.device_put(leaf, s), a)
        for a, s in zip(ARGUMENTS, shardings, strict=True)
    )
    step = jax.jit(
        jax.value_and_grad(functools.partial(_loss, form), (0, 1)),
        out_shardings=(whole, (rows, head)),
    )
    with jax.set_mesh(mesh) if known else contextlib.nullcontext():
        compiled = step.lower(*placed).compile()
    _close(compiled(*placed), _expected(form))
    loops, _, entry = compiled.as_text().partition("\nENTRY")
    kinds = r" (?:all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\("
    return len(re.findall(kinds, loops)), len(re.findall(kinds, entry))


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.parametrize("form", ["unreduced", "scalar"])
def test_a_known_mesh_gathers_the_head_and_sums_its_gradient_once_a_sweep(form):
    devices = jax.devices()[:4]
    for sizes in ((4, 1), (2, 2)):
        mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=devices)
        inside, outside = _collectives_by_place(mesh, form, known=True)
        assert outside > 0
        # Split over the vocabulary the scalar form sums over its shards for every block of
        # positions, numbers of the positions only.
        if form == "unreduced" or sizes[1] == 1:
            assert inside == 0
        # What this is for: left alone the compiler puts them into the loops.
        if form == "scalar":
            assert _collectives_by_place(mesh, form, known=False)[0] > inside


@pytest.mark.parametrize("sizes", [(8, 1), (2, 3)], ids=["rows", "vocabulary"])
def test_what_the_mesh_does_not_divide_is_left_to_the_compiler(sizes):
    devices = jax.devices()[: math.prod(sizes)]
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(functools.partial(_loss, "scalar"), (0, 1)))(*ARGUMENTS)
    _close(got, _expected("scalar"))


def test_a_known_mesh_outside_of_jit():
    with jax.set_mesh(_mesh()):
        got = losses.linear_cross_entropy(X, W, Y, weights=WEIGHTS)
    want = (np.asarray(compiled(losses.cross_entropy)(X @ W, Y)) * WEIGHTS).sum()
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sharded_vocabulary_on_an_explicit_mesh_is_an_error_that_names_axis_name():
    mesh = _mesh(AxisType.Explicit)
    head = jax.device_put(W, NamedSharding(mesh, P(None, "tensor")))
    x, y = (jax.device_put(a, NamedSharding(mesh, P())) for a in (X, Y))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="axis_name='tensor'"):
        jax.jit(losses.linear_cross_entropy)(x, head, y)


def test_data_parallel_under_pmap():
    def step(w, x, y):
        gradient = jax.grad(lambda w: losses.linear_cross_entropy(x, w, y, blocks=BLOCKS).mean())(w)
        return lax.pmean(gradient, "data")

    run = jax.pmap(step, axis_name="data", in_axes=(None, 0, 0), devices=jax.devices()[:4])
    want = jax.jit(jax.grad(lambda w: losses.cross_entropy(X @ w, Y).mean()))(W)
    np.testing.assert_allclose(np.asarray(run(W, X, Y))[0], want, atol=1e-6)

"""Blocked losses on 8 devices: vocabulary-parallel, gathered heads, Auto and Explicit meshes."""

import contextlib
import functools
import math
import re
from typing import Any

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
    return total + losses.linear_generalized_jensen_shannon(x, w, tx, tw, **options)


def _unreduced(x, w, y, weights, tx, tw, teacher, axis_name=None):
    """Two heads, and all that one sweep may give: what a mesh lays out is the same for others."""
    options = dict(axis_name=axis_name, blocks=BLOCKS)
    total = losses.linear_kl_divergence(x, w, tx, tw, direction="reverse", **options)
    readout = losses.linear_readout(x, w, labels=y, ids=teacher.indices, top_k=5, **options)
    s = readout.statistics
    total += losses.sparse_kl_divergence(readout, teacher)
    return total + s.std + s.mean + jnp.cos(s.values + s.indices).sum(-1)


def _scalar(x, w, y, weights, tx, tw, teacher, axis_name=None):
    options = dict(axis_name=axis_name, blocks=BLOCKS)

    def loss(readout, teacher):
        return losses.sparse_kl_divergence(readout, teacher) + 0.5 * readout.cross_entropy

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
        return {name: jax.value_and_grad(f, (0, 1, 3))(*arguments) for name, f in FORMS.items()}

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
    run = jax.jit(jax.value_and_grad(_vocabulary_parallel(form, True), (0, 1, 3)))
    _close(run(*ARGUMENTS), _expected(form))


def test_vocabulary_parallel_without_vma_checks():
    run = jax.jit(jax.value_and_grad(_vocabulary_parallel("scalar", False), (0, 1, 3)))
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


def test_second_derivatives_go_through_a_split_vocabulary():
    mesh = jax.make_mesh((4,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:4])

    def curvature(w):
        def slope(w):
            loss = losses.linear_kl_divergence(X[0], w, TX[0], TW, blocks=losses.Blocks(vocab=50))
            return jnp.square(loss).sum()

        return jnp.square(jax.grad(slope)(w)).sum()

    with jax.set_mesh(mesh):
        split = jax.jit(jax.grad(curvature))(W)
    whole = jax.jit(jax.grad(curvature))(W)
    assert np.abs(split - whole).max() < 1e-4 * np.abs(whole).max()


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
    _close(jax.jit(jax.value_and_grad(run, (0, 1, 3)))(*ARGUMENTS), _expected("scalar"))


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
        got = jax.jit(jax.value_and_grad(functools.partial(_loss, form), (0, 1, 3)))(*placed)
    _close(got, _expected(form))


# Axes of 2 x 4 devices, their kind, and how hidden states and the head lie.
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = {
    "ours": (("fsdp", "tensor"), AUTO, P("fsdp"), P("fsdp", "tensor")),
    "no_context": (("fsdp", "tensor"), AUTO, P("fsdp"), P("fsdp", "tensor")),
    "tunix": (("fsdp", "tp"), AUTO, P("fsdp"), P("fsdp", "tp")),
    "ragged": (("fsdp", "tp"), AUTO, P("fsdp"), P("fsdp")),
    "levanter": (("data", "model"), AUTO, P("data"), P(None, "model")),
    "named": (("replica", "mlp"), AUTO, P("replica"), P("replica", "mlp")),
    "sequence": (("fsdp", "context"), AUTO, P("fsdp", "context"), P("fsdp")),
    "explicit": (("fsdp", "tensor"), EXPLICIT, P("fsdp"), P("fsdp", "tensor")),
    "explicit_fsdp": (("fsdp", "tensor"), EXPLICIT, P("fsdp"), P(None, "fsdp")),
    "explicit_ragged": (("fsdp", "tp"), EXPLICIT, P("fsdp"), P("fsdp")),
}
NAMES = {
    "named": losses.MeshAxes(rows=("replica",), columns=("mlp",)),
    "explicit_ragged": losses.MeshAxes(columns=("tp",)),
}


@functools.cache
def _in_float64(vocab):
    """Cross-entropy with `WEIGHTS` and once more with a weight of 2, and its gradients."""
    x, w, y = X[:, :4].astype(np.float64), W[:, :vocab].astype(np.float64), Y[:, :4] % vocab
    p = np.exp(x @ w)
    p /= p.sum(-1, keepdims=True)
    hot, weights = np.eye(vocab)[y], WEIGHTS[:, :4] + 2.0
    slope = (p - hot) * weights[..., None]
    loss = -(weights * np.log((p * hot).sum(-1))).sum()
    return loss, (slope @ w.T, np.einsum("bth,btv->hv", x, slope))


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in ("ragged", "explicit") else EVERY_CHANGE) for n in MESHES],
)
def test_on_any_mesh_the_head_is_gathered_once_a_sweep_and_gradients_are_those_of_float64(name):
    axes, kind, rows, head = MESHES[name]
    mesh = jax.make_mesh((2, 4), axes, (kind,) * 2)
    vocab = VOCAB - 3 if "ragged" in name else VOCAB

    def step(x, w, y, weights):
        loss = functools.partial(losses.linear_cross_entropy, blocks=BLOCKS)
        return loss(x, w, y, weights=weights) + 2.0 * loss(x, w, y).sum()

    layouts = tuple(NamedSharding(mesh, spec) for spec in (rows, head, rows, rows))
    arrays = (X[:, :4], W[:, :vocab], Y[:, :4] % vocab, WEIGHTS[:, :4])
    placed = [jax.device_put(x, layout) for x, layout in zip(arrays, layouts, strict=True)]
    laid_out: Any = {} if kind == EXPLICIT else {"out_shardings": (None, layouts[:2])}
    run = jax.jit(jax.value_and_grad(step, (0, 1)), **laid_out)
    context = contextlib.nullcontext() if name == "no_context" else jax.set_mesh(mesh)
    with context, NAMES.get(name, losses.MeshAxes()).use():
        program = run.lower(*placed).compile()
    _close(program(*placed), _in_float64(vocab))
    loops, _, entry = program.as_text().partition("\nENTRY")
    kinds = r" (?:all-gather|reduce-scatter|all-to-all)(?:-start)?\("
    assert not re.search(kinds, loops)
    # Two sweeps. A gradient that the mesh does not divide is gathered as well.
    assert len(re.findall(r" all-gather(?:-start)?\(", entry)) <= (4 if vocab < VOCAB else 2)


def test_an_axis_that_nobody_names_is_warned_of():
    with pytest.raises(TypeError, match="rows"):
        losses.MeshAxes(rows="fsdp")  # pyright: ignore[reportArgumentType]
    mesh = jax.make_mesh((2, 4), ("fsdp", "mlp"), (AxisType.Auto,) * 2)
    loss = functools.partial(jax.eval_shape, losses.linear_cross_entropy, X, W, Y)
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="mlp: expected names of losses.Mesh"):
        loss()
    with jax.set_mesh(mesh), losses.MeshAxes(columns=("mlp",)).use():
        loss()


@pytest.mark.parametrize("sizes", [(8, 1), (2, 3)], ids=["rows", "vocabulary"])
def test_what_the_mesh_does_not_divide_is_padded(sizes):
    devices = jax.devices()[: math.prod(sizes)]
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"), (AxisType.Auto,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(functools.partial(_loss, "scalar"), (0, 1, 3)))(*ARGUMENTS)
    _close(got, _expected("scalar"))


def test_a_known_mesh_outside_of_jit():
    with jax.set_mesh(_mesh()):
        got = losses.linear_cross_entropy(X, W, Y, weights=WEIGHTS)
    want = (np.asarray(compiled(losses.cross_entropy)(X @ W, Y)) * WEIGHTS).sum()
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_data_parallel_under_pmap():
    def step(w, x, y):
        gradient = jax.grad(lambda w: losses.linear_cross_entropy(x, w, y, blocks=BLOCKS).mean())(w)
        return lax.pmean(gradient, "data")

    run = jax.pmap(step, axis_name="data", in_axes=(None, 0, 0), devices=jax.devices()[:4])
    want = jax.jit(jax.grad(lambda w: losses.cross_entropy(X @ w, Y).mean()))(W)
    np.testing.assert_allclose(np.asarray(run(W, X, Y))[0], want, atol=1e-6)

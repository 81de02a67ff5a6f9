"""The engines of a sweep: a statistic that the library does not know, ids, transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import losses
from logitjax.losses import sweep
from logitjax.losses.sweep import _ids, _weighted
from tests._marks import EVERY_CHANGE

BATCH, HIDDEN, VOCAB = 8, 6, 4 * 30
EXISTING = 110
BLOCKS = sweep.Blocks(vocab=16, tokens=3)


@dataclasses.dataclass(frozen=True)
class Entropy(sweep.Statistic):
    def start(self, batch, dtype, passed):
        return sweep.OnlineSums.start(batch, dtype, terms=1)

    def absorb(self, state, block, passed):
        exists = block.student > -jnp.inf
        return state.add(block.student, jnp.where(exists, block.student, 0.0))

    def reduce(self, state, axis_name, passed):
        return state.reduce(axis_name)

    def finish(self, state, passed):
        total, weighted = state.sums
        entropy = state.log_z - weighted / total
        return entropy, (state.log_z, entropy)

    def gradient(self, residuals, cotangents, block):
        log_z, entropy = (x[..., None] for x in residuals)
        log_p = block.student - log_z
        slope = jnp.exp(log_p) * (jnp.where(log_p > -jnp.inf, log_p, 0.0) + entropy)
        return -cotangents[..., None] * slope


def _normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


HIDDENS, WEIGHTS = _normal(0, BATCH, HIDDEN), _normal(1, BATCH)
HEAD = sweep.Head(
    _normal(2, HIDDEN, VOCAB),
    np.where(np.arange(VOCAB) < EXISTING, np.float32(0), -np.inf),
    vocab_axis=1,
)


def _dense(hidden, head):
    log_p = jax.nn.log_softmax(head.logits(hidden)[..., :EXISTING])
    return -((jnp.exp(log_p) * log_p).sum(-1) * WEIGHTS).sum()


def _unreduced(hidden, head, axis_name=None):
    values = sweep.run(Entropy(), hidden, head, blocks=BLOCKS, axis_name=axis_name)
    return (values * WEIGHTS).sum()


def _scalar(hidden, head, engine=None):
    blocks = dataclasses.replace(BLOCKS, engine=engine)
    return sweep.run(Entropy(), hidden, head, blocks=blocks, weights=WEIGHTS)[0]


def _scanned(hidden, head):
    return _scalar(hidden, head, "scan")


def _close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_a_statistic_of_ones_own_runs_in_both_forms_and_over_a_split_vocabulary():
    want = jax.jit(jax.value_and_grad(_dense, (0, 1)))(HIDDENS, HEAD)
    for form in (_unreduced, _scalar, _scanned):
        _close(jax.jit(jax.value_and_grad(form, (0, 1)))(HIDDENS, HEAD), want)
    mesh = jax.make_mesh((4,), ("tensor",), (AxisType.Auto,), devices=jax.devices()[:4])
    split = jax.shard_map(
        lambda hidden, head: _unreduced(hidden, head, "tensor"),
        mesh=mesh,
        in_specs=(P(), sweep.Head(P(None, "tensor"), P("tensor"), 1)),
        out_specs=P(),
    )
    _close(jax.jit(jax.value_and_grad(split, (0, 1)))(HIDDENS, HEAD), want)


def test_under_vmap_and_pmap():
    def entropy(hidden):
        return sweep.run(Entropy(), hidden, HEAD, blocks=BLOCKS)

    want = np.asarray(jax.jit(entropy)(HIDDENS))
    np.testing.assert_allclose(jax.jit(jax.vmap(entropy))(HIDDENS), want, rtol=1e-5)
    run = jax.pmap(lambda hidden: lax.psum(entropy(hidden), "data"), axis_name="data")
    np.testing.assert_allclose(np.asarray(run(HIDDENS[:, None]))[0, 0], want.sum(), rtol=1e-5)


@pytest.mark.parametrize("together", [1, 8])
def test_ids_found_by_comparison_are_those_of_gathers_and_scatters(monkeypatch, together):
    monkeypatch.setattr(_ids, "_COLUMNS", 256)
    rng = np.random.default_rng(0)
    # Of 600 columns from 1,000 on an earlier block had nine; tiles of 256 slide back at the end.
    logits = rng.normal(size=(2, 3, 600)).astype(np.float32)
    columns, first = np.arange(1000, 1600, dtype=np.int32), np.int32(9)
    logits[..., :9] = -np.inf
    ids = rng.integers(900, 1700, (2, 3, 40)).astype(np.int32)
    # The ends, the last that is repeated, ids that repeat, and a row that has none.
    ids[0, 0, :8] = [1008, 1009, 1599, 1600, 1599, 1009, -100, 1255]
    ids[1, 2] = 7
    values = rng.normal(size=(2, 3, 40)).astype(np.float32)

    def both(together, logits, values):
        block = sweep.LogitBlock(logits, None, columns, first, {}, together)
        return block.gather(ids), block.scatter(jnp.zeros_like(logits), ids, values)

    def slopes(together, logits, values):
        def total(logits, values):
            picked, placed = both(together, logits, values)
            return jnp.sin(picked).sum() + (placed * jnp.cos(jnp.maximum(logits, -9.0))).sum()

        return jax.grad(total, (0, 1))(logits, values)

    def run(logits, values):
        return [(both(n, logits, values), slopes(n, logits, values)) for n in (together, 0)]

    got, want = jax.device_get(jax.jit(run)(logits, values))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def _in_parts(loss, hidden, labels):
    """The sum over two halves of the positions, one after the other, as trainers save memory."""

    @jax.checkpoint
    def half(total, some):
        return total + loss(*some), None

    halves = (x.reshape(2, -1, *x.shape[1:]) for x in (hidden, labels))
    return lax.scan(half, jnp.float32(0), tuple(halves))[0]


@pytest.mark.parametrize(
    "engines", [("scan", "rows"), pytest.param(("pallas",), marks=EVERY_CHANGE)], ids=", ".join
)
def test_checkpoint_and_scan_change_no_gradient(engines):
    labels = np.arange(BATCH, dtype=np.int32)

    def run(hidden, head):
        gradients = []
        for engine in engines:
            weights = jnp.ones(BATCH // 2) if engine == "rows" else None

            def loss(hidden, labels, head=head, engine=engine, weights=weights):
                blocks = sweep.Blocks(engine=engine)
                options = {"blocks": blocks, "weights": weights}
                return losses.linear_cross_entropy(hidden, head, labels, **options).sum()

            gradients.append(jax.grad(lambda x, loss=loss: _in_parts(loss, x, labels))(hidden))
        dense = jax.grad(lambda x: losses.cross_entropy(head.logits(x), labels).sum())(hidden)
        return gradients, dense

    gradients, dense = jax.jit(run)(HIDDENS, HEAD)
    for gradient in gradients:
        np.testing.assert_allclose(gradient, dense, rtol=1e-4, atol=1e-6)


class _Model(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.head = nnx.Linear(HIDDEN, VOCAB, use_bias=False, rngs=rngs)


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.parametrize("engine", ["scan", "rows"])
def test_a_flax_model_on_an_explicit_mesh(engine):
    labels = np.arange(BATCH, dtype=np.int32)
    weights = WEIGHTS if engine == "rows" else None

    def loss(model, hidden, labels):
        blocks = sweep.Blocks(engine=engine)
        nll = losses.linear_cross_entropy(
            model.body(hidden), model.head.kernel[...], labels, weights=weights, blocks=blocks
        )
        return (nll * (1 if engine == "rows" else WEIGHTS)).sum()

    @nnx.jit
    def step(model, hidden, labels):
        value, slopes = nnx.value_and_grad(loss)(model, hidden, labels)
        return value, nnx.state(slopes)

    want = jax.device_get(step(_Model(nnx.Rngs(0)), HIDDENS, labels))
    devices = jax.devices()[:4]
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Explicit,), devices=devices)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P("data"))
        arrays = [jax.device_put(x, rows) for x in (HIDDENS, labels)]
        got = jax.device_get(step(_Model(nnx.Rngs(0)), *arrays))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_a_small_cotangent_is_not_rounded_before_it_scales_a_gradient():
    grad = jnp.linspace(1, 2, 64, dtype=jnp.bfloat16)
    anything = object.__new__(_weighted.Sweep)
    for count in (771, 1003, 1531):
        saved, cotangent = ((grad, grad), jnp.float32(0)), jnp.float32(1 / count)
        scaled = _weighted._backward(anything, saved, (cotangent, None))[0].student.hidden
        assert (scaled == (np.float32(grad) / np.float32(count)).astype(jnp.bfloat16)).mean() > 0.9

"""A statistic that the library does not know: the entropy of the softmax, in every form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from logitjax.losses import sweep

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

import inspect

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import ops
from logitjax.ops import gather_at
from tests._compiled import compiled

top_k, top_k_of = compiled(ops.top_k), compiled(ops.TopK.of)
lax_top_k = compiled(lax.top_k)


def assert_same(result, expected):
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype


def rows(seed=0, shape=(8, 300)):
    """Values full of ties, with padded rows."""
    values = np.random.default_rng(seed).normal(size=shape).round(1).astype(np.float32)
    values = values + 0.0  # no -0.0
    values[0] = -np.inf
    values[1, 3:] = -np.inf
    values[2, :-2] = -np.inf
    return values


@pytest.mark.parametrize("vocab", [300, 304])
@pytest.mark.parametrize("group_size", [8, 1000])
def test_equals_lax_top_k_with_its_tie_order(vocab, group_size):
    values = rows(shape=(8, vocab))
    assert_same(top_k(values, 5, group_size=group_size), lax_top_k(values, 5))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.int32])
def test_keeps_the_dtype(dtype):
    values = np.arange(300)[::-1].reshape(2, 150).astype(dtype)
    assert_same(top_k(values, 3, group_size=8), lax_top_k(values, 3))


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32, (3, 67), elements=st.sampled_from([0.0, 1.0, 2.0, -3.0, -np.inf, np.inf])
    )
)
def test_any_ties(values):
    assert_same(top_k(values, 4, group_size=8), lax_top_k(values, 4))


def test_whole_vocabulary():
    values = rows(shape=(4, 20))
    assert_same(top_k(values, 20), lax_top_k(values, 20))


@pytest.mark.many_programs("called eagerly, each operation is one")
def test_eager_jit_and_vmap():
    values = rows()
    expected = lax_top_k(values, 5)
    assert_same(ops.top_k(values, 5, group_size=8), expected)
    assert_same(top_k(values, 5, group_size=8), expected)
    assert_same(jax.jit(jax.vmap(lambda v: ops.top_k(v, 5, group_size=8)))(values), expected)


def test_gradient_scatters_to_the_chosen():
    values = np.random.default_rng(0).normal(size=(2, 100)).astype(np.float32)
    weights = np.arange(1, 4, dtype=np.float32)
    grad = jax.jit(jax.grad(lambda v: (top_k(v, 3, group_size=8)[0] * weights).sum()))(values)
    expected = np.zeros_like(values)
    np.put_along_axis(expected, np.argsort(-values)[:, :3], np.arange(1.0, 4.0), axis=-1)
    np.testing.assert_array_equal(grad, expected)


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_sharded(kind):
    mesh = mesh_of(kind)
    values = rows()
    sharded = jax.device_put(values, NamedSharding(mesh, P("data")))
    result = top_k(sharded, 5, group_size=8)
    assert_same(result, lax_top_k(values, 5))
    if kind == AxisType.Explicit:
        assert jax.typeof(result[0]).sharding.spec == P("data", None)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("k", [5, 40])
def test_vocabulary_sharded_in_shard_map(kind, k):
    """More candidates than one shard of 37 entries has, too."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(kind,))
    values = rows(shape=(8, 8 * 37))
    find = jax.shard_map(
        lambda v: top_k(v, k, axis_name="model", group_size=2),
        mesh=mesh,
        in_specs=P(None, "model"),
        out_specs=P(),
    )
    sharded = jax.device_put(values, NamedSharding(mesh, P(None, "model")))
    assert_same(jax.jit(find)(sharded), lax_top_k(values, k))

    weights = np.arange(1, k + 1, dtype=np.float32)
    finite = np.random.default_rng(1).normal(size=values.shape).astype(np.float32)

    def total(find):
        return lambda v: (find(v)[0] * weights).sum()

    grad = jax.jit(jax.grad(total(find)))(jax.device_put(finite, sharded.sharding))
    expected = jax.jit(jax.grad(total(lambda v: lax.top_k(v, k))))(finite)
    np.testing.assert_allclose(grad, expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shard_map_over_the_vocabulary_axis_only(kind):
    mesh = mesh_of(kind)
    values = rows()
    find = jax.shard_map(
        lambda v: top_k(v, 5, axis_name="model", group_size=8),
        mesh=mesh,
        in_specs=P(None, "model"),
        out_specs=P(),
        axis_names={"model"},
    )
    sharded = jax.device_put(values, NamedSharding(mesh, P("data", "model")))
    assert_same(jax.jit(find)(sharded), lax_top_k(values, 5))


def test_vocabulary_split_under_pmap():
    values = rows(shape=(4, 8 * 16))
    find = jax.pmap(lambda v: top_k(v, 5, axis_name="model"), axis_name="model")
    result = find(np.stack(np.split(values, 8, axis=-1)))
    assert_same((result[0][0], result[1][0]), lax_top_k(values, 5))


def test_sharded_vocabulary_without_axis_name_is_an_error():
    mesh = mesh_of(AxisType.Explicit)
    sharded = jax.device_put(rows(), NamedSharding(mesh, P("data", "model")))
    with pytest.raises(ValueError, match=r"axis_name='model' inside jax.shard_map"):
        top_k(sharded, 5)
    with pytest.raises(ValueError, match=r"^values: expected an unsharded vocabulary"):
        gather_at(sharded, np.zeros((8, 1), np.int32))


@pytest.mark.parametrize("k", [0, 301])
def test_k_outside_the_vocabulary(k):
    with pytest.raises(ValueError, match=f"k: expected 1 to .* 300, got {k}"):
        top_k(rows(), k)


def test_group_size_is_positive():
    with pytest.raises(ValueError, match="group_size: expected a positive number, got 0"):
        top_k(rows(), 1, group_size=0)


def test_top_k_of_is_a_pytree_of_log_probabilities():
    logits = rows()[3:].astype(jnp.bfloat16)
    top = top_k_of(logits, 4)
    assert top.values.dtype == jnp.float32
    np.testing.assert_allclose(top.log_z, compiled(ops.logsumexp)(logits), rtol=1e-6)
    gathered = compiled(gather_at)(logits, top.indices)
    np.testing.assert_array_equal(np.asarray(gathered, np.float32), top.values)
    assert jax.tree.map(jnp.shape, top).values == (5, 4)
    stacked = jax.jit(jax.vmap(lambda v: ops.TopK.of(v, 4)))(logits)
    np.testing.assert_array_equal(stacked.indices, top.indices)


def test_top_k_of_leaves_masked_entries_out():
    where = np.array([False, True, True])
    top = top_k_of(np.float32([3.0, 2.0, 1.0]), 2, vocab_where=where)
    np.testing.assert_array_equal(top.indices, [1, 2])
    np.testing.assert_allclose(top.log_z, np.log(np.exp(2) + np.exp(1)), rtol=1e-6)


def test_gather_at_across_shards():
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    values = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    ids = np.array([[0, 31], [5, 5], [17, 3], [8, 7]])
    weights = np.arange(8.0, dtype=np.float32).reshape(4, 2)

    def total(gather):
        return lambda v: (gather(v, ids) * weights).sum()

    gather = jax.shard_map(
        lambda v, ids: gather_at(v, ids, axis_name="model"),
        mesh=mesh,
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
    )
    np.testing.assert_array_equal(jax.jit(gather)(values, ids), np.take_along_axis(values, ids, -1))
    grads = [jax.jit(jax.grad(total(g)))(values) for g in (gather, gather_at)]
    np.testing.assert_array_equal(*grads)


def test_gather_at_checks_the_batch_axes():
    with pytest.raises(
        ValueError, match=r"^ids: expected shape \[8, k\], as of values, got \[7, 1\]"
    ):
        # Past the shape annotation, which only tests check.
        inspect.unwrap(gather_at)(rows(), np.zeros((7, 1), np.int32))

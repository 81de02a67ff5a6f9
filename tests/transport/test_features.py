"""Node features against a dense float64 oracle; sparse = dense, sharded = local."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from logitjax import transport
from tests._compiled import compiled

graph_features = compiled(transport.graph_features)

FEATURES = ("row_sum", "off_diagonal", "row_rms")
NODES = 12


def sparse_data():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, 8, 3)).astype(np.float32)
    ids = np.argsort(rng.random((2, 8, NODES)), -1)[..., :3].astype(np.int32)
    return values, ids, rng.random((2, 8)) < 0.8


def dense(values, ids):
    z = np.zeros((*values.shape[:-1], NODES))
    np.put_along_axis(z, ids, values.astype(np.float64), -1)
    return z


def oracle(z, where, feature):
    z = z * where[..., None]
    c = np.swapaxes(z, -1, -2) @ z
    if feature == "row_rms":
        return np.sqrt((c**2).mean(-1))
    if feature == "off_diagonal":
        return c.sum(-1) - np.diagonal(c, axis1=-2, axis2=-1)
    return c.sum(-1) if feature == "row_sum" else c.mean(-1)


@pytest.mark.parametrize("feature", FEATURES)
def test_sparse_and_dense_equal_the_oracle(feature):
    values, ids, where = sparse_data()
    z = dense(values, ids)
    dense_rows = (z, z[:, :, :6])  # more and fewer nodes than positions

    @jax.jit
    def run(values, ids, where, wide):
        of = functools.partial(transport.graph_features, feature=feature)
        return of(values, ids, where, num_nodes=NODES), *(of(x, where=where) for x in wide)

    got_all = run(values, ids, where, [x.astype(np.float32) for x in dense_rows])
    for rows, got in zip((z, *dense_rows), got_all, strict=True):
        np.testing.assert_allclose(got, oracle(rows, where, feature), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("feature", ["row_sum", "off_diagonal", "row_rms"])
def test_gradient_equals_finite_differences(feature):
    values, ids, where = sparse_data()
    weight, direction = np.random.default_rng(1).normal(size=(2, 2, 12))[:, :, :NODES]

    def loss(v):
        f = graph_features(v, ids, where, feature=feature, num_nodes=NODES)
        return jnp.sum(f * weight)

    def exact(v):
        return (oracle(dense(v, ids), where, feature) * weight).sum()

    direction = np.random.default_rng(2).normal(size=values.shape)
    slope = (exact(values + 1e-4 * direction) - exact(values - 1e-4 * direction)) / 2e-4
    gradient = np.asarray(jax.jit(jax.grad(loss))(values))
    np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-3)


@pytest.mark.parametrize("feature", ["off_diagonal", "row_rms"])
@pytest.mark.parametrize("with_ids", [True, False])
def test_sharded_positions_equal_local(feature, with_ids):
    values, ids, where = sparse_data()
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    along = PartitionSpec(None, "seq")
    rows, num_nodes = (values, NODES) if with_ids else (dense(values, ids).astype(np.float32), None)
    compute = functools.partial(transport.graph_features, feature=feature, num_nodes=num_nodes)

    def run(v, i, w, **axis):
        return compute(v, i if with_ids else None, w, **axis)

    sharded = jax.shard_map(
        functools.partial(run, sequence_axis_name="seq"),
        mesh=mesh,
        in_specs=(along, along, along),
        out_specs=PartitionSpec(),
    )

    def step(f):
        return jax.value_and_grad(lambda v: jnp.sum(jnp.cos(f(v, ids, where))))

    both = jax.jit(lambda v: (step(sharded)(v), step(run)(v)))
    (value, gradient), (expected, expected_gradient) = both(rows)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_compact_nodes_keeps_equal_ids_equal():
    ids = np.random.default_rng(0).integers(0, 40, (2, 5, 3)).astype(np.int32)
    nodes = np.asarray(compiled(transport.compact_nodes)(ids))
    for row, new in zip(ids, nodes):
        assert len(set(zip(row.ravel(), new.ravel()))) == len(set(row.ravel()))
        assert sorted(set(new.ravel())) == list(range(len(set(row.ravel()))))


def test_compact_nodes_gives_no_node_to_a_negative_id():
    ids = np.array([[[7, -1], [900, 7], [-5, 31], [31, 7]]], np.int32)
    compacted = [[[0, -1], [2, 0], [-1, 1], [1, 0]]]
    np.testing.assert_array_equal(transport.compact_nodes(ids), compacted)


def test_bad_inputs_name_the_culprit():
    values, ids, _ = sparse_data()
    with pytest.raises(ValueError, match="num_nodes: expected the number of nodes beside ids"):
        transport.graph_features(values, ids)


def test_a_value_whose_node_does_not_exist_counts_nowhere():
    values, ids, _ = sparse_data()
    outside = np.where(ids == 5, NODES, ids)
    got = graph_features(values, outside, num_nodes=NODES)
    gone = graph_features(np.where(ids == 5, 0, values), ids, num_nodes=NODES)
    np.testing.assert_allclose(got, gone, rtol=1e-6)

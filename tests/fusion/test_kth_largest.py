import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.fusion._kth_largest import kth_largest

VALUES = np.random.default_rng(0).normal(size=(4, 96)).round(1).astype(np.float32)
VALUES[0] = -np.inf
VALUES[1, 3:] = -np.inf


def at_ranks(*ranks):
    """Several ranks from one program."""
    return jax.jit(lambda values: [kth_largest(values, k) for k in ranks])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_equals_the_end_of_a_sort(dtype):
    values, ranks = VALUES.astype(dtype), (1, 2, 50, 96)
    for k, found in zip(ranks, at_ranks(*ranks)(values), strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.sort(values)[:, -k])


def test_float64():
    with jax.enable_x64():
        values = np.random.default_rng(1).normal(size=70) * 10.0 ** np.arange(-35, 35)
        np.testing.assert_array_equal(at_ranks(9)(values)[0], np.sort(values)[-9])


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32, (2, 13), elements=st.floats(width=32, allow_nan=False, allow_infinity=True)
    ),
)
def test_any_numbers(values):
    for k, found in zip(RANKS, AT_RANKS(values), strict=True):
        np.testing.assert_array_equal(found, np.sort(values)[:, -k])


RANKS = (1, 2, 5, 12, 13)
AT_RANKS = at_ranks(*RANKS)


def test_eager_jit_vmap_and_no_gradient():
    expected = np.sort(VALUES)[:, -5]
    np.testing.assert_array_equal(kth_largest(VALUES, 5), expected)
    np.testing.assert_array_equal(at_ranks(5)(VALUES)[0], expected)
    mapped, gradient = jax.jit(
        lambda values: (
            jax.vmap(lambda v: kth_largest(v, 5))(values),
            jax.grad(lambda v: kth_largest(v, 5).sum())(values),
        )
    )(VALUES)
    np.testing.assert_array_equal(mapped, expected)
    assert not np.any(gradient)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_split_vocabulary_equals_whole(kind):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(kind, kind))
    where = NamedSharding(mesh, P("data", "tensor"))
    with jax.set_mesh(mesh):
        found = jax.jit(
            jax.shard_map(
                lambda v: kth_largest(v, 7, axis_name="tensor"),
                in_specs=P("data", "tensor"),
                out_specs=P("data"),
            )
        )(jax.device_put(VALUES, where))
    np.testing.assert_array_equal(found, np.sort(VALUES)[:, -7])


def test_rows_split_over_an_explicit_axis():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(VALUES, NamedSharding(mesh, P("data", None)))
        np.testing.assert_array_equal(at_ranks(7)(rows)[0], np.sort(VALUES)[:, -7])


def test_errors():
    with pytest.raises(ValueError, match="k: expected 1 to the size of the vocabulary, 96, got 97"):
        kth_largest(VALUES, 97)
    with pytest.raises((TypeError, jaxtyping.TypeCheckError)):
        kth_largest(np.arange(4), 1)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"values: .* axis_name='tensor' .* a k-th largest"),
    ):
        kth_largest(jax.device_put(VALUES, NamedSharding(mesh, P(None, "tensor"))), 3)

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.fusion._kth_largest import kth_largest

VALUES = np.random.default_rng(0).normal(size=(4, 96)).round(1).astype(np.float32)
VALUES[0] = -np.inf
VALUES[1, 3:] = -np.inf


@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 50, 96])
def test_equals_the_end_of_a_sort(dtype, k):
    values = jnp.asarray(VALUES, dtype)
    found = kth_largest(values, k)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, lax.top_k(values, k)[0][..., -1])


def test_float64():
    with jax.enable_x64():
        values = np.random.default_rng(1).normal(size=70) * 10.0 ** np.arange(-35, 35)
        np.testing.assert_array_equal(kth_largest(values, 9), np.sort(values)[-9])


@hypothesis.given(
    hypothesis.extra.numpy.arrays(
        np.float32, (2, 13), elements=st.floats(width=32, allow_nan=False, allow_infinity=True)
    ),
    st.integers(1, 13),
)
def test_any_numbers(values, k):
    np.testing.assert_array_equal(kth_largest(values, k), np.sort(values)[:, -k])


def test_jit_vmap_and_no_gradient():
    expected = lax.top_k(VALUES, 5)[0][:, -1]
    np.testing.assert_array_equal(jax.jit(kth_largest, static_argnums=1)(VALUES, 5), expected)
    np.testing.assert_array_equal(jax.vmap(lambda v: kth_largest(v, 5))(VALUES), expected)
    assert not np.any(jax.grad(lambda v: kth_largest(v, 5).sum())(VALUES[2:]))


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
    np.testing.assert_array_equal(found, kth_largest(VALUES, 7))


def test_rows_split_over_an_explicit_axis():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        rows = jax.device_put(VALUES, NamedSharding(mesh, P("data", None)))
        np.testing.assert_array_equal(kth_largest(rows, 7), kth_largest(VALUES, 7))


def test_errors():
    with pytest.raises(ValueError, match="k: expected 1 to the size of the vocabulary, 96, got 97"):
        kth_largest(VALUES, 97)
    with pytest.raises((TypeError, jaxtyping.TypeCheckError)):
        kth_largest(np.arange(4), 1)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="needs axis_name='tensor'"):
        kth_largest(jax.device_put(VALUES, NamedSharding(mesh, P(None, "tensor"))), 3)

"""Products in bfloat16 on a CPU: values, derivatives, and a loaded model that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import models
from logitjax.models import _bfloat16
from tests.models._checkpoints import write_checkpoint

CONTRACT = (((2,), (0,)), ((), ()))


@pytest.mark.parametrize("rows", [1, 3])
def test_product_and_derivatives_are_those_of_float64_rounded_once(rows):
    rng = np.random.default_rng(0)
    shapes = {"x": (1, rows, 32), "kernel": (32, 16), "bar": (1, rows, 16)}
    arrays = {n: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for n, s in shapes.items()}
    x, kernel, bar = arrays.values()

    @jax.jit
    def products(x, kernel, bar):
        out, pull = jax.vjp(lambda x, k: _bfloat16.dot_general(x, k, CONTRACT), x, kernel)
        return out, *pull(bar)

    outputs = products(x, kernel, bar)
    x, kernel, bar = (np.asarray(array, np.float64) for array in (x, kernel, bar))
    expected = (x @ kernel, bar @ kernel.T, np.einsum("btd,btv->dv", x, bar))
    for got, want in zip(outputs, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        # Half a unit in the last of 8 places, and what float32 sums lose.
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-5)


def test_other_products_are_left_to_lax():
    def shapes(a, b, dims):
        return jax.eval_shape(lambda a, b: _bfloat16.dot_general(a, b, dims), a, b)

    wide = jax.ShapeDtypeStruct((1, 2, 4), jnp.float32), jax.ShapeDtypeStruct((4, 3), jnp.float32)
    assert shapes(*wide, CONTRACT).dtype == jnp.float32
    batched = (((2,), (1,)), ((0,), (0,)))
    a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2, 3, 4), (2, 4, 5)))
    assert shapes(a, b, batched).shape == (2, 3, 5)


def test_no_rows_and_rows_on_an_explicit_mesh_have_derivatives():
    def gradients(x, kernel):
        def total(x, kernel):
            return _bfloat16.dot_general(x, kernel, CONTRACT).astype("float32").sum()

        return jax.grad(total, argnums=(0, 1))(x, kernel)

    kernel = jax.ShapeDtypeStruct((8, 2), jnp.bfloat16)
    none = jax.ShapeDtypeStruct((0, 3, 8), jnp.bfloat16)
    assert [g.shape for g in jax.eval_shape(gradients, none, kernel)] == [(0, 3, 8), (8, 2)]
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:2])
    rows = jax.ShapeDtypeStruct((4, 3, 8), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    kernel = jax.ShapeDtypeStruct((8, 2), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    with jax.set_mesh(mesh):
        assert jax.eval_shape(gradients, rows, kernel)[0].sharding.spec[0] == "data"


def linear_products(jaxpr):
    """Types of both sides and the result of all products without batches, wherever they are."""
    for equation in jaxpr.eqns:
        dot = equation.primitive.name == "dot_general"
        if dot and not any(equation.params["dimension_numbers"][1]):
            yield tuple(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from linear_products(inner)


def test_a_model_in_bfloat16_that_is_loaded_on_a_cpu_multiplies_so(tmp_path):
    checkpoint = write_checkpoint("smollm2", tmp_path / "llama")
    model = models.load_model(str(checkpoint), dtype="bfloat16", layout="listed")
    lora = jax.eval_shape(
        lambda: models.Lora.init(model.config, 2, key=jax.random.key(0), layout="listed")
    )
    graphdef, params = nnx.split(model)

    def loss(params, lora):
        model, tokens = nnx.merge(graphdef, params), jnp.ones((1, 4), jnp.int32)
        hidden, _ = model.hidden_states(tokens, lora=lora)
        return jnp.sum(hidden.astype(jnp.float32) ** 2)

    types = set(linear_products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, lora).jaxpr))
    assert types == {("bfloat16", "bfloat16", "float32")}


def test_a_kernel_that_all_devices_share_gets_the_sum_of_their_gradients():
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])

    def gradient(x, kernel):
        return jax.grad(lambda k: _bfloat16.dot_general(x, k, CONTRACT).astype("float32").sum())(
            kernel
        )

    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((4, 3, 8), (8, 2)))
    split = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P()), out_specs=P())
    want = np.asarray(x, np.float64).sum((0, 1))[:, None]
    # Each device rounds its sum.
    np.testing.assert_allclose(jax.jit(split)(x, kernel), want + np.zeros((8, 2)), atol=0.05)

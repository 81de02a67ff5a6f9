"""Projection of conflicting gradients: algebra, and reduction over devices before the product."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from logitjax import distillation
from logitjax.distillation import aligned_value_and_grad
from tests._compiled import compiled

align_gradients = compiled(distillation.align_gradients)


def gradients(seed: int, conflict: float) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    task = {"trunk": rng.normal(size=5), "fc": rng.normal(size=3), "aux": np.zeros(2)}
    auxiliary = {
        "trunk": rng.normal(size=5) - conflict * task["trunk"],
        "fc": np.zeros(3),
        "aux": rng.normal(size=2),
    }
    to32 = lambda tree: jax.tree.map(lambda x: x.astype(np.float32), tree)  # noqa: E731
    return to32(task), to32(auxiliary)


@given(st.integers(0, 1000), st.floats(-3, 3))
def test_projection_is_the_spec_in_numpy(seed, conflict):
    task, auxiliary = gradients(seed, conflict)
    wide = {k: (np.asarray(task[k], float), np.asarray(auxiliary[k], float)) for k in task}
    for trunk in (None, "^trunk$"):
        used = [k for k in wide if trunk is None or k == "trunk"]
        dot = sum(wide[k][0] @ wide[k][1] for k in used)
        square = sum(wide[k][0] @ wide[k][0] for k in used)
        got, metrics = align_gradients(task, auxiliary, trunk=trunk)
        other = sum(wide[k][1] @ wide[k][1] for k in used)
        np.testing.assert_allclose(metrics["cosine"], dot / (square * other) ** 0.5, atol=1e-5)
        np.testing.assert_allclose(metrics["norm_ratio"], (other / square) ** 0.5, rtol=1e-4)
        coefficient = min(dot, 0) / square
        np.testing.assert_allclose(metrics["coefficient"], coefficient, rtol=1e-4, atol=1e-6)
        for k, (g1, g2) in wide.items():
            kept = g2 - coefficient * g1 if k in used else g2
            np.testing.assert_allclose(got[k], g1 + kept, rtol=1e-4, atol=1e-5)
        left = sum((np.asarray(got[k], float) - wide[k][0]) @ wide[k][0] for k in used)
        assert left >= -1e-4
        if dot >= 0:
            for k, (g1, g2) in wide.items():
                np.testing.assert_array_equal(got[k], np.float32(g1) + np.float32(g2))


def test_all_parameters_scale_the_head_and_leave_a_conflict_in_the_trunk():
    task, auxiliary = gradients(0, 2.0)
    got, metrics = jax.device_get(align_gradients(task, auxiliary))
    c = float(metrics["coefficient"])
    assert c < 0
    np.testing.assert_allclose(got["fc"], (1 - c) * task["fc"], rtol=1e-5)
    np.testing.assert_allclose(got["aux"], auxiliary["aux"])
    residual = np.vdot(got["trunk"] - task["trunk"], task["trunk"])
    np.testing.assert_allclose(residual, c * np.vdot(task["fc"], task["fc"]), rtol=1e-4)
    clean, _ = align_gradients(task, auxiliary, trunk="trunk")
    np.testing.assert_array_equal(clean["fc"], task["fc"])


def test_zero_gradients_and_missing_paths():
    zero = {"trunk": np.zeros(2, np.float32)}
    got, metrics = align_gradients(zero, {"trunk": np.ones(2, np.float32)})
    np.testing.assert_array_equal(got["trunk"], np.ones(2))
    assert all(np.isfinite(value) for value in metrics.values())
    with pytest.raises(ValueError, match="trunk"):
        distillation.align_gradients(zero, zero, trunk="backbone")


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["trunk"])
    task = jnp.square(hidden @ params["fc"] - y).mean()
    auxiliary = jnp.square(hidden @ params["aux"] + 10 * y).mean()
    return (task, auxiliary), {"hidden": hidden}


def problem():
    rng = np.random.default_rng(3)
    shapes = {"trunk": (4, 6), "fc": (6,), "aux": (6,)}
    params = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    params["aux"] = params["fc"]  # with opposite targets the two losses are at odds
    x, y = rng.normal(size=(16, 4)), rng.normal(size=16)
    return params, x.astype(np.float32), y.astype(np.float32)


def test_one_forward_two_pullbacks_equal_two_gradients():
    params, x, y = problem()
    run = jax.jit(aligned_value_and_grad(loss_fn, trunk="trunk"))
    (losses, extra), got, _ = run(params, x, y)
    both = [jax.jit(jax.grad(lambda p, i=i: loss_fn(p, x, y)[0][i]))(params) for i in (0, 1)]
    expected, _ = align_gradients(*both, trunk="trunk")
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    assert extra["hidden"].shape == (16, 6)
    np.testing.assert_allclose(losses[0], jax.jit(loss_fn)(params, x, y)[0][0], rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_gradients_are_averaged_before_the_inner_product(check_vma):
    params, x, y = problem()
    whole = jax.jit(aligned_value_and_grad(loss_fn, trunk="trunk"))(params, x, y)
    _, expected, metrics = jax.device_get(whole)
    assert metrics["coefficient"] < 0
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def local(params, x, y):
        run = aligned_value_and_grad(loss_fn, trunk="trunk", axis_name="data")
        _, gradient, metrics = run(params, x, y)
        return gradient, metrics

    split = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=check_vma
    )
    got, split_metrics = jax.jit(split)(params, x, y)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(split_metrics[name], value, rtol=1e-4)


def test_under_pmap():
    params, x, y = problem()
    _, expected, _ = jax.jit(aligned_value_and_grad(loss_fn))(params, x, y)
    step = jax.pmap(
        lambda p, x, y: aligned_value_and_grad(loss_fn, axis_name="data")(p, x, y)[1],
        axis_name="data",
        in_axes=(None, 0, 0),
        out_axes=None,
    )
    got = step(params, x.reshape(8, 2, 4), y.reshape(8, 2))
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)

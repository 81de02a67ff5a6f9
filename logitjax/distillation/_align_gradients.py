from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from logitjax.ops import checks
from logitjax.ops import mesh as on_mesh


def _wide(x: jax.Array) -> jax.Array:
    # A sum over all parameters would stop growing in bf16; float64 is kept.
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def align_gradients(
    task_gradients: Any,
    auxiliary_gradients: Any,
    *,
    trunk: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Any, dict[str, Float[jax.Array, ""]]]:
    """Add two gradients after projecting conflicts out of the second.

    Where the auxiliary gradient points against the task's (a negative inner product), its component
    along the task's is removed; the task's own gradient is never changed.

    ::

        g2' = g2 - min(<g1, g2>, 0) / |g1|^2 * g1,      update g1 + g2'

    Taken over all parameters, as in the released code, the norm includes the task's own head: the
    projection then scales up the head's gradient and leaves some conflict in the trunk. With
    `trunk`, the inner product, the norm and the projection cover the shared parameters alone, and
    their inner product is never negative afterwards.

    Args:
        task_gradients, auxiliary_gradients: pytrees of the same structure.
        trunk: a regular expression on paths (`backbone`): the shared parameters. None projects over
            all parameters, as the released code does.
        axis_name: the mesh axes of the batch inside `pmap` or `shard_map`, where each device has
            its own gradients: both are averaged *before* the inner product. Under `jit`, gradients
            of a mean over the global batch need no `axis_name`.

    Returns:
        The summed gradients, and scalars: `cosine` between the original two, `norm_ratio` of the
        auxiliary to the task's, and `coefficient`, which is negative if a conflict was projected
        out and 0 otherwise.

    Raises:
        TypeError: gradients that are not floating point.
        ValueError: no path matches `trunk`, or leaves of different shapes.

    >>> retain, distil = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-1.0, 2.0])}
    >>> g, metrics = jax.jit(align_gradients)(retain, distil)
    >>> g["w"].tolist(), float(metrics["coefficient"])
    ([1.0, 2.0], -1.0)

    References:
        Yang et al., Dual-Head Knowledge Distillation (arXiv 2411.08937), gradient alignment;
        the trunk-only form is ours.
    """
    paths = jax.tree_util.tree_leaves_with_path
    named = [
        {f"{name}{jax.tree_util.keystr(path)}": leaf for path, leaf in paths(tree)}
        for name, tree in (("task_gradients", task_gradients), ("auxiliary", auxiliary_gradients))
    ]
    for (name, leaf), (other, peer) in zip(named[0].items(), named[1].items(), strict=True):
        checks.shapes(**{name: (leaf, "float *shape"), other: (peer, "float *shape")})
    task, auxiliary = task_gradients, auxiliary_gradients
    if axis_name is not None:
        # Before the inner product: a mean of projections is not the projection of the mean.
        task, auxiliary = jax.lax.pmean((task, auxiliary), axis_name)
    shared = jax.tree.map(lambda _: True, task) if trunk is None else on_mesh.path_mask(task, trunk)
    if not any(jax.tree.leaves(shared)):
        raise ValueError(f"trunk: expected a pattern that matches some parameter, got {trunk!r}")

    def inner(a: Any, b: Any) -> jax.Array:
        products = jax.tree.map(lambda x, y, use: (_wide(x) * _wide(y)).sum() * use, a, b, shared)
        return jnp.asarray(sum(jax.tree.leaves(products)))

    dot, task_square = inner(task, auxiliary), inner(task, task)
    auxiliary_square = inner(auxiliary, auxiliary)
    # Not `> 0`: with a nan in the gradients all three metrics are nan.
    safe = jnp.where(task_square == 0, 1.0, task_square)
    coefficient = jnp.where((dot >= 0) | (task_square == 0), 0.0, dot / safe)

    def combine(g1: jax.Array, g2: jax.Array, use: bool) -> jax.Array:
        # In the leaf's type: a float32 coefficient would widen bf16 gradients.
        return g1 + (g2 - coefficient.astype(g1.dtype) * g1 if use else g2)

    product = task_square * auxiliary_square
    metrics = {
        "cosine": jnp.where(
            product == 0, 0.0, dot / jnp.sqrt(jnp.where(product == 0, 1.0, product))
        ),
        "norm_ratio": jnp.sqrt(auxiliary_square / safe),
        "coefficient": coefficient,
    }
    return jax.tree.map(combine, task, auxiliary, shared), metrics


def aligned_value_and_grad(
    loss_fn: Callable[..., tuple[tuple[Any, Any], Any]],
    *,
    trunk: str | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., tuple[tuple[tuple[Any, Any], Any], Any, dict[str, Any]]]:
    """Compute two losses and their aligned gradient, with one forward pass and two pullbacks.

    Args:
        loss_fn: `(params, *args) -> ((task, auxiliary), extra)`: two scalars, weights included, and
            anything else, such as new batch statistics.
        trunk, axis_name: as for :func:`align_gradients`.

    Returns:
        `(params, *args) -> (((task, auxiliary), extra), gradients, metrics)`. With `axis_name`,
        each device returns its own losses and `extra`.

    >>> def loss_fn(params, x):
    ...     return (jnp.sum(params["w"] * x), -jnp.sum(params["w"] ** 2)), None
    >>> run = jax.jit(aligned_value_and_grad(loss_fn))
    >>> _, gradient, metrics = run({"w": jnp.ones(2)}, jnp.ones(2))
    >>> gradient["w"].tolist(), float(metrics["cosine"])
    ([1.0, 1.0], -1.0)
    """

    def run(params: Any, *args: Any) -> tuple[tuple[tuple[Any, Any], Any], Any, dict[str, Any]]:
        if axis_name is not None:
            # With replicated parameters shard_map would already sum the gradients.
            names = (axis_name,) if isinstance(axis_name, str) else axis_name
            params = jax.tree.map(lambda leaf: on_mesh.vary(leaf, names), params)
        losses, pullback, extra = jax.vjp(lambda p: loss_fn(p, *args), params, has_aux=True)
        one, zero = (jax.tree.map(f, losses[0]) for f in (jnp.ones_like, jnp.zeros_like))
        (task,) = pullback((one, zero))
        (auxiliary,) = pullback((zero, one))
        gradients, metrics = align_gradients(task, auxiliary, trunk=trunk, axis_name=axis_name)
        return (losses, extra), gradients, metrics

    return run

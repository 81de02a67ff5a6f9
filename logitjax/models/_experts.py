"""A mixture of experts in place of an MLP: a router picks some for each token and drops none."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from logitjax import ops
from logitjax.models._config import DecoderConfig
from logitjax.models._lora import linear_map


class _Maps(nnx.Module):
    def __init__(self, shape: tuple[int, ...], *, rngs: nnx.Rngs, param_dtype: Any):
        self.kernel = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, param_dtype))


class _Experts(nnx.Module):
    def __init__(self, count: int, hidden: int, wide: int, **options: Any):
        self.gate, self.up = (_Maps((count, hidden, wide), **options) for _ in range(2))
        self.down = _Maps((count, wide, hidden), **options)


class MoE(nnx.Module):
    """A weighted sum of gated MLPs, distributed over the mesh axis `expert` if there is one."""

    def __init__(
        self,
        config: DecoderConfig,
        activation: Callable,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        **kinds: Any,
    ):
        linear = functools.partial(linear_map, rngs=rngs, dtype=dtype, use_bias=False, **kinds)
        self.router = linear(config.hidden_size, config.num_experts)
        wide = config.expert_size or config.intermediate_size
        self.experts = _Experts(config.num_experts, config.hidden_size, wide, rngs=rngs, **kinds)
        self.activation, self.dtype = activation, dtype
        self.chosen, self.normalised = config.experts_per_token, config.normalise_experts

    def __call__(self, x: jax.Array, lora: Any, rows: jax.Array | None) -> jax.Array:
        weights, ids = jax.lax.top_k(
            jax.nn.softmax(self.router(x).astype(jnp.float32)), self.chosen
        )
        if self.normalised:
            weights = weights / weights.sum(-1, keepdims=True)
        experts = self.experts
        kernels = [
            m.kernel[...].astype(self.dtype) for m in (experts.gate, experts.up, experts.down)
        ]
        # XLA:CPU multiplies every row of a ragged product by every expert.
        kind = _scanned if ops.mesh.platform_of(x) == "cpu" else _ragged

        def summed(*arrays: Any) -> jax.Array:
            *rows, kernels = arrays
            x, weights, ids = (array.reshape(-1, array.shape[-1]) for array in rows)
            return kind(self.activation, x, weights, ids, kernels).reshape(rows[0].shape)

        arrays = (x, weights.astype(self.dtype), ids)
        if not (free := ops.mesh.free_axes()):
            return summed(*arrays, kernels)
        # Rows split over the experts' axis are gathered: each of its devices sees all of them.
        names = ops.sharding.MeshAxes.current()
        row_axes = ops.mesh.auto_axes([n for n in names.rows if n != "expert"], x.shape[0])
        split = P(row_axes, ops.mesh.auto_axes(names.sequence, x.shape[1]))
        axes = ops.mesh.auto_axes(("expert",), kernels[0].shape[0])
        wide = ops.mesh.auto_axes(names.columns, kernels[0].shape[2])
        kernel = P(axes, None, wide)

        @functools.partial(
            jax.shard_map,
            in_specs=(split, split, split, [kernel, kernel, P(axes, wide)]),
            out_specs=split,
            axis_names=free,
        )
        def shared(x: Any, weights: Any, ids: Any, kernels: Any) -> jax.Array:
            first = jax.lax.axis_index(axes) * kernels[0].shape[0] if axes else 0
            return jax.lax.psum(summed(x, weights, ids - first, kernels), (*axes, *wide))

        return shared(*arrays, kernels)


def _scanned(
    activation: Callable, x: jax.Array, weights: jax.Array, ids: jax.Array, kernels: list[jax.Array]
) -> jax.Array:
    """One expert after another, each over all tokens; ids of other devices' experts give zero."""

    # Otherwise the backward pass would keep tokens times experts.
    @jax.checkpoint
    def add(total: jax.Array, expert: Any) -> tuple[jax.Array, None]:
        number, gate, up, down = expert
        weight = jnp.where(ids == number, weights, 0).sum(-1, keepdims=True)
        return total + weight * ((activation(x @ gate) * (x @ up)) @ down), None

    numbers = jnp.arange(kernels[0].shape[0], dtype=ids.dtype)
    # The carry varies over the devices of an axis as the added values do.
    differs = ops.mesh.varying_axes(kernels[0]) | ops.mesh.varying_axes(x)
    start = ops.mesh.vary(jnp.zeros_like(x), differs)
    return jax.lax.scan(add, start, (numbers, *kernels))[0]


def _ragged(
    activation: Callable, x: jax.Array, weights: jax.Array, ids: jax.Array, kernels: list[jax.Array]
) -> jax.Array:
    """Rows sorted by expert, each multiplied by its own; those of other devices come last."""
    count, each = kernels[0].shape[0], ids.shape[-1]
    flat = jnp.where((ids >= 0) & (ids < count), ids, count).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.zeros(count, jnp.int32).at[flat].add(1, mode="drop")
    rows = x[order // each]
    gate, up, down = (functools.partial(jax.lax.ragged_dot, group_sizes=sizes) for _ in range(3))
    inner = activation(gate(rows, kernels[0])) * up(rows, kernels[1])
    # Rows outside all groups are zero, whatever a kernel leaves in them.
    out = jnp.where((flat[order] < count)[:, None], down(inner, kernels[2]), 0)
    return jnp.zeros_like(x).at[order // each].add(out * weights.reshape(-1)[order][:, None])

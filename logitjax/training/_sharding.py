"""Placing a pytree on a mesh by sharding rules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from logitjax.ops.sharding import ShardingRules

#: Works for any model: every matrix is split over ``fsdp`` along its largest dimension.
FSDP_RULES = ShardingRules(unmatched="fsdp")


def shard_tree(tree: Any, mesh: Mesh, rules: ShardingRules = FSDP_RULES) -> Any:
    """Places a pytree of arrays on the mesh.

    Every process passes the same whole host arrays; each keeps the shards of its devices.

    >>> from logitjax.training import make_mesh
    >>> mesh = make_mesh("data:1", devices=jax.devices()[:1])
    >>> shard_tree({"kernel": np.ones((4, 2))}, mesh)["kernel"].sharding.mesh == mesh
    True
    """

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(leaf, jax.Array) and (
            sharding.is_fully_addressable or not leaf.is_fully_addressable
        ):
            return jax.device_put(leaf, sharding)
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(leaf, sharding)
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, rules.shardings(tree, mesh))

"""Sharding of a pytree's leaves over a mesh, and names of the mesh axes."""

import contextlib
import dataclasses
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.ops._mesh import path_string

# A value of `jax.jit`'s cache key: a program is traced again under other names.
_named = jax.make_user_context(default_value=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshAxes:
    """Names of the mesh axes over which a batch and a vocabulary are split.

    The defaults are the names of `logitjax.training.make_mesh` and of common trainers; names that a
    mesh does not have are ignored. They are needed for Auto axes, which arrays under `jax.jit` do
    not show; Explicit axes are read from the arrays.

    Attributes:
        rows: axes that split the rows of a batch.
        columns: axes that split the vocabulary.
        sequence: axes that split the positions of a row.

    Raises:
        TypeError: an attribute is not a tuple.

    >>> with MeshAxes(rows=("replica",), columns=("mlp",)).use():
    ...     MeshAxes.current().columns
    ('mlp',)
    """

    rows: tuple[str, ...] = ("dcn_data", "data", "fsdp", "expert")
    columns: tuple[str, ...] = ("tensor", "tp", "model")
    sequence: tuple[str, ...] = ("context",)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            names = getattr(self, field.name)
            if not isinstance(names, tuple):
                raise TypeError(f"{field.name}: expected a tuple of names, got {names!r}")

    def use(self) -> contextlib.AbstractContextManager[None]:
        """A context in which traced code uses these axis names."""
        return _named(self)

    @classmethod
    def current(cls) -> "MeshAxes":
        """The names of the innermost `use`, or the defaults."""
        return _named.value or cls()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """An ordered list of `(path regular expression, PartitionSpec)`: the first match decides.

    A specification is for the *last* dimensions of a leaf, so one rule fits a layer and also a
    stack of layers, whose leading dimension is not split. The paths of an optimizer's state contain
    those of its parameters, so the same rules shard it. Leaves with fewer dimensions than the
    specification (counters, factored moments) are replicated.

    Attributes:
        rules: the list. Matching is `re.search` in a path such as
            `layers/0/attention/query/kernel`.
        unmatched: treatment of leaves that no rule matches: `replicate`, or `fsdp`, which splits
            the largest dimension that the `fsdp` axis divides.
        optional: axes that a mesh may lack.
        strict: whether a mesh axis that does not divide its dimension is an error. Otherwise the
            dimension is not split (3 key-value heads on `tensor:2`), which is logged.

    >>> from jax.sharding import PartitionSpec as P
    >>> rules = ShardingRules(rules=(("kernel$", P("fsdp", "tensor")),))
    >>> tuple(rules.spec("layers/kernel", (30, 8, 8), {"fsdp": 4, "tensor": 2}))
    (None, 'fsdp', 'tensor')
    """

    rules: tuple[tuple[str, P], ...] = ()
    unmatched: Literal["replicate", "fsdp"] = "replicate"
    strict: bool = False
    optional: tuple[str, ...] = ()

    def spec(self, path: str, shape: tuple[int, ...], mesh_shape: Any) -> P:
        """The PartitionSpec of one leaf, which fits its shape; `mesh_shape` is `mesh.shape`.

        Raises:
            ValueError: if a rule names an axis that the mesh lacks or, if `strict`, an axis that
                does not divide its dimension.
        """
        for pattern, rule in self.rules:
            if re.search(pattern, path):
                return self._fit(path, shape, mesh_shape, tuple(rule))
        size = mesh_shape.get("fsdp", 1)
        if self.unmatched == "fsdp" and size > 1:
            divisible = [i for i, n in enumerate(shape) if n and n % size == 0]
            # Sharding a vector saves less than its gather costs.
            if divisible and len(shape) > 1:
                largest = max(divisible, key=lambda i: shape[i])
                return P(*("fsdp" if i == largest else None for i in range(len(shape))))
        return P()

    def _fit(self, path: str, shape: tuple[int, ...], mesh_shape: Any, rule: tuple) -> P:
        if len(rule) > len(shape):
            # A scalar of the optimizer under a parameter's path.
            return P()
        fitted: list[Any] = [None] * len(shape)
        for dim, axes in zip(range(len(shape) - len(rule), len(shape)), rule):
            if axes is None:
                continue
            names = (axes,) if isinstance(axes, str) else tuple(axes)
            if set(names) <= set(self.optional) - set(mesh_shape):
                continue
            missing = [name for name in names if name not in mesh_shape]
            if missing:
                raise ValueError(
                    f"sharding of {path!r}: the mesh has {tuple(mesh_shape)}, not {missing[0]!r}"
                )
            size = int(np.prod([mesh_shape[name] for name in names]))
            if shape[dim] % size == 0:
                fitted[dim] = axes
                continue
            message = (
                f"sharding of {path!r}: {axes!r} of size {size} does not divide dimension {dim} "
                f"of shape {shape}"
            )
            if self.strict:
                raise ValueError(message)
            logging.log_first_n(logging.INFO, "%s; it stays whole", 20, message)
        return P(*fitted)

    def shardings(self, tree: Any, mesh: Mesh) -> Any:
        """The `NamedSharding` of every leaf of a pytree of arrays or `ShapeDtypeStruct`."""

        def leaf_sharding(path: Any, leaf: Any) -> NamedSharding:
            shape = tuple(leaf.shape)
            return NamedSharding(mesh, self.spec(path_string(path), shape, mesh.shape))

        return jax.tree_util.tree_map_with_path(leaf_sharding, tree)

    def place(self, tree: Any, mesh: Mesh) -> Any:
        """Place a pytree of arrays on the mesh.

        Every process passes the same whole host arrays; each keeps the shards of its devices.

        >>> mesh = jax.make_mesh((1,), ("fsdp",), devices=jax.devices()[:1])
        >>> ShardingRules().place({"kernel": np.ones((4, 2))}, mesh)["kernel"].sharding.mesh == mesh
        True
        """

        def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
            if isinstance(leaf, jax.Array) and (
                sharding.is_fully_addressable or not leaf.is_fully_addressable
            ):
                return jax.device_put(leaf, sharding)
            if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                # Keys have no numpy form.
                return jax.device_put(leaf, sharding)
            host = np.asarray(leaf)
            return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

        return jax.tree.map(place, tree, self.shardings(tree, mesh))

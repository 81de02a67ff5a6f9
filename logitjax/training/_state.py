"""The training state: everything that a run needs to continue."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from logitjax.ops.sharding import ShardingRules

#: Works for any model: every matrix is split over ``fsdp`` along its largest dimension.
FSDP_RULES = ShardingRules(unmatched="fsdp")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Step, parameters, optimizer state and random key, as one pytree.

    Attributes:
        step: int32 scalar, the number of updates so far. The data state is this number, too.
        params: any pytree of arrays: a dict, an ``nnx.State``, LoRA matrices alone.
        rng: a typed key that never changes; the key of a step is folded from it.
    """

    step: Any
    params: Any
    opt_state: Any
    rng: Any

    def replace(self, **changes: Any) -> "TrainState":
        return dataclasses.replace(self, **changes)

    @classmethod
    def create(
        cls,
        params: Any,
        tx: optax.GradientTransformation,
        *,
        mesh: Mesh,
        rules: ShardingRules = FSDP_RULES,
        seed: int = 0,
    ) -> "TrainState":
        """Create the state at step 0 under ``jit``, directly in its shards.

        Every leaf is a global array, counters included, as multi-host checkpoints require.
        Parameters given as arrays are copied, because a train step donates its state.

        Args:
            params: a function from a key to the initial parameters, or the parameters.
            seed: seed of the initial parameters and of the steps' keys.

        >>> from logitjax.training import make_mesh
        >>> mesh = make_mesh("data:1", devices=jax.devices()[:1])
        >>> state = TrainState.create(lambda key: {"w": jnp.ones(3)}, optax.adam(1e-3), mesh=mesh)
        >>> int(state.step)
        0
        """
        abstract = cls.abstract(params, tx, mesh=mesh, rules=rules)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        build = jax.jit(_builder(params, tx), out_shardings=shardings)
        initial = None if callable(params) else rules.place(params, mesh)
        return build(jax.random.key(seed), initial)

    @classmethod
    def abstract(
        cls,
        params: Any,
        tx: optax.GradientTransformation,
        *,
        mesh: Mesh,
        rules: ShardingRules = FSDP_RULES,
    ) -> "TrainState":
        """The state's shapes, dtypes and shardings, without its arrays.

        A checkpoint is restored into it, and a step for a pod is compiled ahead of time with it.
        Arguments as for `create`; parameters may be ``jax.ShapeDtypeStruct``, as in the result.

        >>> from logitjax.training import make_mesh
        >>> mesh = make_mesh("data:1", devices=jax.devices()[:1])
        >>> state = TrainState.abstract({"w": jnp.ones(3)}, optax.adam(1e-3), mesh=mesh)
        >>> state.params["w"].shape
        (3,)
        """
        key = jax.eval_shape(lambda: jax.random.key(0))
        initial = None if callable(params) else params
        abstract = jax.eval_shape(_builder(params, tx), key, initial)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            rules.shardings(abstract, mesh),
        )


def abstract_array(leaf: Any) -> Any:
    """The shape, type and sharding of an array; anything else unchanged."""
    if not isinstance(leaf, jax.Array):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _builder(params: Any, tx: optax.GradientTransformation) -> Callable[..., TrainState]:
    def build(key: jax.Array, initial: Any) -> TrainState:
        # The steps' key must not be the parameters'.
        init_key, rng = jax.random.split(key)
        parameters: Any = params(init_key) if callable(params) else jax.tree.map(jnp.copy, initial)
        return TrainState(
            step=jnp.zeros((), jnp.int32), params=parameters, opt_state=tx.init(parameters), rng=rng
        )

    return build

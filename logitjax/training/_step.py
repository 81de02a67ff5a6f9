"""A jitted update: microbatches, exact means, clipping, a finite flag."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.ops import mesh as on_mesh
from logitjax.ops.sharding import MeshAxes
from logitjax.training._flops import matmul_flops
from logitjax.training._mesh import BatchLayout
from logitjax.training._metrics import MetricAccumulator
from logitjax.training._state import TrainState, abstract_array

LossFn = Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutput:
    """The output of a step, on the device: reading it waits for the step.

    Attributes:
        metrics: name -> (sum, count). ``loss`` and ``grad_norm`` are always included.
        finite: whether loss and gradient norm are finite; if not, the update was not applied.
    """

    metrics: Any
    finite: Any


class TrainStep:
    """A jitted update with a donated state: ``step(state, batch, constants=None)``.

    The gradient is that of ``sum of losses / count`` over the *global* batch: tokens weigh the same
    in any microbatch, device or process. With ``accumulate`` the microbatches run in a ``lax.scan``
    and sum in float32. On several slices (``dcn_data``) each copy of the model calls the loss with
    its own rows and key, and sums cross the network once per step. A step whose loss or gradient is
    not finite leaves parameters and optimizer state unchanged, and reports it.

    Args:
        loss_fn: ``(params, batch, rng) -> (loss_sum, count, {name: (sum, count)})``; constants are
            a fourth argument. ``count`` must not depend on the parameters.
        tx: the optimizer; clipping is part of it (`Schedule.optimizer`).
        accumulate: number of microbatches.
        mesh: the mesh of the state. Batches may then be this process's numpy rows.
        trainable: a regular expression; parameters whose path does not match get no gradient. Pass
            the same one to `Schedule.optimizer`, so that they have no optimizer state either.
        schedule: the learning rate as a function of the step, for reports.
        counts: ``(batch, constants) -> pytree`` of the whole global batch, passed to the loss as
            its last argument: the divisors of means over a part of the labels.

    Attributes:
        traces: Number of traces: one per shape of the batch.

    Raises:
        ValueError: if the microbatches and the mesh do not divide the batch.

    >>> def loss_fn(params, batch, rng):
    ...     error = (batch["x"] * params["w"] - 1.0) ** 2
    ...     return error.sum(), error.size, {}
    >>> from logitjax.training import make_mesh
    >>> mesh = make_mesh("data:1", devices=jax.devices()[:1])
    >>> tx = optax.sgd(0.25)
    >>> state = TrainState.create({"w": jnp.zeros(())}, tx, mesh=mesh)
    >>> step = TrainStep(loss_fn, tx, accumulate=2, mesh=mesh)
    >>> state, output = step(state, {"x": jnp.ones(4)})
    >>> float(state.params["w"]), bool(output.finite)
    (0.5, True)
    """

    def __init__(
        self,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        *,
        accumulate: int = 1,
        mesh: Mesh | None = None,
        trainable: str | None = None,
        schedule: Callable[[Any], Any] | None = None,
        counts: Callable[[Any, Any], Any] | None = None,
    ):
        if accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1 microbatch, got {accumulate}")
        self.traces = 0
        self._loss_fn, self._tx, self._accumulate = loss_fn, tx, accumulate
        self._mesh, self._trainable, self._schedule = mesh, trainable, schedule
        self._counts = counts
        self._jitted: Any = None
        self._shapes: Any = None

    def __call__(
        self, state: TrainState, batch: Any, constants: Any = None
    ) -> tuple[TrainState, StepOutput]:
        """Update the state, which is donated: do not use the old one again.

        `constants` are a pytree that no step changes: a teacher's weights, the model under a LoRA.
        """
        if self._mesh is not None:
            batch = BatchLayout(self._mesh).place(batch)
        if self._shapes is None:
            self._shapes = jax.tree.map(abstract_array, (state, batch, constants))
        return self._compiled_for(state)(state, batch, constants)

    @functools.cached_property
    def flops(self) -> float:
        """Multiplications and additions of the first call's matrix products, on all devices."""
        # JAX keeps the trace of the previous call and does not repeat it.
        return 0.0 if self._shapes is None else matmul_flops(self.trace(*self._shapes).jaxpr)

    def lower(self, state: Any, batch: Any, constants: Any = None) -> Any:
        """Lower the step for abstract arguments with shardings, e.g. of devices elsewhere."""
        return self.trace(state, batch, constants).lower()

    def trace(self, state: Any, batch: Any, constants: Any = None) -> Any:
        """Trace the step for the same arguments: a ``jax.stages.Traced`` with its jaxpr."""
        return self._compiled_for(state).trace(state, batch, constants)

    def _compiled_for(self, state: TrainState) -> Any:
        if self._jitted is None:
            # The state keeps its sharding, whatever the compiler prefers: no second trace.
            shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
            report = None if self._mesh is None else NamedSharding(self._mesh, P())
            self._jitted = jax.jit(
                _knowing(self._mesh, self._step),
                donate_argnums=0,
                out_shardings=(shardings, report),
            )
        return self._jitted

    def _step(self, state: TrainState, batch: Any, constants: Any) -> tuple[TrainState, StepOutput]:
        # Runs when the step is traced, not when it runs.
        self.traces += 1
        # Depends only on the step: a resumed run draws the same numbers.
        key = jax.random.fold_in(state.rng, state.step)
        mask = None if self._trainable is None else on_mesh.path_mask(state.params, self._trainable)

        extra = () if constants is None else (constants,)
        if self._counts is not None:
            extra += (self._counts(batch, constants),)

        def loss(params: Any, micro: Any, index: Any, key: Any) -> Any:
            if mask is not None:
                params = jax.tree.map(
                    lambda leaf, kept: leaf if kept else jax.lax.stop_gradient(leaf), params, mask
                )
            total, count, metrics = self._loss_fn(
                params, micro, jax.random.fold_in(key, index), *extra
            )
            sums = {"loss": (total, count), **metrics}
            return jnp.asarray(total, jnp.float32), jax.tree.map(_float32, sums)

        grad_fn = jax.grad(loss, has_aux=True)
        if self._accumulate == 1:
            grads, sums = grad_fn(state.params, batch, 0, key)
            grads = jax.tree.map(_float32, grads)
        else:
            self._check_rows(batch)
            grads, sums = self._over_copies(grad_fn, mask, state.params, batch, key)
        # Sums over all micro-batches and devices first, then one division: the mean of the whole
        # batch.
        count = jnp.maximum(sums["loss"][1], 1e-9)
        grads = jax.tree.map(lambda g, p: (g / count).astype(p.dtype), grads, state.params)
        # In float32: in bfloat16 a long sum of squares loses its small terms.
        norm = optax.tree.norm(jax.tree.map(_float32, grads))
        finite = jnp.isfinite(sums["loss"][0]) & jnp.isfinite(norm)

        updates, opt_state = self._tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        # A step that is not finite must not corrupt later checkpoints.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        sums["grad_norm"] = (norm, jnp.float32(1))
        if self._schedule is not None:
            sums["learning_rate"] = (_float32(self._schedule(state.step)), jnp.float32(1))
        after = TrainState(step=state.step + 1, params=params, opt_state=opt_state, rng=state.rng)
        return after, StepOutput(metrics=sums, finite=finite)

    def _check_rows(self, batch: Any) -> None:
        parts = self._accumulate
        shards = 1 if self._mesh is None else BatchLayout(self._mesh).pieces
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
            if leaf.shape[0] % (parts * shards):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"batch {name!r}: accumulate x data x fsdp = {parts} x {shards} does not "
                    f"divide the batch of {leaf.shape[0]}"
                )

    def _over_copies(self, grad_fn: Any, mask: Any, params: Any, batch: Any, key: Any) -> Any:
        """Sum over microbatches, and then once over the copies of the model on several slices."""
        # Otherwise the compiler would send every microbatch's gradient across the network.
        sizes = {} if self._mesh is None else self._mesh.shape
        if sizes.get("dcn_data", 1) == 1:
            return self._scan(grad_fn, params, batch, key)
        # Without `data`, each of a slice's copies would send the same sum to other slices.
        axes = tuple(name for name in ("dcn_data", "data") if sizes[name] > 1)

        def of_copy(params: Any, batch: Any, number: Any) -> Any:
            grads, sums = self._scan(grad_fn, params, batch, jax.random.fold_in(key, number[0]))
            if mask is not None:
                # Zeros of untrained parameters need not cross.
                grads = jax.tree.map(lambda g, kept: g if kept else None, grads, mask)
            grads, sums = jax.lax.psum((grads, sums), axes)
            if mask is not None:
                grads = jax.tree.map(
                    lambda p, g: jnp.zeros(p.shape, jnp.float32) if g is None else g, params, grads
                )
            return grads, sums

        numbers = jnp.arange(math.prod(sizes[name] for name in axes))
        # Losses need not know the axes on which their values vary.
        return jax.shard_map(
            of_copy,
            in_specs=(P(), P(axes), P(axes)),
            out_specs=P(),
            axis_names=set(axes),
            check_vma=False,
        )(params, batch, numbers)

    def _scan(self, grad_fn: Any, params: Any, batch: Any, key: Any) -> Any:
        parts = self._accumulate

        def split(leaf: Any) -> Any:
            # Microbatch i takes rows i, i + parts, ...: each device splits its own rows.
            leaf = leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)
            axes = on_mesh.auto_axes(MeshAxes.current().rows, leaf.shape[1])
            return jax.lax.with_sharding_constraint(leaf, P(None, axes)) if axes else leaf

        micros = jax.tree.map(split, batch)

        def body(carry: Any, item: Any) -> Any:
            grads, sums = grad_fn(params, *item, key)
            return jax.tree.map(lambda a, b: a + _float32(b), carry, (grads, sums)), None

        # Zeros of the right structure: only the loss knows the metrics.
        shapes = jax.eval_shape(
            lambda: grad_fn(params, jax.tree.map(lambda leaf: leaf[0], micros), 0, key)
        )
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)
        return jax.lax.scan(body, zeros, (micros, jnp.arange(parts)))[0]


def _knowing(mesh: Mesh | None, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced where a model finds the mesh that splits its activations."""
    if mesh is None:
        return function

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def _float32(leaf: Any) -> jax.Array:
    return jnp.asarray(leaf, jnp.float32)


class EvalStep:
    """A jitted evaluation with the loss function of a `TrainStep`, with a constant key.

    >>> score = EvalStep(lambda params, batch, rng: (batch.sum(), batch.size, {}))
    >>> score.means({}, [jnp.ones(3), jnp.zeros(1)])
    {'loss': 0.75}
    """

    def __init__(self, loss_fn: LossFn, *, mesh: Mesh | None = None):
        def step(params: Any, batch: Any, constants: Any) -> Any:
            extra = () if constants is None else (constants,)
            # The same key each time: scores of two steps differ only by their parameters.
            total, count, metrics = loss_fn(params, batch, jax.random.key(0), *extra)
            return jax.tree.map(_float32, {"loss": (total, count), **metrics})

        self._mesh = mesh
        report = None if mesh is None else NamedSharding(mesh, P())
        self._jitted = jax.jit(_knowing(mesh, step), out_shardings=report)

    def __call__(self, params: Any, batch: Any, constants: Any = None) -> dict[str, Any]:
        """Name to (sum, count), with ``loss`` among the names."""
        if self._mesh is not None:
            batch = BatchLayout(self._mesh).place(batch)
        return self._jitted(params, batch, constants)

    def means(self, params: Any, batches: Iterable[Any], constants: Any = None) -> dict[str, float]:
        """Means over all batches, each divided once by its total count."""
        accumulator = MetricAccumulator()
        for batch in batches:
            accumulator.add(self(params, batch, constants))
        return accumulator.compute()

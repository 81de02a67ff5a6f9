"""One arm and all its values of alpha, trained side by side: the compiled epoch."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.dual_head.arms import Arm, create_network, loss_function
from experiments.dual_head.config import Config
from experiments.dual_head.data import Placed, prepare_inputs
from logitjax import distillation, training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """Training settings of one network, trained once for each pair of an alpha and a rate: a lane.

    Attributes:
        learning_rate: The rate that the lanes' multiples apply to.
        alphas: Weight of the distillation loss by lane.
        rates: Multiple of the learning rate by lane; 1 everywhere if there are none.
    """

    network: str
    epochs: int
    learning_rate: float
    alphas: tuple[float, ...]
    rates: tuple[float, ...] = ()

    @property
    def multiples(self) -> tuple[float, ...]:
        """`rates`, or 1 for every lane."""
        return self.rates or (1.0,) * len(self.alphas)

    @classmethod
    def of_teacher(cls, config: Config) -> "Course":
        """The teacher's settings; it learns from labels alone."""
        return cls(
            network=config.teacher,
            epochs=config.teacher_epochs,
            learning_rate=config.teacher_learning_rate,
            alphas=(0.0,),
        )

    @classmethod
    def of_student(cls, config: Config, arm: Arm) -> "Course":
        """A student's settings: every alpha with every rate; without alpha, as many rates."""
        if arm.has_alpha:
            lanes = list(itertools.product(config.alpha, config.rate))
        elif len(config.rate) > 1:
            # Equal trials: an arm without a weight to choose spends them on a finer, wider grid.
            count = len(config.alpha) * len(config.rate)
            low, high = min(config.rate) / 3, max(config.rate) * 3
            lanes = [(0.0, float(rate)) for rate in np.geomspace(low, high, count)]
        else:
            lanes = [(0.0, config.rate[0])]
        alphas, rates = zip(*lanes)
        return cls(
            network=config.student,
            epochs=config.epochs,
            learning_rate=config.learning_rate,
            alphas=alphas,
            rates=rates,
        )

    def best(self, validation: Sequence[float]) -> "Course":
        """The lanes whose rate was best for their alpha; nan counts as worst."""
        lanes = zip(self.alphas, self.multiples, np.nan_to_num(validation, nan=-1.0))
        best: dict[float, tuple[float, float]] = {}
        for alpha, rate, accuracy in lanes:
            # The first of equals, as in reports.
            if accuracy > best.get(alpha, (-2.0, 0.0))[0]:
                best[alpha] = (float(accuracy), rate)
        rates = tuple(rate for _, rate in best.values())
        return dataclasses.replace(self, alphas=tuple(best), rates=rates)


class Given(NamedTuple):
    """Values that all steps of a program share; `on` is the share of alpha that is applied."""

    inputs: Any
    labels: Any
    teacher: Any
    key: Any
    on: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained network; its logits are computed once if nothing is augmented.

    Attributes:
        graphdef: Graph definition of the network.
        argument: Input of the compiled epoch: logits `[train, classes]`, or the weights.
        precomputed: Whether that is the logits.
    """

    graphdef: Any
    argument: Any
    precomputed: bool

    def of(self, argument: Any, inputs: Any, rows: Any) -> Any:
        """The logits of a batch, given `argument`."""
        return argument[rows] if self.precomputed else self.logits(argument, inputs)

    def logits(self, weights: Any, inputs: Any) -> Any:
        model = nnx.merge(self.graphdef, *weights, copy=True)
        return jax.lax.stop_gradient(model(inputs))


class Trainer:
    """One network, one arm, several values of alpha ("lanes") that see the same batches.

    Lanes of small dense networks are mapped by `vmap`; those of convolutional ones run one after
    another, because convolutions with a batch of kernels are slow. An epoch is one `lax.scan` and
    one step of `training.train_loop`, except for convolutions on CPU: XLA runs those many times
    slower inside a loop, so there the host steps.

    It has its own update, because `training.TrainStep` knows neither lanes nor batch statistics nor
    projected gradients, and its own rate, which falls at given epochs.
    """

    def __init__(
        self,
        config: Config,
        placed: Placed,
        arm: Arm,
        course: Course,
        *,
        teacher: Teacher | None = None,
    ):
        self.config, self.placed, self.arm, self.course = config, placed, arm, course
        self.teacher, task = teacher, placed.task
        self.steps = len(task.train) // config.batch_size
        if not self.steps:
            raise ValueError(
                f"batch_size: {config.batch_size} is more than the {len(task.train)} training "
                "examples"
            )
        self.dense = course.network.startswith("mlp-")
        self.over_lanes: Any = jax.lax.map
        if self.dense:
            self.over_lanes = lambda function, lanes: jax.vmap(function)(lanes)
        self.stepwise = not self.dense and placed.mesh.devices.flat[0].platform == "cpu"
        self.make = functools.partial(
            create_network, course.network, task.num_classes, task.shape, arm.auxiliary
        )
        model = nnx.eval_shape(lambda: self.make(key=jax.random.key(0)))
        self.graphdef, self.params, self.stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        falls = {round(f * course.epochs) * self.steps: 0.1 for f in config.decay_at}
        schedule = optax.piecewise_constant_schedule(course.learning_rate, falls)
        self._tx = optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, momentum=config.momentum),
        )
        self.prepare = prepare_inputs(task, config.augment)
        self.loss_fn = loss_function(arm, self.graphdef, convex=config.convex)
        # The state keeps its sharding, whatever the compiler would prefer: no second trace.
        compiled = functools.partial(jax.jit, out_shardings=placed.replicated)
        self.epoch = compiled(self._epoch, donate_argnums=0)
        self._one_step = compiled(self._step, donate_argnums=0)
        self._initial = compiled(self._start)

    def initial(self, seed: int) -> training.TrainState:
        """The same weights in every lane, replicated over the mesh."""
        # Compiling the default generator once per convolution takes longer than some epochs.
        made = jax.random.key(seed, impl=None if self.dense else "unsafe_rbg")
        return self._initial(made, jax.random.key(seed))

    def abstract(self) -> training.TrainState:
        """Shapes and dtypes of the state, without any values."""
        keys = jax.eval_shape(lambda: (jax.random.key(0), jax.random.key(0)))
        return jax.eval_shape(self._start, *keys)

    def _start(self, key: jax.Array, rng: jax.Array) -> training.TrainState:
        _, params, stats = nnx.split(self.make(key=key), nnx.Param, nnx.BatchStat)
        lane = {"params": params, "stats": stats}, self._tx.init(params)
        alphas = jnp.array(self.course.alphas, jnp.float32)
        variables, opt_state = jax.tree.map(lambda x: jnp.repeat(x[None], len(alphas), 0), lane)
        return training.TrainState(
            step=jnp.zeros((), jnp.int32),
            params=variables
            | {"alpha": alphas, "rate": jnp.array(self.course.multiples, jnp.float32)},
            opt_state=opt_state,
            rng=rng,
        )

    def model_of(self, variables: Any) -> Any:
        return nnx.merge(self.graphdef, variables["params"], variables["stats"], copy=True)

    def target(self, argument: Any, inputs: Any, rows: Any) -> Any:
        """The teacher's logits, given its argument; None without a teacher."""
        return None if self.teacher is None else self.teacher.of(argument, inputs, rows)

    def _gradient(self, variables: Any, batch: tuple, alpha: Any, key: Any) -> tuple[Any, Any, Any]:
        args = (variables["stats"], *batch, alpha, key)
        if not self.arm.aligned:

            def total(params: Any) -> Any:
                (task, logit), stats = self.loss_fn(params, *args)
                return task + logit, (task + logit, stats)

            gradient, (loss, stats) = jax.grad(total, has_aux=True)(variables["params"])
            return gradient, loss, stats
        run = distillation.aligned_value_and_grad(self.loss_fn, trunk="backbone")
        (parts, stats), gradient, _ = run(variables["params"], *args)
        return gradient, sum(parts), stats

    def _step(self, lane: Any, given: Given, rows: Any, number: Any) -> tuple[Any, Any]:
        variables, opt_state = lane
        alpha = variables["alpha"] * given.on
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(given.key, number))
        split = NamedSharding(self.placed.mesh, P("data"))
        rows = jax.lax.with_sharding_constraint(rows, split)
        x = self.prepare(given.inputs[rows], augment_key)
        batch = (x, given.labels[rows], self.target(given.teacher, x, rows))
        gradient, loss, stats = self._gradient(variables, batch, alpha, dropout_key)
        updates, opt_state = self._tx.update(gradient, opt_state, variables["params"])
        # SGD's update is linear in its rate, momentum included.
        updates = jax.tree.map(lambda update: update * variables["rate"], updates)
        params = optax.apply_updates(variables["params"], updates)
        return (variables | {"params": params, "stats": stats}, opt_state), loss

    def _epoch(
        self, state: training.TrainState, given: Given, order: Any
    ) -> tuple[training.TrainState, Any]:
        """Steps over `order` (`[steps, batch]` rows), and the mean loss of every lane."""

        def lane_steps(lane: Any) -> tuple[Any, Any]:
            def step(lane: Any, now: tuple) -> tuple[Any, Any]:
                return self._step(lane, given, *now)

            lane, loss = jax.lax.scan(step, lane, (order, jnp.arange(len(order))))
            return lane, loss.mean()

        lanes, loss = self.over_lanes(lane_steps, (state.params, state.opt_state))
        return _after(state, lanes, len(order)), loss

    def step_by_step(
        self, state: training.TrainState, given: Given, order: Any
    ) -> tuple[training.TrainState, Any]:
        """The same as `epoch`, one call a step; lanes take turns, so that two can run at once."""
        apart = self.apart((state.params, state.opt_state))
        losses: list[list[Any]] = [[] for _ in apart]
        for number, rows in enumerate(order):
            for i, lane in enumerate(apart):
                apart[i], loss = self._one_step(lane, given, rows, np.int32(number))
                losses[i].append(loss)
        lanes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *apart)
        means = jnp.stack([jnp.stack(some).mean() for some in losses])
        return _after(state, lanes, len(order)), means

    def apart(self, lanes: Any) -> list[Any]:
        count = len(self.course.alphas)
        return [jax.tree.map(lambda x, i=i: x[i], lanes) for i in range(count)]

    def train_epoch(
        self, state: training.TrainState, batch: dict[str, Any]
    ) -> tuple[training.TrainState, training.StepOutput]:
        """One step of the training loop: a pass over the training rows."""
        teacher = None if self.teacher is None else self.teacher.argument
        run = self.step_by_step if self.stepwise else self.epoch
        losses = []
        for inputs, labels, rows, key in self.placed.pieces(batch["order"], batch["key"]):
            given = Given(inputs, labels, teacher, key, batch["on"])
            state, mean = run(state, given, rows)
            losses.append((mean, len(rows)))
        loss = losses[0][0]
        if len(losses) > 1:
            loss = jnp.stack([mean * count for mean, count in losses]).sum(0) / self.steps
        examples = self.steps * self.config.batch_size
        mean, lanes = _of_lanes(loss)
        metrics = {"loss": (mean * examples, examples)}
        metrics |= {name: (value, 1) for name, value in lanes.items()}
        # A lane whose alpha is too large must not stop the others.
        return state, training.StepOutput(metrics=metrics, finite=True)

    def batch(self, number: int, *, seed: int) -> dict[str, Any]:
        """An epoch's order, its key and `on`; the order depends on the seed and the epoch alone."""
        config, count = self.config, len(self.placed.task.train)
        order = np.random.default_rng([seed, number]).permutation(count)
        on = float(not config.stop_epoch or number < config.stop_epoch)
        if self.arm.warms:
            on *= min(1.0, (number + 1) / config.warmup_epochs)
        return {
            "order": order[: self.steps * config.batch_size].reshape(self.steps, -1),
            "key": jax.random.fold_in(jax.random.key(seed), number),
            "on": on,
        }


def _after(state: training.TrainState, lanes: Any, steps: int) -> training.TrainState:
    return state.replace(step=state.step + steps, params=lanes[0], opt_state=lanes[1])


@jax.jit
def _of_lanes(loss: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    return loss.mean(), by_lane("loss", loss)


def by_lane(name: str, values: Any) -> dict[str, Any]:
    """`name/0`, `name/1`, ...: a writer takes single numbers."""
    return {f"{name}/{lane}": values[lane] for lane in range(len(values))}

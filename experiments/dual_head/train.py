"""Training one arm with one seed and all values of alpha, epoch by epoch, in resumable steps."""

import functools
import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.dual_head import arms, data, diagnostics
from logitjax import distillation, processes, training, vision

# More than this stays on the host and comes in pieces.
_DEVICE_BYTES = 4 << 30
_CHECKPOINT_SECONDS = 60.0
_CHUNK_STEPS = 256


class Trainer:
    """One network, one arm, several values of alpha ("lanes") that see the same batches.

    Lanes of small dense networks are mapped by ``vmap``; those of convolutional ones run one after
    another, because convolutions with a batch of kernels are slow. An epoch is one ``lax.scan``,
    except for convolutions on CPU: XLA runs those inside a loop many times slower than outside, so
    there the host steps.
    """

    def __init__(
        self,
        config: Any,
        task: data.Task,
        arm: arms.Arm,
        *,
        network: str,
        epochs: int,
        learning_rate: float,
        alphas: tuple[float, ...],
        teacher: "Teacher | None",
        resident: tuple[Any, Any] | None,
        mesh: Any,
    ):
        self.config, self.task, self.arm, self.teacher = config, task, arm, teacher
        self.epochs, self.alphas, self.resident, self.mesh = epochs, alphas, resident, mesh
        self.replicated = NamedSharding(self.mesh, P())
        self.steps = len(task.train) // config.batch_size
        if not self.steps:
            raise ValueError(
                f"batch_size: {config.batch_size} is more than the {len(task.train)} training "
                "examples"
            )
        dense = network.startswith("mlp-")
        self.over_lanes = self._vmap if dense else self._map
        self.stepwise = not dense and jax.default_backend() == "cpu"
        shape, classes = task.shape, task.num_classes
        self.make = functools.partial(arms.create_network, network, classes, shape, arm.auxiliary)
        model = nnx.eval_shape(lambda: self.make(key=jax.random.key(0)))
        self.graphdef, self.params, self.stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        boundaries = {round(f * epochs) * self.steps: 0.1 for f in config.decay_at}
        schedule = optax.piecewise_constant_schedule(learning_rate, boundaries)
        self.tx = optax.chain(
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(schedule, momentum=config.momentum),
        )
        self.prepare = data.prepare_inputs(task, config.augment)
        self.loss_fn = arms.loss_function(arm, self.graphdef)
        # Compiling the default generator once per convolution takes longer than some epochs.
        self.generator = None if network.startswith("mlp-") else "unsafe_rbg"
        self.initial = jax.jit(self._initial, out_shardings=self.replicated)
        self.one_step = jax.jit(self._step, donate_argnums=0)
        self.one_count = jax.jit(self._count)
        scanned = jax.jit(self._epoch, donate_argnums=0)
        self.epoch = self._stepwise_epoch if self.stepwise else scanned
        self.accuracy = self._stepwise_accuracy if self.stepwise else jax.jit(self._accuracy)
        self.measure_lane = jax.jit(functools.partial(diagnostics.of_lane, self))

    @staticmethod
    def _vmap(function: Any, lanes: Any) -> Any:
        return jax.vmap(function)(lanes)

    @staticmethod
    def _map(function: Any, lanes: Any) -> Any:
        return jax.lax.map(function, lanes)

    def _initial(self, key: Any) -> Any:
        """The same weights in every lane, replicated over the mesh."""
        _, params, stats = nnx.split(self.make(key=key), nnx.Param, nnx.BatchStat)
        lane = {"params": params, "stats": stats, "opt_state": self.tx.init(params)}
        repeated = jax.tree.map(lambda x: jnp.repeat(x[None], len(self.alphas), 0), lane)
        return repeated | {"alpha": jnp.array(self.alphas, jnp.float32)}

    def _gradient(self, lane: Any, batch: tuple, alpha: Any, key: Any) -> tuple[Any, Any, Any]:
        args = (lane["stats"], *batch, alpha, key)
        if self.arm.align is None:

            def total(params: Any) -> Any:
                (task, logit), stats = self.loss_fn(params, *args)
                return task + logit, (task + logit, stats)

            gradient, (loss, stats) = jax.grad(total, has_aux=True)(lane["params"])
            return gradient, loss, stats
        trunk = "backbone" if self.arm.align == "trunk" else None
        run = distillation.aligned_value_and_grad(self.loss_fn, trunk=trunk)
        (parts, stats), gradient, _ = run(lane["params"], *args)
        return gradient, sum(parts), stats

    def _epoch(
        self, lanes: Any, inputs: Any, labels: Any, teacher: Any, order: Any, key: Any, on: Any
    ) -> tuple[Any, Any]:
        """Steps over ``order`` (``[steps, batch]`` rows); ``on`` is 0 once alpha is off."""

        def lane_steps(lane: Any) -> tuple[Any, Any]:
            def step(lane: Any, now: tuple) -> tuple[Any, Any]:
                return self._step(lane, inputs, labels, teacher, *now, key, on)

            lane, loss = jax.lax.scan(step, lane, (order, jnp.arange(len(order))))
            return lane, loss.mean()

        return self.over_lanes(lane_steps, lanes)

    def _step(
        self,
        lane: Any,
        inputs: Any,
        labels: Any,
        teacher: Any,
        rows: Any,
        number: Any,
        key: Any,
        on: Any,
    ) -> tuple[Any, Any]:
        """One update of one lane."""
        alpha = lane["alpha"] * (1.0 if self.arm.smooths else on)
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, number))
        rows = jax.lax.with_sharding_constraint(rows, NamedSharding(self.mesh, P("data")))
        x = self.prepare(inputs[rows], augment_key)
        target = None if self.teacher is None else self.teacher.of(teacher, x, rows)
        batch = (x, labels[rows], target)
        gradient, loss, stats = self._gradient(lane, batch, alpha, dropout_key)
        updates, opt_state = self.tx.update(gradient, lane["opt_state"], lane["params"])
        params = optax.apply_updates(lane["params"], updates)
        return lane | {"params": params, "stats": stats, "opt_state": opt_state}, loss

    def _stepwise_epoch(
        self, lanes: Any, inputs: Any, labels: Any, teacher: Any, order: Any, key: Any, on: Any
    ) -> tuple[Any, Any]:
        """The same as `_epoch`, a call a step; lanes take turns, so that two can run at once."""
        apart = self.unstack(lanes)
        losses: list[list[Any]] = [[] for _ in apart]
        for number, rows in enumerate(order):
            numbered = (rows, np.int32(number), key, on)
            for i, lane in enumerate(apart):
                apart[i], loss = self.one_step(lane, inputs, labels, teacher, *numbered)
                losses[i].append(loss)
        return _stack(apart), jnp.stack([jnp.stack(some).mean() for some in losses])

    def unstack(self, lanes: Any) -> list[Any]:
        return [jax.tree.map(lambda x, i=i: x[i], lanes) for i in range(len(self.alphas))]

    def _accuracy(self, lanes: Any, inputs: Any, labels: Any) -> Any:
        """Right answers in ``[batches, batch]`` rows, whose padding has the label -1."""

        def lane_count(lane: Any) -> Any:
            return jax.lax.map(lambda xy: self._count(lane, *xy), (inputs, labels)).sum()

        return self.over_lanes(lane_count, lanes)

    def _stepwise_accuracy(self, lanes: Any, inputs: Any, labels: Any) -> Any:
        batches = list(zip(inputs, labels, strict=True))
        return [sum(self.one_count(lane, *xy) for xy in batches) for lane in self.unstack(lanes)]

    def _count(self, lane: Any, x: Any, y: Any) -> Any:
        model = nnx.merge(self.graphdef, lane["params"], lane["stats"], copy=True)
        logits = model(self.prepare(x, None))
        return (logits.argmax(-1) == y).sum()

    def score(self, lanes: Any, part: data.Part) -> np.ndarray:
        """Accuracy of every lane."""
        right = np.zeros(len(self.alphas))
        for x, y in _batches(part, 500):
            right += np.asarray(self.accuracy(lanes, x, y))
        return right / len(part)

    def train_epoch(self, lanes: Any, number: int, *, seed: int) -> tuple[Any, np.ndarray]:
        """One pass in an order that depends on the seed and the epoch alone."""
        config, train = self.config, self.task.train
        rng = np.random.default_rng([seed, number])
        order = rng.permutation(len(train))[: self.steps * config.batch_size]
        order = order.reshape(self.steps, config.batch_size)
        key = jax.random.fold_in(jax.random.key(seed), number)
        on = float(not config.stop_epoch or number < config.stop_epoch)
        teacher = None if self.teacher is None else self.teacher.argument
        put = functools.partial(jax.device_put, device=self.replicated)
        if self.resident is not None:
            return self.epoch(lanes, *self.resident, teacher, put(order), key, on)
        losses = []
        for start in range(0, self.steps, _CHUNK_STEPS):
            part = order[start : start + _CHUNK_STEPS]
            inputs, labels = put(train.inputs[part.ravel()]), put(train.labels[part.ravel()])
            rows = put(np.arange(part.size).reshape(part.shape))
            chunk_key = jax.random.fold_in(key, start)
            lanes, loss = self.epoch(lanes, inputs, labels, teacher, rows, chunk_key, on)
            losses.append(np.asarray(loss) * len(part))
        return lanes, np.sum(losses, 0) / self.steps

    def fit(
        self,
        directory: epath.Path,
        *,
        seed: int,
        told_to_stop: Any,
        diagnose: bool,
        keep: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """Train to the end, from the newest checkpoint, and score.

        Returns the lanes and a record: accuracies by lane, curves by epoch, diagnostics.
        """
        key = jax.random.key(seed, impl=self.generator)
        lanes, start, curves = self.initial(key), 0, []
        writer = training.make_writer(directory, log=False)
        with training.Checkpointer(directory / "checkpoints", max_to_keep=1) as checkpointer:
            restored = checkpointer.restore_latest(lanes)
            if restored is not None:
                lanes, start, curves = restored.state, restored.step, restored.extra["curves"]
                logging.info("%s: resuming at epoch %d", directory, start)
            writer.resume(start)
            saved = time.monotonic()
            for number in range(start, self.epochs):
                clock = time.perf_counter()
                lanes, loss = self.train_epoch(lanes, number, seed=seed)
                line = {"loss": np.asarray(loss).tolist()}
                seconds = time.perf_counter() - clock
                line["validation"] = self.score(lanes, self.task.validation).tolist()
                if diagnose and number % self.config.diagnose_every == 0:
                    line |= diagnostics.measure(self, lanes)
                curves.append(line)
                best = int(np.argmax(line["validation"]))
                shown = {
                    "loss": line["loss"][best],
                    "validation": line["validation"][best],
                    "alpha": self.alphas[best],
                    "seconds": seconds,
                }
                writer.write_scalars(number + 1, shown)
                level = logging.DEBUG if self.over_lanes == self._vmap else logging.INFO
                logging.log(
                    level,
                    "%s epoch %d of %d: %s",
                    directory.parent.name,
                    number + 1,
                    self.epochs,
                    "  ".join(f"{k} {v:.4g}" for k, v in shown.items()),
                )
                last, stop = number + 1 == self.epochs, told_to_stop(number + 1)
                due = time.monotonic() - saved > _CHECKPOINT_SECONDS
                if (last and keep) or stop or (due and not last):
                    checkpointer.save(number + 1, lanes, {"curves": curves})
                    saved = time.monotonic()
                if stop and not last:
                    checkpointer.wait()
                    raise training.Preempted(number + 1)
        record = {
            "alphas": list(self.alphas),
            "validation": curves[-1]["validation"],
            "test": self.score(lanes, self.task.test).tolist(),
            "curves": curves,
        }
        return lanes, record


class Teacher:
    """A trained network; its logits for the students are computed once where nothing is augmented.

    Attributes:
      argument: what the compiled epoch is given: those logits ``[train, classes]``, or the weights.
    """

    def __init__(self, trainer: Trainer, lanes: Any, pupils: data.Task):
        lane = jax.tree.map(lambda x: x[0], lanes)
        self._graphdef = trainer.graphdef
        weights = (lane["params"], lane["stats"])
        self.argument: Any = weights
        # Rows that come in pieces have no fixed numbers to look logits up by.
        inputs = pupils.train.inputs
        self.precomputed = trainer.config.augment == "none" and inputs.nbytes <= _DEVICE_BYTES
        if self.precomputed:
            ask = jax.jit(lambda weights, x: self._logits(weights, trainer.prepare(x, None)))
            rows = [ask(weights, inputs[i : i + 500]) for i in range(0, len(inputs), 500)]
            self.argument = jax.device_put(jnp.concatenate(rows), trainer.replicated)

    def _logits(self, weights: Any, inputs: Any) -> Any:
        model = nnx.merge(self._graphdef, *weights, copy=True)
        return jax.lax.stop_gradient(model(inputs))

    def of(self, argument: Any, inputs: Any, rows: Any) -> Any:
        """The logits of a batch, given ``argument``."""
        return argument[rows] if self.precomputed else self._logits(argument, inputs)


def train_teacher(
    trainer: Trainer, directory: epath.Path, *, pupils: data.Task, told_to_stop: Any
) -> tuple[Teacher, dict[str, Any]]:
    """The teacher, trained or read from a torch checkpoint, and its record."""
    if trainer.config.teacher_weights:
        model = trainer.make(key=jax.random.key(0))
        vision.load_torch_weights(model, trainer.config.teacher_weights)
        _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        lane = {"params": params, "stats": stats, "opt_state": (), "alpha": jnp.zeros(())}
        lanes = jax.device_put(jax.tree.map(lambda x: x[None], lane), trainer.replicated)
        scores = {
            name: trainer.score(lanes, part).tolist()
            for name, part in (("validation", trainer.task.validation), ("test", trainer.task.test))
        }
        record = {"alphas": [0.0], "curves": [], **scores}
    else:
        lanes, record = trainer.fit(
            directory, seed=0, told_to_stop=told_to_stop, diagnose=False, keep=True
        )
    processes.write_json(directory / "result.json", record)
    return Teacher(trainer, lanes, pupils), record


def resident(task: data.Task, mesh: Any) -> tuple[Any, Any] | None:
    """The training arrays on every device, if they are small enough."""
    if task.train.inputs.nbytes > _DEVICE_BYTES:
        return None
    sharding = NamedSharding(mesh, P())
    inputs, labels = np.asarray(task.train.inputs[:]), np.asarray(task.train.labels)
    return jax.device_put(inputs, sharding), jax.device_put(labels, sharding)


def _stack(lanes: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)


def _batches(part: data.Part, size: int) -> Any:
    """Pieces of ``[batches, size]`` rows; the last is padded with the label -1."""
    many = max(1, min(-(-len(part) // size), (256 << 20) // max(1, part.inputs[:1].nbytes * size)))
    for start in range(0, len(part), many * size):
        x = np.asarray(part.inputs[start : start + many * size])
        y = part.labels[start : start + many * size]
        missing = many * size - len(y)
        x = np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
        y = np.concatenate([y, np.full(missing, -1, y.dtype)])
        yield x.reshape(many, size, *x.shape[1:]), y.reshape(many, size)


def read_record(path: epath.Path) -> dict[str, Any] | None:
    """What a finished run left, if there is one; all processes say the same."""
    return json.loads(path.read_text()) if processes.broadcast_from_first(path.exists) else None

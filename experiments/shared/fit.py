"""Training for experiments: an update that the planner compiles too, and a run that resumes."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from etils import epath

from experiments.shared import shapes
from logitjax import models, ops, processes, training
from logitjax.training import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """A compiled update with its optimizer; a run trains with it, a plan traces it.

    `rules` give the sharding of each leaf of the state.
    """

    tx: optax.GradientTransformation
    step: training.TrainStep
    mesh: jax.sharding.Mesh
    rules: ops.sharding.ShardingRules

    def start(self, params: Any, seed: int = 0) -> training.TrainState:
        return training.TrainState.create(
            params, self.tx, mesh=self.mesh, rules=self.rules, seed=seed
        )

    def program(self, name: str, params: Any, batch: Any, constants: Any = None) -> Program:
        """The update of abstract parameters and constants, for a plan."""
        state = training.TrainState.abstract(params, self.tx, mesh=self.mesh, rules=self.rules)
        placed = shapes.placed(self.mesh, constants, self.rules)
        return Program(name=name, jitted=self.step, arguments=(state, batch, placed))


def make_update(
    loss_fn: Callable[..., Any],
    schedule: training.Schedule,
    *,
    mesh: jax.sharding.Mesh,
    rules: ops.sharding.ShardingRules = models.DECODER_RULES,
    trainable: str | None = None,
    weight_decay: float = 0.01,
    b2: float = 0.95,
) -> Update:
    """Clipped AdamW and its compiled step.

    Args:
        loss_fn: As in `training.TrainStep`.
        schedule: The learning rate by step.
        rules: The sharding of each leaf of the state.
        trainable: Regular expression of the trained parameters; None trains all.
    """
    tx = schedule.optimizer(trainable=trainable, weight_decay=weight_decay, b2=b2)
    step = training.TrainStep(loss_fn, tx, mesh=mesh, trainable=trainable, schedule=schedule)
    return Update(tx=tx, step=step, mesh=mesh, rules=rules)


def fit(
    update: Update,
    params: Any,
    batches: Callable[[int], Mapping[str, Any]],
    *,
    steps: int,
    directory: epath.Path,
    constants: Any = None,
    seed: int = 0,
    checkpoint_every: int = 0,
    log_every: int = 10,
) -> Any:
    """Trains, continues from the newest checkpoint, or reads a finished run.

    Args:
        batches: Step -> rows of the whole batch, of which each process takes its own.
        steps: Steps of the whole run.
        directory: Folder of the checkpoints and of `metrics.jsonl`.
        constants: Inputs of every step that none changes.

    Returns:
        The trained parameters; every process holds them whole.
    """
    if constants is not None:
        constants = update.rules.place(constants, update.mesh)
    with training.Checkpointer(directory / "checkpoints") as checkpointer:
        state = training.train_loop(
            functools.partial(update.start, params, seed),
            functools.partial(update.step, constants=constants),
            lambda step: share(update.mesh, batches(step)),
            total_steps=steps,
            workdir=directory,
            checkpointer=checkpointer,
            writer=training.make_writer(directory),
            identity={"steps": steps},
            options=training.LoopOptions(checkpoint_every=checkpoint_every, log_every=log_every),
        )
    return processes.local_copy(state.params)


def share(mesh: jax.sharding.Mesh, batch: Any) -> Any:
    """The rows of a whole batch that this process feeds."""
    return jax.tree.map(lambda rows: rows[training.BatchLayout(mesh).rows(len(rows))], batch)


def curve(directory: epath.Path, name: str = "loss") -> list[tuple[int, float]]:
    """A metric by step, from the `metrics.jsonl` of a training."""

    def read() -> list[tuple[int, float]]:
        lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line[name]) for line in lines if name in line]

    return processes.broadcast_from_first(read)

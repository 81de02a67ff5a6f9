"""The runs of the dual-head experiment: a teacher, then every arm with every seed."""

import dataclasses
import functools
import json
import logging as python_logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from experiments.dual_head.arms import Arm, arms
from experiments.dual_head.config import Config
from experiments.dual_head.data import Placed, load_task, place
from experiments.dual_head.score import Scorer
from experiments.dual_head.train import Course, Teacher, Trainer, by_lane
from experiments.shared.records import Record, kept, remove_directory
from logitjax import processes, storage, training


def train_all(config: Config, workdir: epath.Path) -> dict[str, Any]:
    """The teacher's record, and those of every arm by seed."""
    mesh, existing = training.make_mesh(config.mesh), arms(config)
    placed = place(load_task(config, workdir), mesh)
    taught = placed
    if config.teacher_examples:
        other = dataclasses.replace(config, train_examples=config.teacher_examples)
        taught = place(load_task(other, workdir), mesh)
    teaching = Scorer(Trainer(config, taught, existing["ce"], Course.of_teacher(config)))
    if config.teacher_weights:
        lanes, record = _load(teaching, config.teacher_weights)
    else:
        lanes, record = fit(teaching, workdir / "teacher", seed=0)
    result = workdir / "teacher" / "result.json"
    processes.run_on_first("teacher", lambda: storage.kept(result, lambda: record))
    teacher = make_teacher(teaching.trainer, lanes, placed)
    logging.info("teacher %s: test accuracy %.4f", config.teacher, record["test"][0])
    results: dict[str, Any] = {"teacher": record, "arms": {}}
    for name in config.arm:
        arm = existing[name]
        taught_by = teacher if arm.logit_loss is not None else None

        # One compilation for all seeds of a course; none if all are on disk.
        @functools.cache
        def scorer(course: Course, arm: Arm = arm, teacher: Any = taught_by) -> Scorer:
            return Scorer(Trainer(config, placed, arm, course, teacher=teacher))

        course = Course.of_student(config, arm)
        for seed in range(config.seeds):
            directory = workdir / "arms" / name / f"seed-{seed}"

            def train(
                course: Course = course, directory: epath.Path = directory, seed: int = seed
            ) -> Record:
                return fit(scorer(course), directory, seed=seed, diagnose=True)[1]

            record = kept(directory / "result.json", train)
            # The first seed chooses the rate of every alpha; the others take it.
            if not seed:
                course = course.best(record["validation"])
            remove_directory(directory / "checkpoints")
            best = int(np.argmax(record["validation"]))
            logging.info(
                "%s, seed %d: validation %.4f at alpha %g, test %.4f",
                name,
                seed,
                record["validation"][best],
                record["alphas"][best],
                record["test"][best],
            )
            results["arms"].setdefault(name, []).append(record)
    return results


def fit(
    scorer: Scorer, directory: epath.Path, *, seed: int, diagnose: bool = False
) -> tuple[Any, Record]:
    """Trains the scorer's networks to the end, from the newest checkpoint, and scores them.

    Returns:
        The variables of every lane, and a record: accuracies by lane, curves by epoch.
    """
    trainer = scorer.trainer
    course, task = trainer.course, trainer.placed.task
    level = python_logging.DEBUG if trainer.dense else python_logging.INFO

    def scores(state: training.TrainState, epoch: int) -> dict[str, float]:
        accuracy = scorer.accuracy(state.params, task.validation).tolist()
        line = {"validation": accuracy}
        if diagnose and (epoch - 1) % trainer.config.diagnose_every == 0:
            line |= scorer.measure(state.params)
        best = int(np.argmax(accuracy))
        logging.log(
            level,
            "%s epoch %d of %d: validation %.4g at alpha %g",
            directory.parent.name,
            epoch,
            course.epochs,
            accuracy[best],
            course.alphas[best],
        )
        lanes = (by_lane(name, values) for name, values in line.items())
        return {name: value for one in lanes for name, value in one.items()}

    path = directory / "metrics.jsonl"
    with training.Checkpointer(directory / "checkpoints") as checkpointer:
        state = training.train_loop(
            functools.partial(trainer.initial, seed),
            trainer.train_epoch,
            functools.partial(trainer.batch, seed=seed),
            total_steps=course.epochs,
            checkpointer=checkpointer,
            eval_fn=scores,
            writer=training.make_writer(directory, log=False),
            options=training.LoopOptions(
                checkpoint_every=trainer.config.checkpoint_every, log_every=1, eval_every=1
            ),
        )
    curves = processes.broadcast_from_first(lambda: _curves(path, len(course.alphas)))
    right = scorer.right(state.params, task.test)
    return state.params, {
        "alphas": list(course.alphas),
        "rates": list(course.multiples),
        "validation": curves[-1]["validation"],
        "test": right.mean(1).tolist(),
        # Bits in hexadecimal, so that arms can be paired by their answers to the same examples.
        "right": [np.packbits(lane).tobytes().hex() for lane in right],
        "curves": curves,
    }


def make_teacher(trainer: Trainer, lanes: Any, pupils: Placed) -> Teacher:
    """The trained network as the teacher of another task's students."""
    first = jax.jit(lambda lanes: jax.tree.map(lambda x: x[0], lanes))
    weights = first((lanes["params"], lanes["stats"]))
    teacher = Teacher(graphdef=trainer.graphdef, argument=weights, precomputed=False)
    # Rows that arrive in pieces have no fixed numbers to look logits up by.
    if trainer.config.augment != "none" or pupils.arrays is None:
        return teacher
    inputs = pupils.task.train.inputs
    ask = jax.jit(lambda weights, x: teacher.logits(weights, trainer.prepare(x, None)))
    rows = [ask(weights, inputs[i : i + 500]) for i in range(0, len(inputs), 500)]
    logits = jax.device_put(jnp.concatenate(rows), pupils.replicated)
    return dataclasses.replace(teacher, argument=logits, precomputed=True)


def _load(scorer: Scorer, path: str) -> tuple[Any, Record]:
    trainer = scorer.trainer
    model = trainer.make(key=jax.random.key(0))
    model.load(path)
    _, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    variables = jax.tree.map(lambda x: x[None], {"params": params, "stats": stats})
    lanes = jax.device_put(variables, trainer.placed.replicated)
    parts = {"validation": trainer.placed.task.validation, "test": trainer.placed.task.test}
    scores = {name: scorer.accuracy(lanes, part).tolist() for name, part in parts.items()}
    return lanes, {"alphas": [0.0], "curves": [], **scores}


def _curves(path: epath.Path, lanes: int) -> list[dict[str, list[float]]]:
    """Return the curves of `fit`, a dictionary an epoch with every lane's values by name."""
    epochs: dict[int, dict[str, float]] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        epochs.setdefault(line.pop("step"), {}).update(line)
    # JSON has no nan; a writer leaves null.
    return [
        {
            name.removeprefix("eval/").removesuffix("/0"): [
                float("nan") if line[f"{name[:-1]}{lane}"] is None else line[f"{name[:-1]}{lane}"]
                for lane in range(lanes)
            ]
            for name in line
            if name.endswith("/0")
        }
        for _, line in sorted(epochs.items())
    ]

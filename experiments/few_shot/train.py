"""Training every arm of the few-shot experiment on every sample, and scoring it."""

import functools
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from experiments.few_shot import samples as few_shot_samples
from experiments.few_shot.arms import Arm, arms
from experiments.few_shot.config import Config
from experiments.few_shot.data import Task, load_task
from experiments.shared.records import Record, kept
from logitjax import few_shot, training


def train_all(
    config: Config, workdir: epath.Path, told_to_stop: Callable[[int], bool]
) -> dict[str, Any]:
    """The scores of every sample by data set, arm and shots; see :func:`train_arm`."""
    existing, mesh = arms(config), training.make_mesh(config.mesh)
    results: dict[str, Any] = {}
    done = 0

    def train(task: Callable[[], Task], arm: str, shots: int, done: int) -> Record:
        if told_to_stop(done):
            raise training.Preempted(done)
        return train_arm(config, task(), existing[arm], shots, mesh)

    for spec in config.data:
        name = spec.partition("=")[0]
        directory = workdir / "results" / re.sub(r"\W+", "_", name)
        # Read only if an arm is left to train.
        task = functools.cache(functools.partial(_load, config, spec))
        for arm in config.arm:
            for shots in config.shots:
                path = directory / f"{arm}_{shots}.json"
                record = kept(path, functools.partial(train, task, arm, shots, done))
                accuracy, seconds = 100 * np.mean(record["test"]), record["seconds"]
                logging.info(
                    "%s, %s, %d shots: test %.2f%% in %.1f s", name, arm, shots, accuracy, seconds
                )
                results.setdefault(name, {}).setdefault(arm, {})[shots] = record
                done += 1
    return results


def _load(config: Config, spec: str) -> Task:
    start = time.perf_counter()
    task = load_task(config, spec)
    logging.info(
        "%s: %d pictures of %d classes in %.1f s",
        spec,
        len(task.train_labels),
        len(task.class_names),
        time.perf_counter() - start,
    )
    return task


def train_arm(config: Config, task: Task, arm: Arm, shots: int, mesh: Mesh) -> Record:
    """Test accuracies of every sample at its chosen setting, and of the zero-shot classifier."""
    start = time.perf_counter()
    candidate = arm.candidate.at_scale(task.scale)
    record: Record = {"test": [], "validation": [], "chosen": [], "zero_shot": [], "parts": []}
    record["shifted"] = {name: {"test": [], "zero_shot": []} for name in task.shifted}
    at_once = config.at_once * mesh.devices.shape[0]
    for first in range(0, config.runs, at_once):
        runs = range(first, min(first + at_once, config.runs))
        sizes: Any = {"most": max(config.shots), "seed": config.seed, "parts": config.test_parts}
        samples = few_shot_samples.draw(task, shots, runs=runs, **sizes)
        samples = samples.with_auxiliary(arm.auxiliary)
        held_out = samples.held_out
        options: Any = {"first": first, "sequential": config.at_once == 1, "mesh": mesh}
        scores, best = candidate.sweep(
            samples.task, held_out, "validation", seed=config.seed, **options
        )
        rows = np.arange(len(best))
        record["zero_shot"] += _zero_shot_accuracy(*held_out["test"])
        for name, scored in record["shifted"].items():
            scored["test"] += scores[name]["accuracy"][rows, best].tolist()
            scored["zero_shot"] += _zero_shot_accuracy(*held_out[name])
        record["chosen"] += best.tolist()
        parts = [scores[f"part {i}"]["accuracy"][rows, best] for i in range(config.test_parts)]
        record["parts"] += np.stack(parts, 1).tolist() if parts else []
        for part in ("test", "validation"):
            record[part] += scores[part]["accuracy"][rows, best].tolist()
        if "auxiliary_accuracy" in scores["test"]:
            alone = scores["test"]["auxiliary_accuracy"][rows, best]
            record.setdefault("auxiliary", []).extend(alone.tolist())
    record["updates"] = candidate.updates(int((samples.task.labels[0] >= 0).sum()))
    record["grid"] = {name: list(column) for name, column in (candidate.grid or {}).items()}
    record["seconds"] = time.perf_counter() - start
    return record


def _zero_shot_accuracy(images: few_shot.Inputs, labels: np.ndarray) -> list[float]:
    right = images.zero_shot.argmax(-1) == labels
    return (right.sum(1) / (labels >= 0).sum(1)).tolist()

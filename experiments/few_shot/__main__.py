"""Few-shot learning beside a zero-shot classifier: AMU-Tuning and the methods it unifies.

    python -m experiments.few_shot --preset=demo --workdir=runs/few_shot

encodes Tux Paint's stamps (14 classes of drawings) and Fashion-MNIST with two frozen networks,
draws samples of 1, 2, 4, 8 and 16 pictures a class, trains every arm on each, and writes
``report.md``: accuracies, differences paired by sample, AMU's ablations, and a plot. Whatever an
arm has to choose it chooses on validation pictures of its own sample. Kill it whenever you like:
the same command continues with the arm it was at.

The zero-shot classifier is EfficientNet-Lite0's ImageNet head read by class names: every class of
the data set is a set of ImageNet classes. It is NOT CLIP, which no package holds; the auxiliary
encoder is AlexNet. With CLIP weights and a second encoder on disk, ``--preset=paper`` runs the
published setting on ImageNet and ten more data sets.

Arms (``--arm``, repeatable): ``amu`` (the released code's form), ``amu_kurtosis`` (its weights by
the kurtosis of probabilities over a fourth of the classes), ``amu_paper`` (the paper's figure),
``amu_same_encoder`` (the auxiliary features are the zero-shot encoder's own), ``tip_adapter``,
``tip_adapter_f``, ``cafo``, ``ape``, ``clip_adapter``, ``task_res``, ``lp_plus_plus``,
``linear_probe``, ``linear_probe_auxiliary``, ``cross_modal``: each tries as many settings as any
other. ``fixed`` is AMU with beta 2 and nothing tuned, ``fixed_...`` its ablations.
``docs/few_shot.md`` has the results.
"""

import dataclasses
import json
import re
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from experiments.few_shot import arms as few_shot_arms
from experiments.few_shot import data as few_shot_data
from experiments.few_shot import samples as few_shot_samples
from experiments.few_shot.config import _SCALED, PRESETS, Config
from logitjax import few_shot, processes, training
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Train every arm on every sample, then write the report."""
    from experiments.few_shot import report

    with training.lock_workdir(workdir), training.watch_for_preemption() as told_to_stop:
        results = train_all(config, workdir, told_to_stop)
    if jax.process_index() == 0:
        print(report.write(config, results, workdir))


def train_all(config: Config, workdir: epath.Path, told_to_stop: Any) -> dict[str, Any]:
    """By data set, arm and shots the scores of every sample; see :func:`train_arm`."""
    known = few_shot_arms.arms(config)
    results: dict[str, Any] = {}
    done = 0
    for spec in config.data:
        name = spec.partition("=")[0]
        directory = workdir / "results" / re.sub(r"\W+", "_", name)
        task = None
        for arm in config.arm:
            for shots in config.shots:
                path = directory / f"{arm}_{shots}.json"
                finished = processes.broadcast_from_first(path.exists)
                record = json.loads(path.read_text()) if finished else None
                if record is None:
                    if told_to_stop(done):
                        raise training.Preempted(done)
                    task = task or _load(config, spec)
                    record = train_arm(config, task, known[arm], shots)
                    processes.write_json(path, record)
                    chosen = np.mean(record["test"])
                    logging.info(
                        "%s, %s, %d shots: test %.2f%% in %.1f s",
                        name,
                        arm,
                        shots,
                        100 * chosen,
                        record["seconds"],
                    )
                results.setdefault(name, {}).setdefault(arm, {})[shots] = record
                done += 1
    return results


def _load(config: Config, spec: str) -> few_shot_data.Task:
    start = time.perf_counter()
    task = few_shot_data.load_task(config, spec)
    logging.info(
        "%s: %d pictures of %d classes in %.1f s",
        spec,
        len(task.train_labels),
        len(task.class_names),
        time.perf_counter() - start,
    )
    return task


def train_arm(
    config: Config, task: few_shot_data.Task, arm: few_shot_arms.Arm, shots: int
) -> dict[str, Any]:
    """Test accuracies of every sample at its chosen setting, and of the zero-shot classifier."""
    start = time.perf_counter()
    record: dict[str, Any] = {"test": [], "validation": [], "chosen": [], "zero_shot": []}
    method = arm.config
    if isinstance(method, _SCALED):
        method = dataclasses.replace(method, scale=task.scale)
    record["shifted"] = {name: {"test": [], "zero_shot": []} for name in task.shifted}
    for first in range(0, config.runs, config.at_once):
        runs = range(first, min(first + config.at_once, config.runs))
        samples = few_shot_samples.draw(
            task, shots, runs=runs, most=max(config.shots), seed=config.seed
        )
        support, held_out = samples.support, samples.held_out
        if arm.same_encoder:
            support = dataclasses.replace(support, auxiliary=support.features)
            held_out = {
                name: (dataclasses.replace(images, auxiliary=images.features), labels)
                for name, (images, labels) in held_out.items()
            }
        scores = few_shot.sweep_few_shot(
            method,
            support,
            samples.labels,
            held_out,
            training=arm.recipe,
            grid=arm.grid,
            class_weights=task.class_weights,
            views=task.views,
            seed=config.seed,
            first=first,
            sequential=config.at_once == 1,
        )
        best = few_shot.best_setting(scores["validation"])
        rows = np.arange(len(best))
        record["zero_shot"] += _zero_shot_accuracy(*held_out["test"])
        for name, scored in record["shifted"].items():
            scored["test"] += scores[name]["accuracy"][rows, best].tolist()
            scored["zero_shot"] += _zero_shot_accuracy(*held_out[name])
        record["chosen"] += best.tolist()
        for part in ("test", "validation"):
            record[part] += scores[part]["accuracy"][rows, best].tolist()
        if "auxiliary_accuracy" in scores["test"]:
            alone = scores["test"]["auxiliary_accuracy"][rows, best]
            record.setdefault("auxiliary", []).extend(alone.tolist())
    record["grid"] = {name: list(column) for name, column in (arm.grid or {}).items()}
    record["seconds"] = time.perf_counter() - start
    return record


def _zero_shot_accuracy(images: few_shot.FewShotInputs, labels: np.ndarray) -> list[float]:
    right = images.zero_shot.argmax(-1) == labels
    return (right.sum(1) / (labels >= 0).sum(1)).tolist()


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

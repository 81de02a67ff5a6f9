"""Dual-head knowledge distillation beside everything it has to beat, each with its own best alpha.

    python -m experiments.dual_head --preset=demo --workdir=runs/dual_head

trains a teacher, then one student per arm, seed and value of alpha, and writes ``report.md`` with
the test accuracy of every arm at the alpha that was best on *validation* data, paired tests
between arms, and plots of how the two gradients and the features develop. Kill it whenever you
like: the same command continues where it stopped.

Arms (``--arm``, repeatable): ``ce``; ``label_smoothing``; ``kd``, ``dkd``, ``kd_standardized``,
``dist`` (cross-entropy plus alpha times that loss); ``single`` (cross-entropy plus alpha times the
logit loss, on one head); ``dual_linear`` and ``dual_mlp`` (the logit loss on a second head, which
is the paper's method); ``..._aligned`` projects the logit loss's gradient in the trunk,
``..._aligned_all`` over all parameters as released. Every arm tries the same values of alpha.

Presets: ``smoke`` (synthetic images, seconds), ``demo`` (Fashion-MNIST, 10,000 images, ResNet-8),
``report`` (100 languages, an MLP, 5 seeds), ``fashion`` (the demo with 3 alphas and seeds),
``paper`` (CIFAR-100), ``paper_tiny_imagenet``, ``paper_imagenet``; the last three need ``--data``
to point to the files. ``docs/dual_head.md`` has the results and how to get the data.
"""

import dataclasses
from typing import Any

import jax
from absl import logging
from etils import epath

from experiments.dual_head import arms as dual_head_arms
from experiments.dual_head.config import PRESETS, Config
from logitjax import processes, training
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Train the teacher and every arm, then write the report."""
    from experiments.dual_head import report

    with training.lock_workdir(workdir), training.watch_for_preemption() as told_to_stop:
        results = train_all(config, workdir, told_to_stop)
    if jax.process_index() == 0:
        print(report.write(config, results, workdir))


def train_all(config: Config, workdir: epath.Path, told_to_stop: Any) -> dict[str, Any]:
    """The teacher's record, and those of every arm by seed."""
    from experiments.dual_head import data as dual_head_data
    from experiments.dual_head import train

    mesh = training.make_mesh(config.mesh)
    task = dual_head_data.load_task(config, workdir)
    resident = train.resident(task, mesh)
    taught_on, taught_resident = task, resident
    if config.teacher_examples:
        other = dataclasses.replace(config, train_examples=config.teacher_examples)
        taught_on = dual_head_data.load_task(other, workdir)
        taught_resident = train.resident(taught_on, mesh)
    known = dual_head_arms.arms(config)

    def trainer(arm: dual_head_arms.Arm, **options: Any) -> Any:
        return train.Trainer(config, task, arm, resident=resident, mesh=mesh, **options)

    teaching = train.Trainer(
        config,
        taught_on,
        known["ce"],
        resident=taught_resident,
        mesh=mesh,
        network=config.teacher,
        epochs=config.teacher_epochs,
        learning_rate=config.teacher_learning_rate,
        alphas=(0.0,),
        teacher=None,
    )
    teacher, record = train.train_teacher(
        teaching, workdir / "teacher", pupils=task, told_to_stop=told_to_stop
    )
    logging.info("teacher %s: test accuracy %.4f", config.teacher, record["test"][0])
    results: dict[str, Any] = {"teacher": record, "arms": {}}
    for name in config.arm:
        arm = known[name]
        has_alpha = arm.smooths or arm.logit_loss is not None
        made = None
        for seed in range(config.seeds):
            directory = workdir / "arms" / name / f"seed-{seed}"
            record = train.read_record(directory / "result.json")
            if record is None:
                made = made or trainer(
                    arm,
                    network=config.student,
                    epochs=config.epochs,
                    learning_rate=config.learning_rate,
                    alphas=config.alpha if has_alpha else (0.0,),
                    teacher=teacher if arm.logit_loss is not None else None,
                )
                _, record = made.fit(
                    directory, seed=seed, told_to_stop=told_to_stop, diagnose=seed == 0
                )
                processes.write_json(directory / "result.json", record)
                if jax.process_index() == 0 and (directory / "checkpoints").exists():
                    (directory / "checkpoints").rmtree()
            best = max(range(len(record["alphas"])), key=lambda i: record["validation"][i])
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


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

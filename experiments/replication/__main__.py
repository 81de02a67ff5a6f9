"""Students of a model of which only the answers, and with them the head, are known.

    python -m experiments.replication --preset=report --workdir=runs/replication

trains a teacher, recovers the column space of its head from log-probabilities (a `LogitOracle` with
a policy), distils students of several depths behind it, and compares them with students whose head
was copied, with ones that have to learn a head, with the teacher's own layers dropped, and with the
same network trained on text alone. ``report.md``: perplexity (of the next token, pads left out, and
as the released code computes it), parameters, measured speed, and the geometry of the last hidden
states beside its null.

Arms (``--arm``, repeatable) are ``KIND_LAYERS``: ``recovered``, ``copied`` (what the released code
does), ``official`` (its loss too: all positions, pads included, summed over each sequence),
``none``, ``dropped``, ``scratch``. Every arm tries the same learning rates on validation data. Kill
it whenever you like: finished runs are kept.
"""

import json
from typing import Any

import jax
from absl import logging
from etils import epath

from experiments.replication import models, report
from experiments.replication.config import PRESETS, Config
from logitjax import processes, training
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """The teacher, its head from outside, every student, the report."""
    with training.lock_workdir(workdir):
        with processes.first_before_others("teacher"):
            scene = models.prepare(config, workdir)
        logging.info(
            "head of the teacher: dimension %d of %d, leak %.4f, after %d queries",
            scene.recovered["dimension"],
            config.width,
            scene.recovered["leak"],
            scene.recovered["queries"],
        )
        for arm in processes.local_share(config.arm):
            _arm(scene, arm, config, workdir / "arms")
        processes.barrier("arms")
        if jax.process_index() == 0:
            records = [
                record
                for arm in config.arm
                for record in _arm(scene, arm, config, workdir / "arms")
            ]
            print(report.write(config, scene, records, workdir))


def _arm(scene: Any, arm: str, config: Config, directory: epath.Path) -> list[dict[str, Any]]:
    """Records of every seed, at the learning rate that was best with the first one."""
    records: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        path = directory / f"{arm}_{seed}.json"
        if path.exists():
            records.append(json.loads(path.read_text()))
            continue
        rates = (records[0]["lr"],) if records else config.learning_rate
        tried = [models.train_student(scene, arm, seed, rate, config) for rate in rates]
        best = min(tried, key=lambda record: record["validation_nll"])
        logging.info("%s, seed %d: test NLL %.4f at %g", arm, seed, best["nll"], best["lr"])
        directory.mkdir(parents=True, exist_ok=True)
        part = directory / f"{arm}_{seed}.part"
        part.write_text(json.dumps(best))
        part.replace(path)
        records.append(best)
    return records


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

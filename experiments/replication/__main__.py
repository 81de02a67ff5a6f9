"""Train students of a model of which only the answers are known, and through them the head.

    python -m experiments.replication --preset=report --workdir=runs/replication

trains a teacher, recovers the column space of its head from log-probabilities (a `LogitOracle` with
a policy), and distils students of several depths behind that head. Other students copy the head,
learn a head from nothing, keep some of the teacher's own layers, or see text alone. `report.md` has
perplexity (of the next token, pads left out, and as the released code computes it), parameters,
measured speed, and the geometry of the last hidden states beside its null.

Arms (`--arm`, repeatable) are `KIND_LAYERS`, with kinds `recovered`, `copied` (as the released code
does), `official` (also with its loss: all positions, pads included, summed over each sequence),
`none`, `dropped` and `scratch`. Every arm tries the same learning rates on validation data. You may
kill it at any time: finished runs are kept.
"""

import functools

import jax
from absl import logging
from etils import epath

from experiments.replication import report, train
from experiments.replication.config import PRESETS, Config
from experiments.shared.records import best_of, tuned_seeds
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """The teacher, its head from outside, every student, the report."""
    directory = workdir / "arms"
    scene = train.prepare(config, workdir)
    logging.info("recovered of a head of width %d: %s", config.width, scene.recovered)
    records = []
    for arm in config.arm:
        student = functools.partial(train.train_student, scene, arm, directory)
        records += tuned_seeds(
            lambda seed, arm=arm: directory / f"{arm}_{seed}.json",
            config.seeds,
            config.learning_rate,
            lambda seed, rates, student=student: best_of(functools.partial(student, seed), rates),
        )
    if jax.process_index() == 0:
        print(report.write(config, scene, records, workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

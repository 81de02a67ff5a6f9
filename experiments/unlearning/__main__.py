"""Unlearning on TOFU: forget some made-up authors, keep the others, and measure both.

    python -m experiments.unlearning --preset=demo --tofu_dir=DIR --workdir=runs/unlearning

finetunes a target on all authors, and a second model on those that may be kept. Every arm makes the
target forget, and all models answer TOFU's questions. `difference_*` are the logit difference (an
assistant of the target's first layers, as released and as we would have it). The others train the
target's weights. Each arm's epoch is the best on validation, where the facts are asked in other
words and other facts are kept.

`report.md` has the distance of truth ratios from those of the retrained model (D, p), utility and
its share of the target's, seconds and memory of training, sweeps of alpha and beta, what comes back
under paraphrase and after relearning. A logit difference leaves the target's weights as they are,
and the report says so.

`DIR` holds TOFU's files, and the paraphrases and wrong answers of the release of arXiv 2406.08607
(`--augmentation_dir` if elsewhere, `--noaugment` without). `hf:locuslab/TOFU` fetches TOFU. Models
are kept in `--models_dir` and shared between runs. You may kill it at any time: the same command
continues, from the last checkpoint of a finetuning, the last finished arm, or the last set that was
asked (and within an arm with `--resume_arms`).
"""

import jax
from etils import epath

from experiments.unlearning import report
from experiments.unlearning.config import PRESETS, Config
from experiments.unlearning.results import Run
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Make the models, ask them, write the report."""
    results = Run(config, workdir).results()
    if jax.process_index() == 0:
        print(report.write(config, results, workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

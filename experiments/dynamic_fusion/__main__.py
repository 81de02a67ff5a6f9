"""Dynamic logit fusion: what small experts teach a large model while it decodes, token by token.

    make first-folio
    python -m experiments.dynamic_fusion --preset=demo --workdir=runs/dynamic_fusion

cuts a small base out of a large model and heals it on general text, tunes an expert from it on each
of two domains (Shakespeare in the spelling of 1623; which of 12 topics a Wikipedia article has),
tunes the large model itself as the ceiling, and scores every way to fuse them: proxy-tuning with
alpha = 1 and with the alpha that is best on validation data, the paper's grid, and the root and
minimum searches of `logitjax.fusion`; with one expert and with both; on held-out text of the
domain and on general text. `report.md` gets NLL, accuracy, the share of the gap to the ceiling
that is closed as (x - base) / (ceiling - base) and as the paper's ratio x / ceiling, how near the
searches come to their global minimum, tokens a second, and a plot of alpha over tokens.

With `--domain=gsm8k:DIR` (or `trivia_qa`, `cnn_dm`, `truthful_qa`, `mmlu`) experts learn
a published task and every arm answers its test questions, which are graded as published.

Models and what their heads see are kept in `--models_dir` and shared between runs. Kill it
whenever you like: the same command continues where it stopped.
"""

import jax
from etils import epath

from experiments.dynamic_fusion import measure, report
from experiments.dynamic_fusion.config import PRESETS, Config
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Make the models, score every arm, write the report."""
    results = measure.open_lineup(config, workdir).all()
    if jax.process_index() == 0:
        print(report.write(config, results, workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

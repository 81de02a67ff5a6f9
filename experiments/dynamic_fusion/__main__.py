"""Compare ways in which small experts steer a large model while it decodes.

    make first-folio
    python -m experiments.dynamic_fusion --preset=demo --workdir=runs/dynamic_fusion

first makes the models. It cuts a small base out of a large model and heals it on general text. It
tunes an expert from the base on each of two domains: Shakespeare in the spelling of 1623, and which
of 12 topics a Wikipedia article has. The large model itself is tuned as the ceiling.

Then it scores every way to fuse them, with one expert and with both, on held-out text of the domain
and on general text: proxy-tuning with alpha = 1 and with the alpha that is best on validation data,
the paper's grid, and the root searches of `logitjax.fusion`. `report.md` has NLL,
accuracy, the share of the gap to the ceiling that is closed, as (x - base) / (ceiling - base) and
as the paper's ratio x / ceiling, tokens a second, and a plot of alpha over tokens.

With `--graded=gsm8k`, or another task of lm-evaluation-harness, every arm answers its questions.

Models and the hidden states that their heads see are kept in `--models_dir` and shared between
runs. You may kill it at any time: the same command continues where it stopped.
"""

import jax
from etils import epath

from experiments.dynamic_fusion import measure, report, units
from experiments.dynamic_fusion.config import PRESETS, Config
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Make the models, score every arm, write the report."""
    measured = measure.open_lineup(config, workdir)
    if config.part:
        return units.run(measured)
    results = measured.all()
    if jax.process_index() == 0:
        print(report.write(config, results, workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

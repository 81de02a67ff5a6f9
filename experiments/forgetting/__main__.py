"""Forgetting on a whole model: methods side by side, chosen without a retrained model, attacked.

    python -m experiments.forgetting --preset=demo --workdir=runs/forgetting
    python -m experiments.forgetting --preset=report --tofu_dir=DIR --only=target --workdir=DIR2

`demo` teaches SmolLM2-135M-Instruct, whole, 8 invented facts beside 16 that it knows, and has four
methods forget the 8, at what is chosen by the rule of `logitjax unlearn`: answers to forget become
as likely as answers to facts that nobody taught, and nothing else may change. `report` does so with
authors of TOFU: 40 are taught, four forgotten, three models are taught all but these for the floor
of the distance D between truth ratios, each method has as many steps and trials of learning rates,
and three seeds. It takes many hours of two cores; each part (`target`, `retrained-0`, a method, or
a method and a seed as in `rmu-2`) is made by itself with `--only`, and killed and started again as
often as you like. `report.md` has what was kept and forgotten, one table of attacks on every
method, curves of teaching it again beside a model that never knew, and the hours of each part.
"""

from etils import epath

from experiments.forgetting import report
from experiments.forgetting.config import PRESETS, Config
from experiments.forgetting.run import Run
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Makes the parts that are asked for, and the report of all that are there."""
    print(report.write(config, Run(config, workdir).results(), workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

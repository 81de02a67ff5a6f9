"""Compare unlearning methods on a whole model, chosen without a retrained model, under attack.

    python -m experiments.forgetting --preset=demo --workdir=runs/forgetting
    python -m experiments.forgetting --preset=report --tofu_dir=DIR --only=target --workdir=DIR2

`demo` teaches the whole SmolLM2-135M-Instruct 8 invented facts beside 16 that it knows. Four
methods then forget the 8, by the rule of `logitjax unlearn`: answers to forget become only as
likely as answers to facts that were never taught, and everything else stays the same.

`report` does the same with authors of TOFU: 40 are taught, and four of them forgotten. Three models
are taught all but these, which gives the floor of the distance D between truth ratios. Each method
has equally many steps and trials of learning rates, and three seeds. It takes many hours of two
cores. Each part (`target`, `retrained-0`, a method, or a method and a seed as in `rmu-2`) is made
separately with `--only`, and may be killed and restarted at any time.

`report.md` has the shares kept and forgotten, one table of attacks on every method, curves of
relearning beside a model that never knew, and the hours of each part.
"""

from etils import epath

from experiments.forgetting import report
from experiments.forgetting.config import PRESETS, Config
from experiments.forgetting.run import Run
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Makes the requested parts, and the report of all parts that exist."""
    print(report.write(config, Run(config, workdir).results(), workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

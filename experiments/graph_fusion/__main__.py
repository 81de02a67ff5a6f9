"""Fuse language models into one: graph-on-logits distillation (InfiGFusion) beside its baselines.

    python -m experiments.graph_fusion --preset=demo --workdir=runs/demo

reads text, lets every source model say what it expects at each position (once, into a cache of
top logits), trains the pivot model once per arm with equal steps, and writes `report.md` with
held-out perplexity, top-1 agreement with the first source, seconds a step, sample continuations and
plots. Kill it whenever you like: the same command continues where it stopped.

Arms (`--loss`, repeatable): `sft` next-token cross-entropy; `kl` adds KL to the sources' top
logits with the exact tail mass (needs the same vocabulary); `uld` adds universal logit distance,
`gld` graph-on-logits distillation, `uld+gld` both, which is InfiGFusion; `dual` a second LM
head, dropped afterwards, that regresses the sources' top logits (same vocabulary). Weights follow
the paper: (1 - mix) SFT + mix (...). With several learning rates, each arm picks its own on
validation data with the first seed before the other seeds run.
"""

from etils import epath

from experiments.graph_fusion.config import PRESETS, Config
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Train and score every arm, then write the report."""
    from experiments.graph_fusion import report, train

    outcomes = train.run_arms(config, workdir)
    print(report.write(config, outcomes, workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

"""Prune a model and heal it: graph-on-logits distillation (InfiGFusion) beside its baselines.

    python -m experiments.graph_fusion --preset=demo --workdir=runs/demo

cuts six layers out of SmolLM2, lets the whole model say what it expects at each position of some
text (once, into a cache of top logits), heals the rest once per arm with equal steps, and writes
`report.md`: held-out perplexity, bits a byte, agreement with and KL from the whole model, speed,
samples and plots; the last line printed is how much CPU time that took. Kill it whenever you like:
the same command continues where it stopped.

    python -m experiments.graph_fusion --preset=heterogeneous --workdir=runs/heterogeneous

is about sources of another tokenizer (`make gemma` fetches one): every loss beside tuned SFT, one
and two teachers of a healed student, and the pair the other way round. It takes hours;
`--part=pair` runs one part, and a later run of all of them takes over what is there.

Arms (`--loss`, repeatable): `sft` next-token cross-entropy; `kl` adds KL from the sources' top
logits with the exact tail mass (needs the same vocabulary); `uld` adds universal logit distance,
`gld` graph-on-logits distillation, `uld+gld` both, which is InfiGFusion; `kl_only` leaves SFT out;
`dual` adds a second LM head, dropped afterwards, that regresses the sources' top logits. Weights
follow the paper: (1 - mix) SFT + mix (...). With several learning rates, mixes or graph losses each
arm picks its own on validation data, in equally many trials with the first seed; `--drop_layers`
may be repeated, and all but the first use what was picked there.
"""

import time

from etils import epath

from experiments.graph_fusion.config import PRESETS, Config
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Prune, train and score every arm, then write the report."""
    from experiments.graph_fusion import report, train

    if config.part:
        found = {}
        for name in config.part:
            chosen = config.of_part(name)
            found[name] = train.run_all(chosen, workdir / name)
            report.write(chosen, found[name], workdir / name)
            print(report.write_parts(config, found, workdir))
    else:
        results = train.run_all(config, workdir)
        print(report.write(config, results, workdir))
    print(f"\n{time.process_time():.0f} CPU-seconds")


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

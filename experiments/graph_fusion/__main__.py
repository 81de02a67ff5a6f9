"""Prune a model and heal it by graph-on-logits distillation (InfiGFusion) and its baselines.

    python -m experiments.graph_fusion --preset=demo --workdir=runs/demo

cuts six layers out of SmolLM2 and lets the whole model read some text once, into a cache of its top
logits. It heals the rest once per arm, with equal steps. `report.md` has held-out perplexity, bits
a byte, agreement with and KL from the whole model, speed, samples and plots. The last line printed
is the CPU time used. You may kill it at any time: the same command continues from where it stopped.

    python -m experiments.graph_fusion --preset=heterogeneous --workdir=runs/heterogeneous

learns from a source with another tokenizer (`make gemma` fetches one): every loss beside tuned SFT,
one and two teachers of a healed student, and the pair with roles exchanged. It takes hours.
`--part=pair` runs one part, and a later run of all parts reuses finished ones.

Arms (`--loss`, repeatable): `sft` is next-token cross-entropy. `kl` adds KL from the sources' top
logits with the exact tail mass, which needs the same vocabulary. `uld` adds universal logit
distance, `gld` graph-on-logits distillation, and `uld+gld` both, which is InfiGFusion. `kl_only`
leaves SFT out. Weights follow the paper: (1 - mix) SFT + mix (...).

With several learning rates, mixes or graph losses each arm chooses its own on validation data, in
equally many trials with the first seed. `--drop_layers` may be repeated; all but the first use the
settings chosen at the first.
"""

import time

from etils import epath

from experiments.graph_fusion.config import PRESETS, Config
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Prune, train and score every arm, then write the report."""
    from experiments.graph_fusion import report, train

    if config.part:
        entries = {}
        for name in config.part:
            chosen = config.of_part(name)
            entries[name] = train.run_all(chosen, workdir / name)
            report.write(chosen, entries[name], workdir / name)
            print(report.write_parts(config, entries, workdir))
    else:
        results = train.run_all(config, workdir)
        print(report.write(config, results, workdir))
    print(f"\n{time.process_time():.0f} CPU-seconds")


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

"""Compare AMU-Tuning with other few-shot methods beside a zero-shot classifier.

    python -m experiments.few_shot --preset=demo --workdir=runs/few_shot

encodes Tux Paint's stamps (14 classes of drawings) and Fashion-MNIST with two frozen networks,
draws samples of 1, 2, 4, 8 and 16 pictures a class, and trains every arm on each. `report.md` has
accuracies, differences paired by sample, AMU's ablations, and a plot. Every arm chooses its
settings on validation pictures of its own sample. You may kill it at any time: the same command
continues with the unfinished arm.

The zero-shot classifier is EfficientNet-Lite0's ImageNet head read by class names: every class of
the data set is a set of ImageNet classes. It is NOT CLIP, which no package holds. The auxiliary
encoder is AlexNet. With CLIP weights and a second encoder on disk, `--preset=paper` runs the
published setting on ImageNet and ten more data sets.

Arms (`--arm`, repeatable): `amu` (the released code's form), `amu_kurtosis` (its weights by the
kurtosis of probabilities over a fourth of the classes), `amu_paper` (the paper's figure),
`amu_same_encoder` (the auxiliary features are the zero-shot encoder's own), and the methods of
`few_shot.Candidate.all`. Each tries as many settings as any other, by its published recipe, and the
report gives the gradient steps that takes. `fixed` is AMU with beta 2 and no tuning, and
`fixed_...` are its ablations. `docs/few_shot.md` has the results.
"""

import jax
from etils import epath

from experiments.few_shot.config import PRESETS, Config
from logitjax import training
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Train every arm on every sample, then write the report."""
    from experiments.few_shot import report, train

    with training.watch_for_preemption() as told_to_stop:
        results = train.train_all(config, workdir, told_to_stop)
    if jax.process_index() == 0:
        print(report.write(config, results, workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

"""Compare dual-head knowledge distillation with its competitors, each with its own best alpha.

    python -m experiments.dual_head --preset=demo --workdir=runs/dual_head

trains a teacher, then one student for each arm, seed and value of alpha. `report.md` has the test
accuracy of every arm at the alpha that was best on *validation* data, paired tests between arms,
and plots of the two gradients and the features over training. You may kill it at any time: the same
command continues from where it stopped.

Arms (`--arm`, repeatable): `ce`; `kd`, `dkd`, `kd_standardized` and `dist` (cross-entropy plus
alpha times that loss); `single` (the same with the logit loss, on one head); `logit_only`, and
`kd_and_logit` with KD in place of labels; `dual_linear` and `dual_mlp` (the logit loss on a second
head, the paper's method), where `..._aligned` projects the logit loss's gradient in the trunk.

Presets: `smoke` (synthetic images, seconds), `demo` (Fashion-MNIST, 10,000 images, ResNet-8),
`report` (100 languages, an MLP, 10 seeds), `fashion` (an MLP, all baselines, 9 alphas, 10 seeds),
`paper` (CIFAR-100), `paper_tiny_imagenet`, `paper_imagenet`. The last three need `--data` to point
to the files. `docs/dual_head.md` has the results, and says how to get the data.
"""

import jax
from etils import epath

from experiments.dual_head.config import PRESETS, Config
from logitjax.commands import cli


def run(config: Config, workdir: epath.Path) -> None:
    """Train the teacher and every arm, then write the report."""
    from experiments.dual_head import report
    from experiments.dual_head import run as runs

    results = runs.train_all(config, workdir)
    if jax.process_index() == 0:
        print(report.write(config, results, workdir))


if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

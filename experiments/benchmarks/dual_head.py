"""Training steps of ResNet-20: the cost of a second head and aligned gradients beside plain KD.

    python -m experiments.benchmark dual_head

Batches of 64 images of 32 x 32, augmented, as in the published CIFAR-100 recipe: forward and
backward of the student, SGD, batch statistics. ``kd`` is the baseline, once with the teacher's
(ResNet-56) forward pass in the step, as training with augmentation needs it, and once with its
logits given. If the interpreter in ``LOGITJAX_TORCH_PYTHON`` has torch, the same KD step is timed
there, in turns with ours, with as many threads.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.dual_head import arms as dual_head_arms
from experiments.dual_head import data as dual_head_data
from experiments.dual_head import run as dual_head_run
from experiments.dual_head.config import Config
from experiments.dual_head.train import Course, Trainer
from experiments.shared import peers, suite, timing
from logitjax import training

_ARMS = ("kd", "single", "dual_linear", "dual_mlp", "dual_linear_aligned", "dual_mlp_aligned")
_DHKD_LIMIT, _ALIGNED_LIMIT = 1.05, 1.6


def run(options: suite.Options) -> suite.Result:
    batch = 8 if options.smoke else 64
    student, teacher = ("resnet8", "resnet8") if options.smoke else ("resnet20", "resnet56")
    names = ("kd", "dual_linear", "dual_mlp_aligned") if options.smoke else _ARMS
    rows: list[dict[str, Any]] = []
    bars: list[suite.Bar] = []
    script = Path(__file__).with_name("_dual_head_torch.py")
    with peers.torch_peer(script, batch, smoke=options.smoke) as torch:
        for given in (False,) if options.smoke else (False, True):
            calls = _steps(names, student, teacher, batch, logits_given=given)
            if torch is not None:
                calls["kd, torch"] = functools.partial(torch, given)
            seconds = timing.paired_seconds(calls, repeats=options.repeats)
            where = "logits given" if given else f"{teacher} in the step"
            for name in calls:
                ratio = timing.paired_ratio(seconds[name], seconds["kd"])
                median = float(np.median(seconds[name]))
                row = {"teacher": where, "step": name, "ms": 1e3 * median}
                rows.append(row | {"images/s": batch / median, "over kd": ratio})
                # The published recipe augments, so its teacher runs in the step.
                if not given and name.startswith("dual"):
                    limit = _ALIGNED_LIMIT if "aligned" in name else _DHKD_LIMIT
                    bars.append(suite.at_most(f"{name} / kd", ratio, limit))
    return suite.Result(rows=rows, bars=bars)


def _steps(
    names: tuple[str, ...], student: str, teacher: str, batch: int, *, logits_given: bool
) -> dict[str, Any]:
    config = Config(
        data="synthetic:100", augment="none" if logits_given else "crop_flip", batch_size=batch
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
    part = dual_head_data.Part(inputs=images, labels=rng.integers(100, size=len(images)))
    stats = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    task = dual_head_data.Task(train=part, validation=part, test=part, num_classes=100, **stats)
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    placed, arms = dual_head_data.place(task, mesh), dual_head_arms.arms(config)
    course = Course(network=teacher, epochs=240, learning_rate=0.05, alphas=(0.0,))
    teaching = Trainer(config, placed, arms["ce"], course)
    taught = dual_head_run.make_teacher(teaching, teaching.initial(1).params, placed)
    course = dataclasses.replace(course, network=student, alphas=(0.1,))

    def call(name: str) -> Any:
        trainer = Trainer(config, placed, arms[name], course, teacher=taught)
        kept = {"state": trainer.initial(0), "number": 0}

        def train() -> Any:
            batch = trainer.batch(kept["number"], seed=0)
            kept["state"], output = trainer.train_epoch(kept["state"], batch)
            kept["number"] += 1
            return output.metrics

        return train

    return {name: call(name) for name in names}

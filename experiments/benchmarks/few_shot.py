"""A few-shot head of ImageNet's size trained on cached features, beside eager torch.

    python -m experiments.benchmark few_shot

AMU as released: 1000 classes, 2048 features, 16 images a class, AdamW, which torch runs fused. The
whole run (50 epochs of batches of 256) is timed, and its memory read, in a process that does
nothing else. If the interpreter in ``LOGITJAX_TORCH_PYTHON`` has torch, the same steps are taken
there with as many threads, in turns with ours; every step of the run costs the same.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.shared import peers, suite, timing
from logitjax import few_shot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Bytes of the head and of the cached features."""

    classes: int = 1000
    features: int = 2048
    shots: int = 16
    epochs: int = 50

    @property
    def examples(self) -> int:
        return self.classes * self.shots


# Batch size, steps a turn, and the least ratio of torch's seconds to ours.
_TURNS = ((256, 63, 1 / 0.75), (8, 400, 1 / 0.75))
_SECONDS, _GB = 75.0, 1.5


def run(options: suite.Options) -> suite.Result:
    shape = Shape(classes=20, features=32, shots=4, epochs=3) if options.smoke else Shape()
    batch = 16 if options.smoke else 256
    whole = suite.in_fresh_process(_whole_run, shape, batch)
    rows: list[dict[str, Any]] = [whole]
    bars = []
    if not options.smoke:
        bars = [
            suite.at_most(f"seconds of the run, B = {batch}", whole["s"], _SECONDS),
            suite.at_most("peak RSS, GB", whole["peak RSS, GB"], _GB),
        ]
    turns = ((4, 10, 0.0),) if options.smoke else _TURNS
    script = Path(__file__).with_name("_few_shot_torch.py")
    sizes = (shape.classes, shape.features, shape.examples)
    with peers.torch_peer(script, *sizes, smoke=options.smoke) as torch:
        for batch, steps, least in turns:
            calls: dict[str, Callable[[], Any]] = {"logitjax": _steps(shape, batch, steps)}
            if torch is not None:
                calls["torch, eager"] = lambda b=batch, n=steps: torch(b, n)
            seconds = timing.paired_seconds(calls, repeats=options.repeats)
            for name, times in seconds.items():
                median = 1e3 * float(np.median(times))
                rows.append({"of": f"steps, {name}", "B": batch, "ms a step": median / steps})
            if torch is not None:
                ratio = timing.paired_ratio(seconds["torch, eager"], seconds["logitjax"])
                rows[-1]["over logitjax"] = ratio
                bars.append(suite.at_least(f"torch / logitjax, B = {batch}", ratio, least))
    return suite.Result(rows=rows, bars=bars)


def _problem(shape: Shape) -> few_shot.FewShotTask:
    rng = np.random.default_rng(0)
    auxiliary = rng.standard_normal((shape.examples, shape.features), dtype=np.float32)
    auxiliary /= np.linalg.norm(auxiliary, axis=1, keepdims=True)
    zero_shot = 3 * rng.standard_normal((shape.examples, shape.classes), dtype=np.float32)
    inputs = few_shot.Inputs(zero_shot=zero_shot, auxiliary=auxiliary)
    labels = np.arange(shape.examples, dtype=np.int32) % shape.classes
    return few_shot.FewShotTask(support=inputs, labels=labels)


def _steps(shape: Shape, batch: int, steps: int | None = None) -> Callable[[], jax.Array]:
    config = few_shot.methods.AMU()
    recipe = few_shot.Recipe(batch_size=batch, epochs=shape.epochs, steps=steps)
    task = jax.tree.map(jax.numpy.asarray, _problem(shape))
    order = jax.numpy.asarray(recipe.order(0, shape.examples))

    @jax.jit
    def fit(task: few_shot.FewShotTask, order: jax.Array) -> Any:
        state, losses = recipe.train(config, task, config.init(task), order)
        return state.trained, losses

    return lambda: fit(task, order)


def _whole_run(shape: Shape, batch: int) -> dict[str, Any]:
    """Compiles and trains; the memory is the most this process has held."""
    call = _steps(shape, batch)
    start = time.perf_counter()
    _, losses = jax.block_until_ready(call())
    seconds = time.perf_counter() - start
    if not np.isfinite(losses).all():
        raise FloatingPointError("the benchmark's losses are not finite")
    return {
        "of": f"{shape.epochs} epochs, compilation included",
        "B": batch,
        "ms a step": 1e3 * seconds / len(losses),
        "s": seconds,
        "peak RSS, GB": suite.memory_bytes("VmHWM") / 1e9,
    }

"""Paired timing: peers are timed in turns and compared by the median of ratios.

On a noisy machine, a slow minute slows both sides of a ratio.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def paired_seconds(
    functions: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function, called in turn `repeats` times after `warmup` calls."""
    for function in functions.values():
        for _ in range(warmup):
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = clock()
            jax.block_until_ready(function())
            seconds[name].append(clock() - start)
    return seconds


def repeated(step: Callable[..., Any], state: Any, *arguments: Any) -> Callable[[], Any]:
    """A call that takes one more training step from the last state, and returns its metrics."""
    items = [state]

    def call() -> Any:
        # A step donates its state, so each state is used once.
        items[0], output = step(items[0], *arguments)
        return output.metrics

    return call


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of measurements taken side by side."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))

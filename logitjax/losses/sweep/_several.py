import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from logitjax.losses.sweep._statistic import LogitBlock, Statistic
from logitjax.ops import AxisName


@dataclasses.dataclass(frozen=True)
class Several(Statistic):
    """Statistics of one pass each that share a sweep: their gradients are added block by block.

    The tokens given to `run` are `{"0": ..., "1": ...}`, for each statistic by its number; a
    statistic without an entry gets all of them. `run` returns a tuple of the statistics' results.
    Statistics that need more than one pass over the vocabulary are a ValueError.
    """

    statistics: tuple[Statistic, ...]

    def __post_init__(self) -> None:
        for statistic in self.statistics:
            if statistic.passes > 1:
                name = type(statistic).__name__
                raise ValueError(f"statistics: expected one pass each, got {name}")

    in_tiles = property(lambda self: all(one.in_tiles for one in self.statistics))  # type: ignore
    gradient_in_tiles = property(  # type: ignore[assignment]
        lambda self: all(one.gradient_in_tiles for one in self.statistics)
    )

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return tuple(statistic.start(batch, dtype, None) for statistic in self.statistics)

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        return tuple(
            statistic.absorb(part, self._block(block, i), None)
            for i, (statistic, part) in enumerate(zip(self.statistics, state, strict=True))
        )

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        pairs = zip(self.statistics, state, strict=True)
        return tuple(statistic.reduce(part, axis_name, None) for statistic, part in pairs)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        pairs = zip(self.statistics, state, strict=True)
        outputs, residuals = zip(*(statistic.finish(part, None) for statistic, part in pairs))
        return outputs, residuals

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        parts = [
            statistic.gradient(residuals[i], cotangents[i], self._block(block, i))
            for i, statistic in enumerate(self.statistics)
        ]
        return sum(parts[1:], parts[0])

    def losses(self, outputs: Any, tokens: Any) -> Any:
        return tuple(
            statistic.losses(outputs[i], tokens.get(str(i), tokens))
            for i, statistic in enumerate(self.statistics)
        )

    def _block(self, block: LogitBlock, number: int) -> LogitBlock:
        return block._replace(tokens=block.tokens.get(str(number), block.tokens))


@dataclasses.dataclass(frozen=True)
class _Wrapped(Statistic):
    """Wrapper that changes the blocks that a statistic gets."""

    statistic: Statistic

    passes = property(lambda self: self.statistic.passes)  # type: ignore[assignment]
    in_tiles = property(lambda self: self.statistic.in_tiles)  # type: ignore[assignment]
    gradient_in_tiles = property(lambda self: self.statistic.gradient_in_tiles)  # type: ignore

    def start(self, batch: tuple[int, ...], dtype: Any, passed: Any) -> Any:
        return self.statistic.start(batch, dtype, passed)

    def absorb(self, state: Any, block: LogitBlock, passed: Any) -> Any:
        return self.statistic.absorb(state, self._block(block), passed)

    def reduce(self, state: Any, axis_name: AxisName, passed: Any) -> Any:
        return self.statistic.reduce(state, axis_name, passed)

    def finish(self, state: Any, passed: Any) -> tuple[Any, Any]:
        return self.statistic.finish(state, passed)

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        return self.statistic.gradient(residuals, cotangents, self._block(block))

    def losses(self, outputs: Any, tokens: Any) -> Any:
        return self.statistic.losses(outputs, tokens)

    def _block(self, block: LogitBlock) -> LogitBlock:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Tempered(_Wrapped):
    """A statistic of both models' logits, divided by its own `temperature`."""

    temperature: float

    def gradient(self, residuals: Any, cotangents: Any, block: LogitBlock) -> jax.Array:
        return super().gradient(residuals, cotangents, block) / self.temperature

    def _block(self, block: LogitBlock) -> LogitBlock:
        teacher = None if block.teacher is None else block.teacher / self.temperature
        return block._replace(student=block.student / self.temperature, teacher=teacher)


@dataclasses.dataclass(frozen=True)
class LossOf(_Wrapped):
    """A loss per position of a statistic's results, so that a weighted sum takes one sweep.

    The tokens given to `run` are `{"statistic": ..., "loss": ...}`. `loss(results, tokens)`,
    `[*batch]`, is called on a few positions at a time, and must not close over traced arrays.
    """

    loss: Callable[[Any, Any], jax.Array]

    def losses(self, outputs: Any, tokens: Any) -> jax.Array:
        return self.loss(super().losses(outputs, tokens["statistic"]), tokens["loss"])

    def _block(self, block: LogitBlock) -> LogitBlock:
        return block._replace(tokens=block.tokens["statistic"])

"""The arms of graph fusion, and how each of them finds its settings in equally many trials."""

import dataclasses
import math
from collections.abc import Callable

from experiments.graph_fusion.config import Config
from logitjax import distillation

# How often a search that ends at an edge of the learning rates goes on beyond it.
_EXTENSIONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What distinguishes the runs of one arm before layers and seeds come in.

    Attributes:
        arm: One of `config.ARMS`, or `dual`.
        learning_rate: Peak.
        mix: Weight of the distillation terms; SFT gets the rest.
        gld: The graph loss and its weight.
    """

    arm: str
    learning_rate: float
    mix: float
    gld: str

    @property
    def name(self) -> str:
        """A folder: the arm, what it has of a mix and of a graph loss, its learning rate."""
        parts = [self.arm]
        if "gld" in self.arm:
            parts.append(self.gld.replace("/", "-").replace(":", "-x"))
        if self.mixes:
            parts.append(f"mix-{self.mix:g}")
        return "/".join([*parts, f"lr-{self.learning_rate:.3g}"])

    @property
    def mixes(self) -> bool:
        """Whether there is something beside SFT to be weighed."""
        return self.arm not in ("sft", "kl_only")

    def objective(self, config: Config) -> distillation.Objective:
        """What the arm minimises."""
        graph, weight = distillation.parse_gld(self.gld, k=config.top_k)
        if self.arm in ("sft", "kl_only"):
            terms = ((self.arm.removesuffix("_only"), 1.0),)
        else:
            names = self.arm.split("+")
            parts = tuple((n, self.mix * (weight if n == "gld" else 1.0)) for n in names)
            terms = (("sft", 1 - self.mix), *parts) if self.mix < 1 else parts
        return distillation.Objective(
            terms=terms,
            teachers=config.source_weight or (1.0,) * len(config.sources),
            graph=graph,
        )


def first_settings(config: Config, arm: str) -> Settings:
    """An arm before anything is chosen."""
    return Settings(
        arm=arm, learning_rate=config.learning_rate[0], mix=config.mix[0], gld=config.gld[0]
    )


def choose(
    config: Config, arm: str, validate: Callable[[Settings], float]
) -> tuple[Settings, list[tuple[Settings, float]]]:
    """The settings of least validation loss, one after another: rate, mix, graph loss.

    Every arm gets as many trials. What an arm has no use for, it spends on rates between those it
    has tried. A search of the rate whose best lies at an edge goes on beyond it.

    Args:
        config: What there is to choose from.
        arm: The arm.
        validate: Runs settings and says how well they do; less is better.

    Returns:
        The best settings, and all trials with what they scored, in their order.
    """
    trials: dict[Settings, float] = {}

    def attempt(settings: Settings) -> None:
        if settings not in trials:
            trials[settings] = validate(settings)

    def best() -> Settings:
        return min(trials, key=trials.__getitem__)

    start = first_settings(config, arm)
    rates = sorted(config.learning_rate)
    for rate in rates:
        attempt(dataclasses.replace(start, learning_rate=rate))
    step = rates[1] / rates[0] if len(rates) > 1 else 1.0
    for _ in range(_EXTENSIONS if len(rates) > 1 else 0):
        rate = best().learning_rate
        if rates[0] < rate < rates[-1]:
            break
        beyond = rate * step if rate == rates[-1] else rate / step
        rates = sorted([*rates, beyond])
        attempt(dataclasses.replace(start, learning_rate=beyond))
    between = iter(_between(best().learning_rate, step))
    for name, choices in (("mix", config.mix), ("gld", config.gld)):
        uses = start.mixes if name == "mix" else "gld" in arm
        chosen = best()
        for value in choices[1:]:
            change = {name: value} if uses else {"learning_rate": next(between)}
            attempt(dataclasses.replace(chosen, **change))
    return best(), list(trials.items())


def _between(rate: float, step: float) -> list[float]:
    """Rates inside the neighbours of the best one, the nearest middle first."""
    shares = (0.5, -0.5, 0.25, -0.25, 0.75, -0.75)
    return [rate * math.exp(share * math.log(step)) for share in shares]


def at_edge(config: Config, chosen: Settings, trials: list[tuple[Settings, float]]) -> bool:
    """Whether the chosen rate or mix is the least or the greatest that was tried."""
    rates = {settings.learning_rate for settings, _ in trials}
    mixes = {settings.mix for settings, _ in trials}
    return (len(rates) > 1 and chosen.learning_rate in (min(rates), max(rates))) or (
        chosen.mixes and len(mixes) > 1 and chosen.mix in (min(mixes), max(mixes))
    )

"""The arms of graph fusion, and the search for each arm's settings in equally many trials."""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.graph_fusion.config import Config
from logitjax import distillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings that distinguish the runs of one arm, apart from layers and seeds.

    Attributes:
        arm: One of `config.ARMS`.
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
        """A folder name: the arm, its mix and graph loss if it has them, its learning rate."""
        parts = [self.arm]
        if "gld" in self.arm:
            parts.append(self.gld.replace("/", "-").replace(":", "-x"))
        if self.mixes:
            parts.append(f"mix-{self.mix:g}")
        return "/".join([*parts, f"lr-{self.learning_rate:.3g}"])

    @property
    def mixes(self) -> bool:
        return self.arm not in ("sft", "kl_only")

    def objective(self, config: Config, *, even: float = 1.0) -> distillation.Objective:
        """Return the arm's objective; `even` is the weight that a share of 100 % stands for."""
        if self.arm in ("sft", "kl_only"):
            terms = distillation.parse_terms([self.arm.removesuffix("_only")])
        else:
            gld, weight = graph_term(self.gld, k=config.top_k)
            other = OtherGraph(**vars(gld))
            of_graphs = {
                "gld": (gld, self.mix * weight * even),
                "gld_other": (other, self.mix * weight * even),
                "uld": (distillation.terms.ULD(k=config.top_k), self.mix),
            }
            parts = tuple(
                of_graphs.get(name) or (distillation.terms.TERMS.parse(name), self.mix)
                for name in self.arm.split("+")
            )
            sft = ((distillation.terms.SFT(), 1 - self.mix),) if self.mix < 1 else ()
            terms = (*sft, *parts)
        return distillation.Objective(terms=terms, teachers=(1.0,) * len(config.sources))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherGraph(distillation.terms.GLD):
    """GLD to the teacher's graph of another row of the batch."""

    name = "gld_other"

    def value(self, read: Any, teacher: Any, batch: Mapping[str, Any], params: Any) -> Any:
        statistics, where = jax.tree.map(
            lambda x: jnp.roll(x, 1, 0), (teacher.statistics, teacher.where)
        )
        other = types.SimpleNamespace(statistics=statistics, where=teacher.where & where)
        return super().value(read, other, batch, params)


def graph_term(text: str, *, k: int) -> tuple[distillation.terms.GLD, float]:
    """`NODE/FEATURE/VALUE:WEIGHT` or `...:SHARE%`, such as `rank/row_sum/closed_form:0.002`.

    >>> graph_term("token/row_rms/closed_form:0.5", k=10)[1]
    0.5
    """
    kind, _, weight = text.partition(":")
    try:
        node, feature, value = kind.split("/")
        term = distillation.terms.GLD(k=k, node=node, feature=feature, compare=value)  # type: ignore
        share = weight.endswith("%")
        return term, float(weight.rstrip("%")) / (100 if share else 1)
    except ValueError as error:
        raise ValueError(f"gld {text!r}: expected NODE/FEATURE/VALUE:WEIGHT ({error})") from None


def first_settings(config: Config, arm: str) -> Settings:
    """An arm before its settings are chosen."""
    return Settings(
        arm=arm, learning_rate=config.learning_rate[0], mix=config.mix[0], gld=config.gld[0]
    )


def choose(
    config: Config, arm: str, validate: Callable[[Settings], float]
) -> tuple[Settings, list[tuple[Settings, float]]]:
    """The settings of lowest validation loss, chosen one after another: rate, mix, graph loss.

    Every arm gets `config.trials`. A search of the rate or the mix whose best value is at an edge
    continues beyond it; an arm spends its remaining trials on rates between those it has tried.

    Args:
        validate: Runs settings and returns their score; smaller is better.

    Returns:
        The best settings, and all trials with their scores, in order.
    """
    trials: dict[Settings, float] = {}

    def attempt(settings: Settings) -> bool:
        """Whether a trial was left for new settings."""
        if settings in trials or len(trials) == config.trials:
            return False
        trials[settings] = validate(settings)
        return True

    def best() -> Settings:
        return min(trials, key=trials.__getitem__)

    start = first_settings(config, arm)
    step = 1.0
    if len(config.learning_rate) > 1:
        least, second, *_ = sorted(config.learning_rate)
        step = second / least
    searches: list[tuple[str, Callable[[float], float], Callable[[float], float]]] = [
        ("learning_rate", lambda rate: rate / step, lambda rate: rate * step)
    ]
    if start.mixes:
        searches.append(("mix", lambda mix: mix / 2, lambda mix: (1 + mix) / 2))
    chosen = start
    for name, less, more in searches:
        values = list(getattr(config, name))
        for value in values:
            attempt(dataclasses.replace(chosen, **{name: value}))
        while len(values) > 1 and (result := getattr(best(), name)) in (min(values), max(values)):
            values.append(less(result) if result == min(values) else more(result))
            if not attempt(dataclasses.replace(chosen, **{name: values[-1]})):
                break
        chosen = best()
    if "gld" in arm:
        for graph in config.gld:
            attempt(dataclasses.replace(chosen, gld=graph))
    for rate in _between(best().learning_rate, step) if step > 1 else ():
        attempt(dataclasses.replace(best(), learning_rate=rate))
    return best(), list(trials.items())


def _between(rate: float, step: float) -> list[float]:
    """Rates midway between the best one and its neighbours, the nearest first."""
    shares = (0.5, -0.5, 0.25, -0.25, 0.75, -0.75)
    return [rate * math.exp(share * math.log(step)) for share in shares]


def at_edge(chosen: Settings, trials: list[tuple[Settings, float]]) -> bool:
    """Whether the rate or mix is the smallest or largest tried, or a share the largest."""
    rates = {settings.learning_rate for settings, _ in trials}
    mixes = {settings.mix for settings, _ in trials}
    shares = [graph_term(settings.gld, k=1)[1] for settings, _ in trials if "%" in settings.gld]
    if "gld" in chosen.arm and shares and graph_term(chosen.gld, k=1)[1] == max(shares):
        return True
    return (len(rates) > 1 and chosen.learning_rate in (min(rates), max(rates))) or (
        chosen.mixes and len(mixes) > 1 and chosen.mix in (min(mixes), max(mixes))
    )

"""Scores of every unit, 64 tokens of a text or a question, which judge the claims about fusion.

Each part is a data set with its arms, kept as `units/PART-SEED.json`. Seed 0 is scored on
validation data and chooses; the others are scored on test data. All seeds share the ceilings of
seed 0.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.dynamic_fusion import arms
from experiments.dynamic_fusion.measure import Measured
from experiments.dynamic_fusion.train import Variant
from experiments.shared.records import Record, kept
from logitjax.fusion import DynamicFusion, ProxyTuning

UNIT = 64
#: Factors of the experts' changes when they are added to one base.
WEIGHTS = (0.3, 0.6, 1.0)
#: Questions that the many arms of several experts answer.
_FEW = 250
_GRID = {"grid": DynamicFusion(method="grid")}
_SINGLE = {"proxy": ProxyTuning(), **_GRID, "project": DynamicFusion(method="project")}
_SEVERAL = {"dlf": DynamicFusion(method="grid", multi="single")}


def run(measured: Measured) -> None:
    """Scores the requested parts."""
    for part in measured.config.part:
        # There is nothing to choose for text of no expert.
        for seed in range(part == "general", measured.config.seeds):
            path = measured.directory / f"{part}-{seed}.json"
            kept(path, functools.partial(_Seed(measured, seed).score, part))


class _Seed:
    """The models of a seed, loaded once, and their scores."""

    def __init__(self, measured: Measured, seed: int):
        self.measured, self.seed, lineup = measured, seed, measured.lineup
        self.variants: dict[str, Variant] = {"large": lineup.large, "base": lineup.base}
        for name in ("domain", "task"):
            self.variants[name] = lineup.tuned("base", name, seed)
            self.variants[f"ceiling_{name}"] = lineup.tuned("large", name, 0)
        self.variants |= {f"{weight:g}": lineup.merged(weight, seed) for weight in WEIGHTS}

    def score(self, part: str) -> Record:
        """Values of every unit, by arm and metric."""
        if part == "general":
            values = self._take("general", ("domain",), _GRID, ceiling="domain")
            return values | self._take("general", ("domain", "task"), _SEVERAL)
        if part == "shown":
            values = {f"{arm}_0": value for arm, value in self._take("task", ("task",)).items()}
            shown = self._take("shown", ("task",)).items()
            return values | {f"{arm}_4": value for arm, value in shown}
        kind, _, name = part.rpartition("_")
        if kind:  # Both experts, side by side and merged.
            few = _FEW if name == "task" else None
            values = self._take(name, ("domain", "task"), _SEVERAL, few=few, ceiling=name)
            for weight in WEIGHTS:
                merged = self._take(name, (f"{weight:g}",), few=few)
                values[f"merged_{weight:g}"] = merged["expert 0"]
                values[f"both_{weight:g}"] = merged["grid"]
            return values
        return self._take(name, (name,), _SINGLE, static=True, ceiling=name)

    def _take(
        self,
        name: str,
        experts: tuple[str, ...],
        strategies: Mapping[str, Any] = _GRID,
        *,
        static: bool = False,
        few: int | None = None,
        ceiling: str = "",
    ) -> Record:
        """Values by arm of a line-up on a data set, and with `ceiling` of the tuned large model.

        With `static` also every static alpha, and as `null` the grid's alphas at other positions.
        """
        measured, alphas = self.measured, self.measured.config.static_alpha if static else ()
        options, split = measured.options(name), "test" if self.seed else "validation"

        def score(models: Sequence[str], strategies: Any, **static: Any) -> arms.Values:
            variants = [self.variants[model] for model in models]
            inputs = measured.inputs(variants, name, split, few)
            return arms.by_position(*inputs, strategies, static=static, **options)

        lineup = ("large", "base", *experts)
        named = {arms.static_name(alpha).replace(" ", "_"): alpha for alpha in alphas}
        values = score(lineup, strategies, **named)
        if static:
            found = values["grid"]["alpha"]
            order = np.random.default_rng(self.seed).permutation(len(found))
            values["null"] = score(lineup, {}, null=found[order])["null"]
        if ceiling:
            values["ceiling"] = score((f"ceiling_{ceiling}",) * 3, {})["large"]
        size = 1 if options["options"] else UNIT
        return {
            arm: {
                key: one[key][: len(one[key]) // size * size].reshape(-1, size).mean(1).tolist()
                for key in ("nll", "accuracy")
            }
            for arm, one in values.items()
        }

"""The arms of the few-shot experiment: every method with what is searched, and AMU's ablations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.few_shot.config import Config
from logitjax import few_shot
from logitjax.few_shot import methods

# Of the fixed-weight arms: what the ablations have in common.
FIXED_BETA = 2.0
# Settings that every tuned arm tries, by the size of the grid.
SETTINGS = {"small": 4, "full": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One method.

    Attributes:
        method: The head and its loss.
        recipe: How it is trained.
        grid: Settings of which each sample takes the one that is best on its validation pictures.
        same_encoder: Whether the auxiliary features are those of the zero-shot encoder.
    """

    method: few_shot.Method
    recipe: few_shot.Recipe = few_shot.Recipe()  # noqa: RUF009 (frozen)
    grid: Mapping[str, Sequence[float]] | None = None
    same_encoder: bool = False

    def at_scale(self, scale: float) -> few_shot.Method:
        """The method for zero-shot logits that are cosines of this scale."""
        return dataclasses.replace(self.method, scale=scale) if self._replaces else self.method

    @property
    def _replaces(self) -> bool:
        """Whether what it learns replaces a part of the zero-shot logits."""
        kinds = (methods.ClipAdapter, methods.TaskRes, methods.CrossModal)
        return isinstance(self.method, kinds)


def arms(config: Config) -> dict[str, Arm]:
    """Every arm by its name; `config.grid` is `'small'` or `'full'`."""
    return _tuned(config) | _fixed(config)


def _tuned(config: Config) -> dict[str, Arm]:
    """Every method tries as many settings: twice two or four values, or four times three."""
    full = config.grid == "full"
    amu = few_shot.Recipe(epochs=config.epochs, batch_size=config.batch_size)
    cache = few_shot.Recipe.published("tip_adapter_f")
    # These have no published recipe for features of this kind.
    short = few_shot.Recipe(steps=config.steps, batch_size=32)
    rates = [1e-4, 3e-4, 1e-3, 3e-3] if full else [3e-4, 3e-3]
    decays = [0.0, 1e-2, 1e-1] if full else [0.0, 1e-2]
    sharp = [1.0, 3.0, 5.5] if full else [1.0, 5.5]

    def bias_grid(*betas: float) -> dict[str, list[float]]:
        """AMU's: the weight of the bias, and with a full grid the rate."""
        amu_rates = [3e-4, 1e-3, 3e-3] if full else [1e-3]
        return _grid_of(beta=betas, training__learning_rate=amu_rates)

    def cache_grid(*betas: float) -> dict[str, list[float]]:
        return _grid_of(beta=betas if full else betas[1::2], sharpness=sharp)

    def rate_grid(betas: Sequence[float] = ()) -> dict[str, list[float]]:
        other = {"beta": betas} if betas else {"training__weight_decay": decays}
        return _grid_of(training__learning_rate=rates, **other)

    doubt = methods.Uncertainty(measure="kurtosis", normalizer="classes")
    official = methods.AMU.official()
    return {
        "amu": Arm(method=official, recipe=amu, grid=bias_grid(0.5, 1.0, 2.0, 4.0)),
        "amu_kurtosis": Arm(
            method=methods.AMU(uncertainty=doubt),
            recipe=amu,
            grid=bias_grid(0.5, 1.0, 2.0, 4.0),
        ),
        # Without the z-score the bias is as small as features of length one make it.
        "amu_paper": Arm(
            method=methods.AMU.paper(), recipe=amu, grid=bias_grid(2.0, 8.0, 32.0, 128.0)
        ),
        "amu_same_encoder": Arm(
            method=official, recipe=amu, grid=bias_grid(0.5, 1.0, 2.0, 4.0), same_encoder=True
        ),
        "tip_adapter": Arm(method=methods.TipAdapter(), grid=cache_grid(0.5, 1.17, 3.0, 10.0)),
        "tip_adapter_f": Arm(
            method=methods.TipAdapterF(), recipe=cache, grid=cache_grid(0.5, 1.17, 3.0, 10.0)
        ),
        "cafo": Arm(method=methods.CaFo(), recipe=cache, grid=cache_grid(0.3, 0.6, 1.2, 2.4)),
        "ape": Arm(method=methods.APE(criterion="text"), grid=cache_grid(0.5, 1.0, 2.0, 5.0)),
        "clip_adapter": Arm(
            # A fourth is published; the small grid belongs to a run of minutes.
            method=methods.ClipAdapter(reduction=4 if full else 16),
            recipe=short,
            grid=rate_grid([0.2, 0.5, 0.8] if full else [0.2, 0.5]),
        ),
        "task_res": Arm(
            method=methods.TaskRes(),
            recipe=short,
            grid=rate_grid([0.5, 1.0, 2.0] if full else [0.5, 1.0]),
        ),
        # Its step sizes are not searched: they follow from the data. What is left is how much of
        # the zero-shot logits stays.
        "lp_plus_plus": Arm(
            method=methods.LPPlusPlus(),
            grid={"beta": [(i + 1) / SETTINGS[config.grid] for i in range(SETTINGS[config.grid])]},
        ),
        "linear_probe": Arm(method=methods.LinearProbe(), recipe=short, grid=rate_grid()),
        "linear_probe_auxiliary": Arm(
            method=methods.LinearProbe(source="auxiliary"), recipe=short, grid=rate_grid()
        ),
        "cross_modal": Arm(method=methods.CrossModal(), recipe=short, grid=rate_grid()),
    }


def _grid_of(**values: Sequence[float]) -> dict[str, list[float]]:
    """The product of the values as columns of equal length; `__` in a name stands for a dot.

    >>> _grid_of(beta=[1.0, 2.0], training__learning_rate=[0.1])
    {'beta': [1.0, 2.0], 'training.learning_rate': [0.1, 0.1]}
    """
    mesh = np.meshgrid(*values.values(), indexing="ij")
    return {name.replace("__", "."): m.ravel().tolist() for name, m in zip(values, mesh)}


def _fixed(config: Config) -> dict[str, Arm]:
    """AMU with one weight for all, nothing tuned, and what changes when a part does."""
    recipe = few_shot.Recipe(epochs=config.epochs, batch_size=config.batch_size)

    def fixed(*, same_encoder: bool = False, **options: Any) -> Arm:
        amu = methods.AMU(beta=FIXED_BETA, **options)
        return Arm(method=amu, recipe=recipe, same_encoder=same_encoder)

    def weighted(measure: Any, **options: Any) -> Arm:
        return fixed(uncertainty=methods.Uncertainty(measure=measure, **options))

    return {
        "fixed": fixed(),
        "fixed_kurtosis": weighted("kurtosis", normalizer="classes"),
        "fixed_kurtosis_250": Arm(
            method=methods.AMU.official(uncertainty="moment", beta=FIXED_BETA), recipe=recipe
        ),
        "fixed_kurtosis_of_logits": weighted("kurtosis", of="logits"),
        "fixed_entropy": weighted("entropy"),
        "fixed_max": weighted("max"),
        "fixed_margin": weighted("margin"),
        "fixed_energy": weighted("energy"),
        "fixed_no_branch_loss": fixed(fusion_share=1.0),
        "fixed_branch_loss_only": fixed(fusion_share=0.0),
        "fixed_random_start": fixed(initial="random"),
        "fixed_same_encoder": fixed(same_encoder=True),
    }

"""The arms of the few-shot experiment: every method with what is searched, and AMU's ablations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from logitjax import few_shot

# Of the fixed-weight arms: what the ablations have in common.
FIXED_BETA = 2.0
# Settings that every tuned arm tries, by the size of the grid.
SETTINGS = {"small": 4, "full": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One method.

    Attributes:
      config: of the head.
      recipe: of its training.
      grid: settings of which each sample takes the one that is best on its validation pictures.
      same_encoder: the auxiliary features are those of the zero-shot encoder.
    """

    config: few_shot.FewShotConfig
    recipe: few_shot.FewShotTraining = few_shot.FewShotTraining()  # noqa: RUF009 (frozen)
    grid: Mapping[str, Sequence[float]] | None = None
    same_encoder: bool = False


def arms(config: Any) -> dict[str, Arm]:
    """Every arm by its name; ``config.grid`` is ``'small'`` or ``'full'``."""
    return _tuned(config) | _fixed(config)


def _tuned(config: Any) -> dict[str, Arm]:
    """Every method tries as many settings: twice two or four values, or four times three."""
    full = config.grid == "full"
    amu = few_shot.FewShotTraining(epochs=config.epochs, batch_size=config.batch_size)
    cache = few_shot.FewShotTraining.published("tip_adapter_f")
    # These have no published recipe for features of this kind.
    short = few_shot.FewShotTraining(steps=config.steps, batch_size=32)
    rates = [1e-4, 3e-4, 1e-3, 3e-3] if full else [3e-4, 3e-3]
    decays = [0.0, 1e-2, 1e-1] if full else [0.0, 1e-2]
    sharp = [1.0, 3.0, 5.5] if full else [1.0, 5.5]

    def bias_grid(*betas: float) -> dict[str, list[float]]:
        """AMU's: the weight of the bias, and with a full grid the rate."""
        amu_rates = [3e-4, 1e-3, 3e-3] if full else [1e-3]
        return few_shot.grid_of(beta=betas, training__learning_rate=amu_rates)

    def cache_grid(*betas: float) -> dict[str, list[float]]:
        return few_shot.grid_of(beta=betas if full else betas[1::2], sharpness=sharp)

    def rate_grid(betas: Sequence[float] = ()) -> dict[str, list[float]]:
        other = {"beta": betas} if betas else {"training__weight_decay": decays}
        return few_shot.grid_of(training__learning_rate=rates, **other)

    doubt = few_shot.Uncertainty(measure="kurtosis", normalizer="classes")
    official = few_shot.AMUConfig.official()
    return {
        "amu": Arm(config=official, recipe=amu, grid=bias_grid(0.5, 1.0, 2.0, 4.0)),
        "amu_kurtosis": Arm(
            config=few_shot.AMUConfig(uncertainty=doubt),
            recipe=amu,
            grid=bias_grid(0.5, 1.0, 2.0, 4.0),
        ),
        # Without the z-score the bias is as small as features of length one make it.
        "amu_paper": Arm(
            config=few_shot.AMUConfig.paper(), recipe=amu, grid=bias_grid(2.0, 8.0, 32.0, 128.0)
        ),
        "amu_same_encoder": Arm(
            config=official, recipe=amu, grid=bias_grid(0.5, 1.0, 2.0, 4.0), same_encoder=True
        ),
        "tip_adapter": Arm(
            config=few_shot.TipAdapterConfig(), grid=cache_grid(0.5, 1.17, 3.0, 10.0)
        ),
        "tip_adapter_f": Arm(
            config=few_shot.TipAdapterFConfig(), recipe=cache, grid=cache_grid(0.5, 1.17, 3.0, 10.0)
        ),
        "cafo": Arm(
            config=few_shot.CaFoConfig(), recipe=cache, grid=cache_grid(0.3, 0.6, 1.2, 2.4)
        ),
        "ape": Arm(config=few_shot.APEConfig(), grid=cache_grid(0.5, 1.0, 2.0, 5.0)),
        "clip_adapter": Arm(
            # A fourth is published; the small grid belongs to a run of minutes.
            config=few_shot.ClipAdapterConfig(reduction=4 if full else 16),
            recipe=short,
            grid=rate_grid([0.2, 0.5, 0.8] if full else [0.2, 0.5]),
        ),
        "task_res": Arm(
            config=few_shot.TaskResConfig(),
            recipe=short,
            grid=rate_grid([0.5, 1.0, 2.0] if full else [0.5, 1.0]),
        ),
        # Its step sizes are not searched: they follow from the data. What is left is how much of
        # the zero-shot logits stays.
        "lp_plus_plus": Arm(
            config=few_shot.LPPlusPlusConfig(),
            grid={"beta": [(i + 1) / SETTINGS[config.grid] for i in range(SETTINGS[config.grid])]},
        ),
        "linear_probe": Arm(config=few_shot.LinearProbeConfig(), recipe=short, grid=rate_grid()),
        "linear_probe_auxiliary": Arm(
            config=few_shot.LinearProbeConfig(source="auxiliary"), recipe=short, grid=rate_grid()
        ),
        "cross_modal": Arm(config=few_shot.CrossModalConfig(), recipe=short, grid=rate_grid()),
    }


def _fixed(config: Any) -> dict[str, Arm]:
    """AMU with one weight for all, nothing tuned, and what changes when a part does."""
    recipe = few_shot.FewShotTraining(epochs=config.epochs, batch_size=config.batch_size)

    def fixed(*, same_encoder: bool = False, **options: Any) -> Arm:
        method = few_shot.AMUConfig(beta=FIXED_BETA, **options)
        return Arm(config=method, recipe=recipe, same_encoder=same_encoder)

    def weighted(measure: Any, **options: Any) -> Arm:
        return fixed(uncertainty=few_shot.Uncertainty(measure=measure, **options))

    return {
        "fixed": fixed(),
        "fixed_kurtosis": weighted("kurtosis", normalizer="classes"),
        "fixed_kurtosis_250": Arm(
            config=few_shot.AMUConfig.official(uncertainty="moment", beta=FIXED_BETA), recipe=recipe
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


METHODS: tuple[str, ...] = (
    "amu",
    "amu_kurtosis",
    "amu_paper",
    "amu_same_encoder",
    "tip_adapter",
    "tip_adapter_f",
    "cafo",
    "ape",
    "clip_adapter",
    "task_res",
    "lp_plus_plus",
    "linear_probe",
    "linear_probe_auxiliary",
    "cross_modal",
)
ABLATIONS: tuple[str, ...] = (
    "fixed",
    "fixed_kurtosis",
    "fixed_kurtosis_of_logits",
    "fixed_no_branch_loss",
    "fixed_branch_loss_only",
    "fixed_random_start",
    "fixed_same_encoder",
)
MEASURES: tuple[str, ...] = (
    "fixed_kurtosis_250",
    "fixed_entropy",
    "fixed_max",
    "fixed_margin",
    "fixed_energy",
)
ARM_NAMES = METHODS + ABLATIONS + MEASURES

"""The arms of the few-shot experiment: every method with what is searched, and AMU's ablations."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from logitjax import heads, training

# Of the fixed-weight arms: what the ablations have in common.
FIXED_BETA = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One method.

    Attributes:
      config: of the head.
      recipe: of its training.
      grid: settings of which each sample takes the one that is best on its validation pictures.
      same_encoder: the auxiliary features are those of the zero-shot encoder.
    """

    config: heads.FewShotConfig
    recipe: training.FewShotTraining = training.FewShotTraining()  # noqa: RUF009 (frozen)
    grid: Mapping[str, Sequence[float]] | None = None
    same_encoder: bool = False


def arms(config: Any) -> dict[str, Arm]:
    """Every arm by its name; ``config.grid`` is ``'small'`` or ``'full'``."""
    full = config.grid == "full"
    amu = training.FewShotTraining(epochs=config.epochs, batch_size=config.batch_size)
    cache = training.FewShotTraining.published("tip_adapter_f")
    # These have no published recipe for features of this kind: a rate is searched.
    whole = training.FewShotTraining(steps=config.whole_steps, batch_size=256)
    betas = [0.5, 1.0, 2.0, 4.0]
    cache_betas = [1.0, 3.0, 10.0] if full else [1.0, 5.0]
    sharp = [1.0, 3.0, 5.5] if full else [1.0, 5.5]
    rates = [1e-4, 3e-4, 1e-3, 3e-3] if full else [3e-4, 3e-3]
    amu_rates = [3e-4, 1e-3, 3e-3] if full else [1e-3]

    def grid(**values: Sequence[float]) -> dict[str, list[float]]:
        return training.grid_of(**values)

    def fixed(**options: Any) -> Arm:
        same = options.pop("same_encoder", False)
        method = heads.AMUConfig.official(beta=FIXED_BETA, **options)
        return Arm(config=method, recipe=amu, same_encoder=same)

    doubt = heads.Uncertainty(measure="kurtosis", normalizer="classes")
    by_logits = heads.Uncertainty(measure="kurtosis", of="logits")
    kurtosis = dataclasses.replace(fixed().config, uncertainty=doubt)
    of_logits = dataclasses.replace(fixed().config, uncertainty=by_logits)
    return {
        "amu": Arm(
            config=heads.AMUConfig.official(),
            recipe=amu,
            grid=grid(beta=betas, training__learning_rate=amu_rates),
        ),
        "amu_kurtosis": Arm(
            config=heads.AMUConfig(uncertainty=doubt),
            recipe=amu,
            grid=grid(beta=betas, training__learning_rate=amu_rates),
        ),
        "amu_paper": Arm(
            config=heads.AMUConfig.paper(), recipe=amu, grid=grid(beta=[2.0, 8.0, 32.0])
        ),
        "amu_same_encoder": Arm(
            config=heads.AMUConfig.official(), recipe=amu, grid=grid(beta=betas), same_encoder=True
        ),
        "tip_adapter": Arm(
            config=heads.TipAdapterConfig(),
            grid=grid(beta=[0.5, 1.0, 3.0, 10.0, 30.0], sharpness=[1.0, 3.0, 5.5, 10.0]),
        ),
        "tip_adapter_f": Arm(
            config=heads.TipAdapterFConfig(),
            recipe=cache,
            grid=grid(beta=cache_betas, sharpness=sharp),
        ),
        "cafo": Arm(
            config=heads.CaFoConfig(),
            recipe=cache,
            grid=grid(beta=[0.6, 1.0, 2.0, 4.0] if full else [0.6, 2.0], sharpness=sharp),
        ),
        "ape": Arm(
            config=heads.APEConfig(),
            grid=grid(beta=[0.5, 1.0, 2.0, 5.0, 10.0], sharpness=[1.0, 3.0, 5.5]),
        ),
        "clip_adapter": Arm(
            config=heads.ClipAdapterConfig(),
            recipe=whole,
            grid=grid(beta=[0.2, 0.5], training__learning_rate=[1e-3, 1e-4] if full else [1e-3]),
        ),
        "task_res": Arm(
            config=heads.TaskResConfig(), recipe=whole, grid=grid(training__learning_rate=rates)
        ),
        "lp_plus_plus": Arm(config=heads.LPPlusPlusConfig()),
        "linear_probe": Arm(
            config=heads.LinearProbeConfig(), recipe=whole, grid=grid(training__learning_rate=rates)
        ),
        "linear_probe_auxiliary": Arm(
            config=heads.LinearProbeConfig(source="auxiliary"),
            recipe=whole,
            grid=grid(training__learning_rate=rates),
        ),
        "cross_modal": Arm(
            config=heads.CrossModalConfig(), recipe=whole, grid=grid(training__learning_rate=rates)
        ),
        "fixed": fixed(),
        "fixed_kurtosis": Arm(config=kurtosis, recipe=amu),
        "fixed_kurtosis_of_logits": Arm(config=of_logits, recipe=amu),
        "fixed_no_branch_loss": fixed(fusion_share=1.0),
        "fixed_branch_loss_only": fixed(fusion_share=0.0),
        "fixed_random_start": fixed(initial="random"),
        "fixed_same_encoder": fixed(same_encoder=True),
    }


ARM_NAMES: tuple[str, ...] = (
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
    "fixed",
    "fixed_kurtosis",
    "fixed_kurtosis_of_logits",
    "fixed_no_branch_loss",
    "fixed_branch_loss_only",
    "fixed_random_start",
    "fixed_same_encoder",
)
ABLATIONS = frozenset(name for name in ARM_NAMES if name.startswith("fixed"))

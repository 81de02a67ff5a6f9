"""Every method with its recipe and the settings that it tries, as many for each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from logitjax.few_shot import methods
from logitjax.few_shot._method import Method
from logitjax.few_shot._sweep import with_settings
from logitjax.few_shot._train import Recipe

# How many settings a method tries.
_GRID_SIZES = {"small": 4, "full": 12}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method, how it is trained, and the settings to choose among.

    Attributes:
        method: The method at its published setting, which holds where nothing can be chosen.
        recipe: How it is trained; None for a method without training.
        grid: Columns of equal length, as for `sweep`; None if there is nothing to choose.
    """

    method: Method
    recipe: Recipe = Recipe()  # noqa: RUF009 (frozen)
    grid: Mapping[str, Sequence[float]] | None = None

    def at_scale(self, scale: float) -> "Candidate":
        """The same for zero-shot logits that are cosines of this scale.

        A linear probe starts at zero and has a temperature of its own.
        """
        named = {field.name for field in dataclasses.fields(self.method)}
        if "scale" not in named or isinstance(self.method, methods.LinearProbe):
            return self
        return dataclasses.replace(self, method=dataclasses.replace(self.method, scale=scale))

    def chosen(self, number: int) -> "Candidate":
        """The candidate with the setting of this number, and nothing left to choose."""
        settings = {name: float(column[number]) for name, column in (self.grid or {}).items()}
        method, recipe = with_settings(self.method, self.recipe, settings)
        return Candidate(method=method, recipe=recipe)

    def updates(self, images: int) -> int:
        """Gradient steps on so many labelled images."""
        return self.recipe.total_steps(images) if self.method.trains else 0

    @property
    def settings(self) -> int:
        """Number of settings to choose among."""
        return max(map(len, (self.grid or {}).values()), default=1)

    @property
    def stops(self) -> bool:
        """Whether it needs validation images to train at all."""
        return getattr(self.method, "keep", "last") == "best"

    @property
    def needs(self) -> tuple[str, ...]:
        """Features that it needs beside those of the zero-shot encoder."""
        if isinstance(self.method, methods.ProLIP):
            return ("hidden", "projection")
        reads = isinstance(self.method, methods.AMU | methods.CaFo)
        return ("auxiliary",) if reads or getattr(self.method, "source", "") == "auxiliary" else ()


def candidates(
    grid: Literal["small", "full"] = "small",
    *,
    epochs: int = 50,
    batch_size: int = 8,
    steps: int = 60,
) -> dict[str, Candidate]:
    """Every method by name, each with the same number of settings to choose among.

    A method whose paper searches two numbers has a grid of two columns, others of one. Recipes are
    the published ones. Methods without a recipe for arbitrary features take `steps` of 32 images.

    Args:
        grid: `'small'` for 4 settings, `'full'` for 12.
        epochs: Number of epochs of AMU.
        batch_size: Number of images in a batch of AMU.
        steps: Number of steps of methods without a published recipe.

    Raises:
        ValueError: An unknown grid.

    >>> {len(next(iter(c.grid.values()))) for c in candidates().values()}
    {4}
    """
    if grid not in _GRID_SIZES:
        raise ValueError(f"grid: expected one of {', '.join(_GRID_SIZES)}, got {grid!r}")
    full, count = grid == "full", _GRID_SIZES[grid]
    amu = Recipe(epochs=epochs, batch_size=batch_size)
    cache, clap = Recipe.published("tip_adapter_f"), Recipe.published("clap")
    short = Recipe(steps=steps, batch_size=32)
    rates = [1e-4, 3e-4, 1e-3, 3e-3] if full else [3e-4, 3e-3]
    decays = [0.0, 1e-2, 1e-1] if full else [0.0, 1e-2]
    sharp = [1.0, 3.0, 5.5] if full else [1.0, 5.5]

    def bias_grid(*betas: float) -> Mapping[str, list[float]]:
        """AMU's: the weight of the bias, and with a full grid the rate."""
        amu_rates = [3e-4, 1e-3, 3e-3] if full else [1e-3]
        return _product(beta=betas, training__learning_rate=amu_rates)

    def cache_grid(*betas: float) -> Mapping[str, list[float]]:
        return _product(beta=betas if full else betas[1::2], sharpness=sharp)

    def rate_grid(betas: Sequence[float] = ()) -> Mapping[str, list[float]]:
        other = {"beta": betas} if betas else {"training__weight_decay": decays}
        return _product(training__learning_rate=rates, **other)

    def log_spaced(low: float, high: float) -> list[float]:
        return np.geomspace(low, high, count).tolist()

    probe_rates = [0.01, 0.03, 0.1, 0.3] if full else [0.03, 0.3]
    doubt = methods.Uncertainty(measure="kurtosis", normalizer="classes")
    betas = bias_grid(0.5, 1.0, 2.0, 4.0)
    wide = cache_grid(0.5, 1.17, 3.0, 10.0)
    return {
        "amu": Candidate(method=methods.AMU.official(), recipe=amu, grid=betas),
        "amu_kurtosis": Candidate(method=methods.AMU(uncertainty=doubt), recipe=amu, grid=betas),
        # Without the z-score the bias is as small as features of length one make it.
        "amu_paper": Candidate(
            method=methods.AMU.paper(), recipe=amu, grid=bias_grid(2.0, 8.0, 32.0, 128.0)
        ),
        "tip_adapter": Candidate(method=methods.TipAdapter(), grid=wide),
        "tip_adapter_f": Candidate(method=methods.TipAdapterF(), recipe=cache, grid=wide),
        "tip_x": Candidate(method=methods.TipX(), grid=wide),
        "cafo": Candidate(method=methods.CaFo(), recipe=cache, grid=cache_grid(0.3, 0.6, 1.2, 2.4)),
        "ape": Candidate(method=methods.APE(), grid=cache_grid(0.5, 1.0, 2.0, 5.0)),
        "ape_t": Candidate(
            method=methods.APET(),
            recipe=Recipe.published("ape_t"),
            grid=_product(
                beta=[0.5, 1.0, 2.0, 5.0] if full else [1.0, 5.0],
                training__learning_rate=[1e-4, 3e-4, 1e-3] if full else [1e-4, 1e-3],
            ),
        ),
        "dmn": Candidate(
            method=methods.DMN(),
            grid=_product(
                beta=[0.1, 0.3, 1.0, 3.0] if full else [0.3, 3.0],
                sharpness=[2.0, 5.5, 10.0] if full else [2.0, 5.5],
            ),
        ),
        "gda": Candidate(method=methods.GDA(), grid={"beta": log_spaced(1e-2, 1e2)}),
        "pro_ker": Candidate(
            method=methods.ProKeR(),
            grid=_product(
                penalty=[0.03, 0.1, 0.3, 3.0] if full else [0.1, 3.0],
                sharpness=[1.5, 3.0, 10.0] if full else [1.5, 10.0],
            ),
        ),
        "clip_adapter": Candidate(
            # A fourth is published; the small grid belongs to a run of minutes.
            method=methods.ClipAdapter(reduction=4 if full else 16),
            recipe=short,
            grid=rate_grid([0.2, 0.5, 0.8] if full else [0.2, 0.5]),
        ),
        "task_res": Candidate(
            method=methods.TaskRes(),
            recipe=short,
            grid=rate_grid([0.5, 1.0, 2.0] if full else [0.5, 1.0]),
        ),
        # Its step sizes are not searched: they follow from the data. What is left is how much of
        # the zero-shot logits stays.
        "lp_plus_plus": Candidate(
            method=methods.LPPlusPlus(), grid={"beta": [(i + 1) / count for i in range(count)]}
        ),
        "lp_plus_plus_released": Candidate(
            method=methods.LPPlusPlus(start="sums", accumulate_blend=True, keep="best"),
            grid={"beta": [(i + 1) / count for i in range(count)]},
        ),
        "clap": Candidate(
            method=methods.CLAP(),
            recipe=clap,
            grid=_product(
                penalty=[0.1, 1.0, 10.0] if full else [0.3, 3.0],
                training__learning_rate=probe_rates,
            ),
        ),
        "zs_lp": Candidate(
            method=methods.CLAP(penalty=0.0),
            recipe=clap,
            grid=_product(
                beta=[0.5, 0.75, 1.0] if full else [0.5, 1.0],
                training__learning_rate=probe_rates,
            ),
        ),
        "pro_lip": Candidate(
            method=methods.ProLIP(),
            recipe=Recipe.published("pro_lip"),
            grid=_product(
                penalty=[0.01, 0.1, 1.0] if full else [0.1, 1.0],
                training__learning_rate=[1e-5, 1e-4, 1e-3, 1e-2] if full else [1e-4, 1e-2],
            ),
        ),
        "linear_probe": Candidate(method=methods.LinearProbe(), recipe=short, grid=rate_grid()),
        "linear_probe_auxiliary": Candidate(
            method=methods.LinearProbe(source="auxiliary"), recipe=short, grid=rate_grid()
        ),
        "cross_modal": Candidate(method=methods.CrossModal(), recipe=short, grid=rate_grid()),
    }


def _product(**values: Sequence[float]) -> dict[str, list[float]]:
    """The product of the values as columns of equal length; `__` in a name stands for a dot.

    >>> _product(beta=[1.0, 2.0], training__learning_rate=[0.1])
    {'beta': [1.0, 2.0], 'training.learning_rate': [0.1, 0.1]}
    """
    mesh = np.meshgrid(*values.values(), indexing="ij")
    return {name.replace("__", "."): m.ravel().tolist() for name, m in zip(values, mesh)}

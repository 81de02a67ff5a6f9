"""Every method with its recipe and the same number of settings to try."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from logitjax.few_shot import methods
from logitjax.few_shot._method import FewShotTask, Inputs, Method
from logitjax.few_shot._sweep import Runs, best_setting, compiled_sweep, sweep, with_settings
from logitjax.few_shot._train import Recipe
from logitjax.training import Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method, its training, and the settings to choose from.

    Attributes:
        method: The method at its published setting, used if nothing can be chosen.
        recipe: Its training; None for a method without training.
        grid: Columns of equal length, as for `sweep`; None if there is nothing to choose.
    """

    method: Method
    recipe: Recipe = Recipe()  # noqa: RUF009 (frozen)
    grid: Mapping[str, Sequence[float]] | None = None

    @classmethod
    def all(
        cls,
        grid: Literal["small", "full"] = "small",
        *,
        epochs: int = 50,
        batch_size: int = 8,
        steps: int = 60,
    ) -> dict[str, "Candidate"]:
        """Every method by name, each with the same number of settings to choose from.

        A method whose paper searches two numbers has a grid of two columns, others of one. Recipes
        are the published ones; methods without one for all features take `steps` of 32 images.

        Args:
            grid: `'small'` for 4 settings, `'full'` for 12; anything else is a ValueError.
            epochs, batch_size: Epochs and batch size of AMU.

        >>> {candidate.settings for candidate in Candidate.all().values()}
        {4}
        """
        if grid not in ("small", "full"):
            raise ValueError(f"grid: expected small or full, got {grid!r}")
        few = grid == "small"
        short = Recipe(steps=steps, batch_size=32)
        return _biases(few, Recipe(epochs=epochs, batch_size=batch_size)) | _others(few, short)

    def at_scale(self, scale: float) -> "Candidate":
        """The candidate for zero-shot logits that are cosines of this scale."""
        return dataclasses.replace(self, method=self.method.at_scale(scale))

    def at(self, setting: int) -> "Candidate":
        """The candidate with the setting of this number, and nothing left to choose."""
        values = {name: column[setting] for name, column in (self.grid or {}).items()}
        method, recipe = with_settings(self.method, self.recipe, values)
        return Candidate(method=method, recipe=recipe)

    def sweep(
        self, task: FewShotTask, held_out: Mapping[str, tuple[Inputs, Any]], by: str, **options: Any
    ) -> tuple[dict[str, Any], np.ndarray]:
        """Return `sweep`'s scores with the grid, and each run's best setting.

        Args:
            by: Name of the images to choose on: `"calibration"`, or `"train"` with folds; without
                them the first setting is used.
        """
        scores = sweep(self.method, task, held_out, training=self.recipe, grid=self.grid, **options)
        none = np.zeros(len(task.labels), int)
        return scores, best_setting(scores[by]) if by in scores else none

    def updates(self, images: int) -> int:
        """Number of gradient steps on this many labelled images."""
        return self.recipe.total_steps(images) if self.method.trains else 0

    def folds(self, labels: Any) -> int:
        """Number of folds of labelled images to choose on; 0 if a class has a single image.

        One image of each class is left out at a time if nothing is trained, otherwise a fourth.
        """
        counts = np.bincount(np.asarray(labels)[np.asarray(labels) >= 0])
        least = int(counts[counts > 0].min())
        return 0 if least < 2 else min(least, 4 if self.method.trains else 16)

    @property
    def settings(self) -> int:
        """Number of settings to choose among."""
        return max(map(len, (self.grid or {}).values()), default=1)

    def program(
        self,
        task: FewShotTask,
        held_out: Mapping[str, tuple[Inputs, Any]],
        *,
        mesh: Mesh,
        sequential: bool = False,
    ) -> Program:
        """The program of this candidate's `sweep` with abstract arguments, for a plan.

        Arguments are as for `sweep`, with arrays as `jax.ShapeDtypeStruct`; every label is valid.
        """
        array = jax.ShapeDtypeStruct
        (count, shown), recipe = task.labels.shape, self.recipe
        # The shape of `Recipe.order`, with an axis of runs.
        order = (count, recipe.total_steps(shown), min(recipe.batch_size, shown))
        columns = array((count, self.settings), jnp.float32)
        runs = Runs(
            numbers=array((count,), jnp.int32),
            settings=dict.fromkeys([*(self.grid or {}), ""], columns),
            task=task,
            orders=array(order, jnp.int32),
            held_out=dict(held_out),
        )
        runs = jax.tree.map(
            lambda leaf, sharding: array(leaf.shape, leaf.dtype, sharding=sharding),
            runs,
            runs.shardings(mesh),
        )
        number = array((), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec()))
        return Program(
            name=f"{type(self.method).__name__}, {shown} images",
            jitted=compiled_sweep,
            arguments=(runs, number, number),
            options=dict(method=self.method, training=recipe, sequential=sequential, mesh=mesh),
        )


def _grid(few: bool, **ranges: tuple[float, float]) -> dict[str, list[float]]:
    """Columns of 4 or 12 settings, the product of the fields; `__` in a name stands for a dot."""
    # Values are spaced by equal factors, or by equal steps if the first is 0.
    small, full = {1: ((4,), (12,)), 2: ((2, 2), (4, 3)), 3: ((1, 2, 2), (2, 2, 3))}[len(ranges)]
    counts = small if few else full
    columns = [
        (np.geomspace if low else np.linspace)(low, high, count)
        for (low, high), count in zip(ranges.values(), counts, strict=True)
    ]
    mesh = np.meshgrid(*columns, indexing="ij")
    return {name.replace("__", "."): m.ravel().tolist() for name, m in zip(ranges, mesh)}


def _biases(few: bool, recipe: Recipe) -> dict[str, Candidate]:
    doubt = methods.Uncertainty(normalizer="classes")

    def grid(low: float, high: float) -> dict[str, list[float]]:
        """The weight of the bias and, with a full grid, the rate."""
        betas = np.geomspace(low, high, 4).tolist()
        rates = [1e-3] if few else [3e-4, 1e-3, 3e-3]
        pairs = [(beta, rate) for beta in betas for rate in rates]
        return dict(zip(("beta", "training.learning_rate"), map(list, zip(*pairs))))

    return {
        "amu": Candidate(method=methods.AMU(), recipe=recipe, grid=grid(0.5, 4.0)),
        "amu_kurtosis": Candidate(
            method=methods.AMU(uncertainty=doubt), recipe=recipe, grid=grid(0.5, 4.0)
        ),
        # Without the z-score the bias is small, because features have length one.
        "amu_paper": Candidate(method=methods.AMU.paper(), recipe=recipe, grid=grid(2.0, 128.0)),
    }


def _others(few: bool, short: Recipe) -> dict[str, Candidate]:
    """Methods that use one encoder, each with the numbers that it searches."""
    tuned, clap = Recipe.published("tip_adapter_f"), Recipe.published("clap")
    fast = dict(training__learning_rate=(0.03, 0.3))
    searched = dict(penalty=(0.1, 1.0), training__learning_rate=(1e-4, 1e-2))
    lip = Recipe.published("pro_lip"), searched
    auxiliary = methods.LinearProbe(source="auxiliary")
    rate, probe = (3e-4, 3e-3), dict(training__learning_rate=(3e-4, 3e-3))
    probe |= dict(training__weight_decay=(0.0, 1e-2))
    wide, sharp = dict(beta=(1.17, 10.0)), dict(sharpness=(1.0, 5.5))
    table: dict[str, tuple[Method, Recipe, Any]] = {
        "tip_adapter": (methods.TipAdapter(), short, wide | sharp),
        "tip_adapter_f": (methods.TipAdapterF(), tuned, wide | sharp),
        "gda": (methods.GDA(), short, dict(beta=(1e-2, 1e2))),
        "pro_ker": (methods.ProKeR(), short, dict(penalty=(0.1, 3.0), sharpness=(1.5, 10.0))),
        "rehark": (methods.ReHARK(), short, dict(penalty=(0.1, 1.0), text=(3.0, 10.0))),
        "timo": (methods.TIMO(), short, dict(text=(1.0, 1e4))),
        "task_res": (methods.TaskRes(), short, dict(training__learning_rate=rate, beta=(0.5, 1.0))),
        # Its step sizes follow from the data: only the share of the zero-shot logits is left.
        "lp_plus_plus": (methods.LPPlusPlus(), short, dict(beta=(0.25, 1.0))),
        "clap": (methods.CLAP(), clap, dict(penalty=(0.3, 3.0)) | fast),
        "zs_lp": (methods.CLAP(penalty=0.0), clap, dict(beta=(0.5, 1.0)) | fast),
        "pro_lip": (methods.ProLIP(), *lip),
        "pro_lip_text": (methods.ProLIPText(), *lip),
        "linear_probe": (methods.LinearProbe(), short, probe),
        "linear_probe_auxiliary": (auxiliary, short, probe),
    }
    return {
        name: Candidate(method=method, recipe=recipe, grid=_grid(few, **ranges))
        for name, (method, recipe, ranges) in table.items()
    }

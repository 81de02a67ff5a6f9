"""Every method with its recipe and the settings that it tries, as many for each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from logitjax.few_shot import methods
from logitjax.few_shot._method import FewShotTask, Inputs, Method
from logitjax.few_shot._sweep import Runs, compiled_sweep, with_settings
from logitjax.few_shot._train import Recipe
from logitjax.training import Program

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

    @classmethod
    def all(
        cls,
        grid: Literal["small", "full"] = "small",
        *,
        epochs: int = 50,
        batch_size: int = 8,
        steps: int = 60,
    ) -> dict[str, "Candidate"]:
        """Every method by name, each with the same number of settings to choose among.

        A method whose paper searches two numbers has a grid of two columns, others of one. Recipes
        are the published ones. Methods without a recipe for arbitrary features take `steps` of 32
        images.

        Args:
            grid: `'small'` for 4 settings, `'full'` for 12.
            epochs: Number of epochs of AMU.
            batch_size: Number of images in a batch of AMU.
            steps: Number of steps of methods without a published recipe.

        Raises:
            ValueError: An unknown grid.

        >>> {len(next(iter(c.grid.values()))) for c in Candidate.all().values()}
        {4}
        """
        if grid not in _GRID_SIZES:
            raise ValueError(f"grid: expected one of {', '.join(_GRID_SIZES)}, got {grid!r}")
        grids = _Grids(full=grid == "full")
        short = Recipe(steps=steps, batch_size=32)
        amu = Recipe(epochs=epochs, batch_size=batch_size)
        return _biases(grids, amu) | _caches(grids) | _learned(grids, short)

    def at_scale(self, scale: float) -> "Candidate":
        """The same for zero-shot logits that are cosines of this scale."""
        return dataclasses.replace(self, method=self.method.at_scale(scale))

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

    def program(
        self,
        task: FewShotTask,
        held_out: Mapping[str, tuple[Inputs, Any]],
        *,
        mesh: Mesh,
        sequential: bool = False,
    ) -> Program:
        """The program of its `sweep` with abstract arguments, for a plan.

        Args:
            task: As of `sweep`, of `jax.ShapeDtypeStruct`; every label is there.
            held_out: As of `sweep`, of `jax.ShapeDtypeStruct`.
            mesh: Mesh whose first axis splits the runs.
            sequential: As of `sweep`.
        """
        array = jax.ShapeDtypeStruct
        (count, shown), recipe = task.labels.shape, self.recipe
        # The shape of `Recipe.order`, with an axis of runs.
        order = (count, recipe.total_steps(shown), min(recipe.batch_size, shown))
        runs = Runs(
            numbers=array((count,), jnp.int32),
            task=task,
            orders=array(order, jnp.int32),
            held_out=dict(held_out),
        )
        runs = jax.tree.map(
            lambda leaf, sharding: array(leaf.shape, leaf.dtype, sharding=sharding),
            runs,
            runs.shardings(mesh),
        )
        whole = NamedSharding(mesh, PartitionSpec())
        columns = {name: len(column) for name, column in (self.grid or {}).items()}
        columns[""] = self.settings  # as in `sweep`: the axis, where no field is searched
        settings = {name: array((n,), jnp.float32, sharding=whole) for name, n in columns.items()}
        number = array((), jnp.int32, sharding=whole)
        return Program(
            name=f"{type(self.method).__name__}, {shown} images",
            jitted=compiled_sweep,
            arguments=(runs, settings, number, number),
            options=dict(method=self.method, training=recipe, sequential=sequential, mesh=mesh),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Grids:
    """Columns of as many settings for every method, whatever it searches."""

    full: bool

    @property
    def count(self) -> int:
        return _GRID_SIZES["full" if self.full else "small"]

    def bias(self, *betas: float) -> Mapping[str, list[float]]:
        """AMU's: the weight of the bias, and with a full grid the rate."""
        rates = [3e-4, 1e-3, 3e-3] if self.full else [1e-3]
        return _product(beta=betas, training__learning_rate=rates)

    def cache(self, *betas: float) -> Mapping[str, list[float]]:
        sharp = [1.0, 3.0, 5.5] if self.full else [1.0, 5.5]
        return _product(beta=betas if self.full else betas[1::2], sharpness=sharp)

    def rate(self, **other: Sequence[float]) -> Mapping[str, list[float]]:
        """The learning rate beside something else, weight decay by default."""
        rates = [1e-4, 3e-4, 1e-3, 3e-3] if self.full else [3e-4, 3e-3]
        decays = [0.0, 1e-2, 1e-1] if self.full else [0.0, 1e-2]
        return _product(
            training__learning_rate=rates, **(other or {"training__weight_decay": decays})
        )

    def of(
        self, full: Mapping[str, Sequence[float]], small: Mapping[str, Sequence[float]]
    ) -> Mapping[str, list[float]]:
        return _product(**(full if self.full else small))

    def blends(self) -> Mapping[str, list[float]]:
        return {"beta": [(i + 1) / self.count for i in range(self.count)]}


def _biases(grids: _Grids, recipe: Recipe) -> dict[str, Candidate]:
    doubt = methods.Uncertainty(normalizer="classes")
    betas = grids.bias(0.5, 1.0, 2.0, 4.0)
    # Without the z-score the bias is as small as features of length one make it.
    large = grids.bias(2.0, 8.0, 32.0, 128.0)
    return {
        "amu": Candidate(method=methods.AMU(), recipe=recipe, grid=betas),
        "amu_kurtosis": Candidate(method=methods.AMU(uncertainty=doubt), recipe=recipe, grid=betas),
        "amu_paper": Candidate(method=methods.AMU.paper(), recipe=recipe, grid=large),
    }


def _caches(grids: _Grids) -> dict[str, Candidate]:
    tuned, wide = Recipe.published("tip_adapter_f"), grids.cache(0.5, 1.17, 3.0, 10.0)
    cafo, ape = grids.cache(0.3, 0.6, 1.2, 2.4), grids.cache(0.5, 1.0, 2.0, 5.0)
    ape_t = grids.of(
        {"beta": [0.5, 1.0, 2.0, 5.0], "training__learning_rate": [1e-4, 3e-4, 1e-3]},
        {"beta": [1.0, 5.0], "training__learning_rate": [1e-4, 1e-3]},
    )
    dmn = grids.of(
        {"beta": [0.1, 0.3, 1.0, 3.0], "sharpness": [2.0, 5.5, 10.0]},
        {"beta": [0.3, 3.0], "sharpness": [2.0, 5.5]},
    )
    gda = {"beta": np.geomspace(1e-2, 1e2, grids.count).tolist()}
    pro_ker = grids.of(
        {"penalty": [0.03, 0.1, 0.3, 3.0], "sharpness": [1.5, 3.0, 10.0]},
        {"penalty": [0.1, 3.0], "sharpness": [1.5, 10.0]},
    )
    return {
        "tip_adapter": Candidate(method=methods.TipAdapter(), grid=wide),
        "tip_adapter_f": Candidate(method=methods.TipAdapterF(), recipe=tuned, grid=wide),
        "cafo": Candidate(method=methods.CaFo(), recipe=tuned, grid=cafo),
        "ape": Candidate(method=methods.APE(), grid=ape),
        "ape_t": Candidate(method=methods.APET(), recipe=Recipe.published("ape_t"), grid=ape_t),
        "dmn": Candidate(method=methods.DMN(), grid=dmn),
        "gda": Candidate(method=methods.GDA(), grid=gda),
        "pro_ker": Candidate(method=methods.ProKeR(), grid=pro_ker),
    }


def _learned(grids: _Grids, short: Recipe) -> dict[str, Candidate]:
    full, clap = grids.full, Recipe.published("clap")
    rates = [0.01, 0.03, 0.1, 0.3] if full else [0.03, 0.3]
    # A fourth is published; the small grid belongs to a run of minutes.
    clip_adapter = methods.ClipAdapter(reduction=4 if full else 16)
    # LP++'s step sizes are not searched: they follow from the data. What is left is how much of
    # the zero-shot logits stays.
    released = methods.LPPlusPlus(released=True)
    pro_lip = grids.of(
        {"penalty": [0.01, 0.1, 1.0], "training__learning_rate": [1e-5, 1e-4, 1e-3, 1e-2]},
        {"penalty": [0.1, 1.0], "training__learning_rate": [1e-4, 1e-2]},
    )
    auxiliary = methods.LinearProbe(source="auxiliary")
    return {
        "clip_adapter": Candidate(
            method=clip_adapter,
            recipe=short,
            grid=grids.rate(beta=[0.2, 0.5, 0.8] if full else [0.2, 0.5]),
        ),
        "task_res": Candidate(
            method=methods.TaskRes(),
            recipe=short,
            grid=grids.rate(beta=[0.5, 1.0, 2.0] if full else [0.5, 1.0]),
        ),
        "lp_plus_plus": Candidate(method=methods.LPPlusPlus(), grid=grids.blends()),
        "lp_plus_plus_released": Candidate(method=released, grid=grids.blends()),
        "clap": Candidate(
            method=methods.CLAP(),
            recipe=clap,
            grid=_product(
                penalty=[0.1, 1.0, 10.0] if full else [0.3, 3.0], training__learning_rate=rates
            ),
        ),
        "zs_lp": Candidate(
            method=methods.CLAP(penalty=0.0),
            recipe=clap,
            grid=_product(
                beta=[0.5, 0.75, 1.0] if full else [0.5, 1.0], training__learning_rate=rates
            ),
        ),
        "pro_lip": Candidate(
            method=methods.ProLIP(), recipe=Recipe.published("pro_lip"), grid=pro_lip
        ),
        "linear_probe": Candidate(method=methods.LinearProbe(), recipe=short, grid=grids.rate()),
        "linear_probe_auxiliary": Candidate(method=auxiliary, recipe=short, grid=grids.rate()),
        "cross_modal": Candidate(method=methods.CrossModal(), recipe=short, grid=grids.rate()),
    }


def _product(**values: Sequence[float]) -> dict[str, list[float]]:
    """The product of the values as columns of equal length; `__` in a name stands for a dot."""
    mesh = np.meshgrid(*values.values(), indexing="ij")
    return {name.replace("__", "."): m.ravel().tolist() for name, m in zip(values, mesh)}

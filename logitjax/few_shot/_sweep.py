"""Few-shot runs in bulk: many samples of images and a grid of settings in one program."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from logitjax.few_shot._method import CLASSIFIER, FewShotTask, Inputs, Method, State, one_hot
from logitjax.few_shot._train import Recipe
from logitjax.losses import cross_entropy
from logitjax.ops import checks

# Number of held-out images scored at a time, and of settings of methods without training.
_SCORED, _AT_ONCE = 1024, 12


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """Samples of images that a sweep trains on, with a leading axis of runs.

    A run's random initialisation follows from its number; `orders` has the rows of each step.
    `held_out` has images and labels to score on, `settings` `[runs, settings]` values by field.
    """

    numbers: Any
    settings: dict[str, Any]
    task: FewShotTask
    orders: Any
    held_out: Mapping[str, tuple[Inputs, Any]]

    def shardings(self, mesh: Mesh) -> "Runs":
        """Sharding of all arrays: runs are split over the mesh's first axis."""
        split = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
        full = NamedSharding(mesh, PartitionSpec())
        bare, shared = _apart(self)
        return _with(jax.tree.map(lambda _: split, bare), jax.tree.map(lambda _: full, shared))


def _apart(runs: Runs) -> tuple[Runs, dict[str, Any]]:
    """Split a pytree into leaves with an axis of runs, and leaves without."""
    # Shared by all runs.
    shared = {name: getattr(runs.task, name) for name in CLASSIFIER}
    bare = dataclasses.replace(runs.task, **dict.fromkeys(CLASSIFIER))
    return dataclasses.replace(runs, task=bare), shared


def _with(runs: Runs, shared: Mapping[str, Any]) -> Runs:
    """The inverse of `_apart`."""
    return dataclasses.replace(runs, task=dataclasses.replace(runs.task, **shared))


def with_settings(
    config: Method, training: Recipe, settings: Mapping[str, Any]
) -> tuple[Method, Recipe]:
    """Replace fields: `beta`, `uncertainty.exponent`, `training.learning_rate`."""

    def put(target: Any, path: Sequence[str], value: Any) -> Any:
        name, *rest = path
        if name not in {field.name for field in dataclasses.fields(target)}:
            raise ValueError(f"grid: {type(target).__name__} has no field {name!r}")
        value = put(getattr(target, name), rest, value) if rest else value
        return dataclasses.replace(target, **{name: value})

    for name, value in settings.items():
        first, *rest = name.split(".")
        if first == "training":
            training = put(training, rest, value)
        else:
            config = put(config, [first, *rest], value)
    return config, training


def sweep(
    method: Method,
    task: FewShotTask,
    held_out: Mapping[str, tuple[Inputs, Any]],
    *,
    training: Recipe,
    grid: Mapping[str, Sequence[float] | np.ndarray] | None = None,
    seed: int = 0,
    first: int = 0,
    sequential: bool = False,
    folds: int = 0,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Train and score a method on several samples of images, with every setting of a grid.

    Initialisation, training and scoring are one compiled program, mapped over the runs and over the
    grid. A run's order of images depends only on the seed and its number.

    Args:
        task: `[runs, views * n, ...]` images and `[runs, n]` labels; class weights and a projection
            without an axis of runs. Rows at the end, equally many in each run, may be
            padding with the label -1, so that calls with fewer images share one program.
        held_out: By name, images `[runs, m, ...]` and labels `[runs, m]` to score on; images with
            negative labels are ignored.
        training: The optimizer's settings, for methods that train.
        grid: Columns of equal length, named by field: `beta`, `uncertainty.exponent`,
            `training.learning_rate`; `[settings]`, or `[runs, settings]` if runs differ.
        seed: Seed of the orders and of random initialisations.
        first: Number of the first run, so that a sweep can be split into several calls.
        sequential: One run after another, and in training one setting after another: for heads too
            large to train at once, and no slower on a CPU.
        folds: Number of parts of the images to learn from, each with a share of every class. For
            each part a head learns from the others and is scored on it, on the images
            `held_out["train"]`; as many parts as images per class leave one of each out.
        mesh: Mesh whose first axis splits the runs; one device if None.

    Returns:
        For every name, `accuracy` and `cross_entropy` `[runs, settings]`, and for AMU also
        `auxiliary_accuracy`, that of the bias alone. For `"train"`, which exists only with folds,
        and `"calibration"` also `temperature`, the divisor of the logits that makes the labels
        likeliest, and `probabilities` `[runs, settings, m, classes]` with it.

    Raises:
        TypeError: Labels that are not integers.
        ValueError: A grid with an unknown name, columns of different lengths or no settings; runs
            with different numbers of images, or none; labels that do not fit images or classes.

    >>> from logitjax.few_shot.methods import TipAdapter
    >>> images = Inputs(zero_shot=jnp.zeros((1, 3, 3)), features=jnp.eye(3)[None])
    >>> task = FewShotTask(support=images, labels=jnp.arange(3)[None])
    >>> scores = sweep(TipAdapter(), task, {"test": (images, task.labels)},
    ...                training=Recipe(), grid={"beta": [-1.0, 1.0]})
    >>> scores["test"]["accuracy"].tolist()
    [[0.0, 1.0]]
    """
    columns = {name: np.asarray(column, np.float32) for name, column in (grid or {}).items()}
    lengths = {column.shape[-1] for column in columns.values()} or {1}
    if len(lengths) > 1 or 0 in lengths:
        raise ValueError(f"grid: expected columns of one length, got {sorted(lengths)}")
    labels = np.asarray(task.labels)
    if labels.ndim != 2 or not len(labels):
        raise ValueError(f"labels: expected [runs, images], got shape {labels.shape}")
    task.check()
    for name, (images, existing) in held_out.items():
        existing, shape = np.asarray(existing), np.shape(images.zero_shot)[:-1]
        if existing.shape != shape:
            raise ValueError(f"held_out: expected {shape} labels of {name!r}, got {existing.shape}")
        # Negative labels are ignored.
        checks.ids(np.maximum(existing, -1), task.num_classes, f"held_out[{name!r}]", least=-1)
    counts = set((labels >= 0).sum(1).tolist())
    if len(counts) > 1 or (labels[:, : min(counts)] < 0).any():
        raise ValueError(
            f"labels: expected every run to start with equally many images, got {sorted(counts)}"
        )
    if not folds:
        held_out = {name: part for name, part in held_out.items() if name != "train"}
    # A wrong name fails here, before anything is traced.
    with_settings(method, training, dict.fromkeys(columns, 0.0))
    numbers = np.arange(first, first + len(labels))
    orders, steps = _orders(numbers, labels, counts.pop(), training, views=task.views, seed=seed)
    # Gives the axis of settings its length if no field is searched.
    columns[""] = np.zeros(lengths.pop(), np.float32)
    columns = {k: np.broadcast_to(x, (len(labels), x.shape[-1])) for k, x in columns.items()}
    runs = Runs(
        numbers=numbers, settings=columns, task=task, orders=orders, held_out=dict(held_out)
    )
    if mesh is not None and mesh.size > 1:
        runs = _padded(runs, mesh.devices.shape[0])
        runs = jax.device_put(runs, runs.shardings(mesh))
    scores = compiled_sweep(
        runs,
        steps if method.trains else 0,
        seed,
        method=method,
        training=training,
        sequential=sequential,
        folds=folds,
        mesh=mesh,
    )
    # Removes the padded runs.
    return jax.tree.map(lambda x: np.asarray(x)[: len(labels)], scores)


def _orders(
    numbers: np.ndarray, labels: np.ndarray, count: int, training: Recipe, *, views: int, seed: int
) -> tuple[np.ndarray, int]:
    """Rows `[runs, steps, batch]`, padded as if no row were padding; and the number of steps."""
    runs, room = labels.shape
    steps = training.total_steps(count)
    width = min(training.batch_size, room)
    order = np.full((runs, max(steps, training.total_steps(room)), width), -1, np.int32)
    for run, number in enumerate(numbers.tolist()):
        rows = training.order((seed, number), count, views=views, stride=room)
        order[run, :steps, : rows.shape[1]] = rows
    return order, steps


def _padded(runs: Runs, multiple: int) -> Runs:
    """Pad the runs to a multiple by repeating the last one."""
    count = len(runs.numbers)
    if count % multiple == 0:
        return runs
    rows = np.minimum(np.arange(-(-count // multiple) * multiple), count - 1)
    bare, shared = _apart(runs)
    return _with(jax.tree.map(lambda x: x[rows], bare), shared)


def learn(
    method: Method,
    recipe: Recipe,
    task: FewShotTask,
    held_out: Mapping[str, tuple[Inputs, Any]],
    *,
    folds: int,
    seed: int,
) -> dict[str, Any]:
    """Train the single run of a task as in a `sweep`: its scores, and `state`."""
    one, labels = np.zeros(1, int), np.asarray(task.labels)
    order, steps = _orders(one, labels, labels.size, recipe, views=task.views, seed=seed)
    runs = Runs(
        numbers=one, settings={"": np.zeros((1, 1))}, task=task, orders=order, held_out=held_out
    )
    options: dict[str, Any] = dict(training=recipe, sequential=True, folds=folds, keep=True)
    result = compiled_sweep(runs, steps if method.trains else 0, seed, method=method, **options)
    return jax.tree.map(lambda x: x[0, 0], result)


_OPTIONS = ("method", "training", "sequential", "folds", "mesh", "keep")


@functools.partial(jax.jit, static_argnames=_OPTIONS)
def compiled_sweep(
    runs: Runs,
    steps: Any,
    seed: Any,
    *,
    method: Method,
    training: Recipe,
    sequential: bool,
    folds: int = 0,
    mesh: Mesh | None = None,
    keep: bool = False,
) -> Any:
    """The compiled part of :func:`sweep`: every run with every setting, trained and scored."""
    bare, shared = _apart(runs)
    arguments = (bare, shared, steps, jax.random.key(seed))
    run = functools.partial(_sweep, method, training, sequential, folds, keep)
    if mesh is None or mesh.size == 1:
        return run(*arguments)
    split, full = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
    # Runs are independent: each device trains its own.
    each = jax.shard_map(
        run, mesh=mesh, in_specs=(split, full, full, full), out_specs=split, check_vma=False
    )
    return jax.lax.with_sharding_constraint(each(*arguments), NamedSharding(mesh, full))


def _sweep(
    method: Method,
    training: Recipe,
    sequential: bool,
    folds: int,
    keep: bool,
    runs: Runs,
    shared: Mapping[str, Any],
    steps: Any,
    key: jax.Array,
) -> Any:
    def one(run: Runs, setting: dict[str, jax.Array], batch_size: int = _SCORED) -> Any:
        options = {name: value for name, value in setting.items() if name}
        config, recipe = with_settings(method, training, options)
        # Shared arrays are not copied for each run.
        task = _with(run, shared).task

        def learnt(task: FewShotTask) -> State:
            state = config.init(task, key=jax.random.fold_in(key, run.numbers))
            if not config.trains:
                return state
            # No step may see an excluded row.
            present = jnp.asarray(task.labels)[run.orders % len(task.labels)] >= 0
            orders = jnp.where(present, run.orders, -1) if folds else run.orders
            return recipe.train(config, task, state, orders, steps=steps)[0]

        state = learnt(task)
        scores: dict[str, Any] = {"state": state} if keep else {}
        for name, (images, existing) in run.held_out.items():
            if name == "train":
                logits = fold_logits(config, learnt, task, images, folds)
                scores[name] = _scores(logits, existing, calibrate=True)
                continue
            logits = _in_batches(config.logits, state, images, batch_size)
            scores[name] = _scores(logits, existing, calibrate=name == "calibration")
            if alone := getattr(config, "auxiliary_logits", None):
                logits = _in_batches(alone, state, images, batch_size)
                scores[name]["auxiliary_accuracy"] = _scores(logits, existing)["accuracy"]
        return scores

    if sequential and method.trains:
        return jax.lax.map(lambda run: jax.lax.map(lambda x: one(run, x), run.settings), runs)
    if sequential:
        # Work independent of the setting, such as all of LP++, is done once for several settings.
        some = min(_AT_ONCE, len(runs.settings[""][0]))
        scored = functools.partial(one, batch_size=max(1, _SCORED // some))

        def each(run: Runs) -> Any:
            return jax.lax.map(lambda x: scored(run, x), run.settings, batch_size=some)

        return jax.lax.map(each, runs)
    return jax.vmap(lambda run: jax.vmap(lambda x: one(run, x))(run.settings))(runs)


def fold_logits(
    method: Method,
    learn: Callable[[FewShotTask], State],
    task: FewShotTask,
    images: Any,
    folds: int,
) -> jax.Array:
    """Logits `[n, classes]` of the images to learn from, each from a head that did not see it."""
    labels = jnp.asarray(task.labels)
    hit = one_hot(labels, task.num_classes, jnp.int32)
    # An image's index among those of its class: every part has a share of each class.
    part = ((jnp.cumsum(hit, 0) - 1) * hit).sum(-1) % folds

    def one(number: jax.Array) -> jax.Array:
        others = dataclasses.replace(task, labels=jnp.where(part == number, -1, labels))
        return method.logits(learn(others), images)

    return jnp.take_along_axis(jax.lax.map(one, jnp.arange(folds)), part[None, :, None], 0)[0]


def _in_batches(run: Callable[..., jax.Array], state: State, inputs: Any, size: int) -> jax.Array:
    if len(inputs) <= size:
        return run(state, inputs)
    return jax.lax.map(lambda x: run(state, x), inputs, batch_size=size)


def _scores(
    logits: jax.Array, labels: jax.Array, *, calibrate: bool = False
) -> dict[str, jax.Array]:
    present = labels >= 0

    def share(values: jax.Array) -> jax.Array:
        return jnp.where(present, values, 0).sum() / jnp.maximum(present.sum(), 1)

    # The argmax of logits with a nan is the first nan, and may be the label by chance.
    right = (logits.argmax(-1) == labels) & ~jnp.isnan(logits).any(-1)
    losses = cross_entropy(logits, jnp.where(present, labels, 0))
    scores = {"accuracy": share(right), "cross_entropy": share(losses)}
    if calibrate:
        temperature = _likeliest_temperature(logits, labels)
        calm = jnp.nan_to_num(jax.nn.softmax(logits / temperature))
        scores |= {"temperature": temperature, "probabilities": calm}
    return scores


def _likeliest_temperature(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The divisor of logits `[n, classes]` that makes the labels `[n]` likeliest; -1 for none."""
    present = labels >= 0
    # One picture's worth of doubt: if all are right, no head becomes infinitely sure.
    doubt = 1 / (1 + present.sum())

    def loss(temperature: jax.Array) -> jax.Array:
        likely = jnp.exp(-cross_entropy(logits / temperature, jnp.where(present, labels, 0)))
        values = jnp.log((1 - doubt) * likely + doubt / logits.shape[-1])
        return -jnp.where(present, values, 0.0).sum()

    # Logits may be cosines, or hundreds of times as large.
    temperatures = jnp.geomspace(0.01, 300.0, 81)
    return temperatures[jax.lax.map(loss, temperatures).argmin()]


def best_setting(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """The setting of each run with the best accuracy; among equals, with the lower cross-entropy.

    A nan score, of invalid logits, is never chosen; ValueError if a run has no other.

    Args:
        scores: Scores of validation images from :func:`sweep`; never of test images.

    >>> scores = {"accuracy": np.array([[0.5, 0.8, 0.8]]), "cross_entropy": np.array([[1, 3, 2]])}
    >>> best_setting(scores)
    array([2])
    """
    accuracy, entropy = np.asarray(scores["accuracy"]), np.asarray(scores["cross_entropy"])
    if accuracy.ndim != 2 or not accuracy.shape[1] or accuracy.shape != entropy.shape:
        raise ValueError(
            "scores: expected [runs, settings] of both, got accuracies "
            f"{accuracy.shape} and cross-entropies {entropy.shape}"
        )
    numbers = ~(np.isnan(accuracy) | np.isnan(entropy))
    if not numbers.any(-1).all():
        run = int(np.flatnonzero(~numbers.any(-1))[0])
        raise ValueError(f"scores: expected a setting without nan in each run, got none in {run}")
    # The last key sorts first; of equal settings the first stays so.
    keys = np.where(numbers, entropy, np.inf), np.where(numbers, -accuracy, np.inf)
    return np.lexsort(keys, axis=-1)[:, 0]

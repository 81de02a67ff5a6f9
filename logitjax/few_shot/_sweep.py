"""Few-shot runs in bulk: many samples of images and a grid of settings in one program."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.few_shot._amu import AMUConfig
from logitjax.few_shot._method import FewShotConfig, FewShotInputs, FewShotState
from logitjax.few_shot._train import FewShotTraining, few_shot_order, fit_few_shot
from logitjax.losses import cross_entropy

HeldOut = Mapping[str, tuple[FewShotInputs, Any]]


def few_shot_logits(
    config: FewShotConfig,
    state: FewShotState,
    inputs: FewShotInputs,
    *,
    batch_size: int = 1024,
    method: str = "logits",
) -> jax.Array:
    """Logits of many images, some at a time.

    Args:
      config: the method.
      state: trained.
      inputs: ``[n, ...]``.
      batch_size: images at a time.
      method: of the config, such as ``auxiliary_logits`` of AMU.

    Returns:
      ``[n, classes]``.

    >>> from logitjax.few_shot import TaskResConfig
    >>> images = FewShotInputs(zero_shot=jnp.eye(3), features=jnp.eye(3))
    >>> config = TaskResConfig()
    >>> few_shot_logits(config, config.init(images, jnp.arange(3)), images, batch_size=2).shape
    (3, 3)
    """
    run = getattr(config, method)
    if len(inputs) <= batch_size:
        return run(state, inputs)
    return jax.lax.map(lambda x: run(state, x), inputs, batch_size=batch_size)


def with_settings(
    config: FewShotConfig, training: FewShotTraining, settings: Mapping[str, Any]
) -> tuple[FewShotConfig, FewShotTraining]:
    """Replaces fields: ``beta``, ``uncertainty.exponent``, ``training.learning_rate``.

    Raises:
      ValueError: a name that is no field.

    >>> config, _ = with_settings(AMUConfig(), FewShotTraining(), {"uncertainty.exponent": 0.1})
    >>> config.uncertainty.exponent
    0.1
    """

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


def grid_of(**values: Sequence[float]) -> dict[str, list[float]]:
    """The product of the values as columns of equal length; ``__`` in a name stands for a dot.

    >>> grid_of(beta=[1.0, 2.0], training__learning_rate=[0.1])
    {'beta': [1.0, 2.0], 'training.learning_rate': [0.1, 0.1]}
    """
    mesh = np.meshgrid(*values.values(), indexing="ij")
    return {name.replace("__", "."): m.ravel().tolist() for name, m in zip(values, mesh)}


def sweep_few_shot(
    config: FewShotConfig,
    support: FewShotInputs,
    labels: Any,
    held_out: HeldOut,
    *,
    training: FewShotTraining,
    grid: Mapping[str, Sequence[float]] | None = None,
    class_weights: Any = None,
    views: int = 1,
    seed: int = 0,
    first: int = 0,
    sequential: bool = False,
    batch_size: int = 1024,
) -> dict[str, dict[str, np.ndarray]]:
    """Trains and scores a method on several samples of images, with every setting of a grid.

    Initialisation, training and scoring are one compiled program, mapped over the runs and over
    the grid. A run's order of images depends on the seed and its number alone.

    Args:
      config: the method.
      support: ``[runs, views * n, ...]`` labelled images.
      labels: ``[runs, n]``. Rows at the end may have the label -1, as many in each run: they are
        not there, and calls with fewer of them share one program.
      held_out: by name, images ``[runs, m, ...]`` and labels ``[runs, m]`` to score on; images with
        negative labels do not count.
      training: the optimizer's settings, for methods that train.
      grid: columns of equal length, the names as in :func:`with_settings`; see :func:`grid_of`.
      class_weights: ``[features, classes]``, for methods that read them.
      views: augmented views of the labelled images.
      seed: of the orders and of random starts.
      first: number of the first run, so that several calls are as one.
      sequential: one run after another, and in training one setting after another: for heads too
        large to train at once, and no slower on a CPU.
      batch_size: images scored at a time.

    Returns:
      for every name, ``accuracy`` and ``cross_entropy`` ``[runs, settings]``, and of AMU also
      ``auxiliary_accuracy``, that of the bias alone.

    Raises:
      ValueError: a grid with an unknown name or columns of different lengths, or runs with
        different numbers of images.

    >>> from logitjax.few_shot import TipAdapterConfig
    >>> images = FewShotInputs(zero_shot=jnp.zeros((1, 3, 3)), features=jnp.eye(3)[None])
    >>> found = sweep_few_shot(TipAdapterConfig(), images, jnp.arange(3)[None],
    ...                        {"test": (images, jnp.arange(3)[None])}, training=FewShotTraining(),
    ...                        grid=grid_of(beta=[-1.0, 1.0]))
    >>> found["test"]["accuracy"].tolist()
    [[0.0, 1.0]]
    """
    columns = {name: jnp.asarray(column, jnp.float32) for name, column in (grid or {}).items()}
    lengths = {len(column) for column in columns.values()} or {1}
    if len(lengths) > 1:
        raise ValueError(f"grid: expected columns of one length, got {sorted(lengths)}")
    labels = np.asarray(labels)
    counts = set((labels >= 0).sum(1).tolist())
    if len(counts) > 1 or (labels[:, : min(counts)] < 0).any():
        raise ValueError(
            f"labels: expected every run to start with as many images, got {sorted(counts)}"
        )
    with_settings(config, training, dict.fromkeys(columns, 0.0))
    numbers = np.arange(first, first + len(labels))
    order, steps = _orders(numbers, labels, counts.pop(), training, views=views, seed=seed)
    found = _sweep(
        (numbers, support, labels, order, dict(held_out)),
        columns | {"": jnp.zeros(lengths.pop())},
        class_weights,
        steps if config.trains else 0,
        jax.random.key(seed),
        config=config,
        training=training,
        views=views,
        sequential=sequential,
        batch_size=batch_size,
    )
    return jax.tree.map(np.asarray, found)


def _orders(
    numbers: np.ndarray,
    labels: np.ndarray,
    count: int,
    training: FewShotTraining,
    *,
    views: int,
    seed: int,
) -> tuple[np.ndarray, int]:
    """``[runs, steps, batch]`` rows, padded to what all of the rows would need; and the steps."""
    runs, room = labels.shape
    steps = training.total_steps(count)
    width = min(training.batch_size, room)
    order = np.full((runs, max(steps, training.total_steps(room)), width), -1, np.int32)
    for run, number in enumerate(numbers.tolist()):
        rows = few_shot_order((seed, number), count, training, views=views, stride=room)
        order[run, :steps, : rows.shape[1]] = rows
    return order, steps


@functools.partial(
    jax.jit, static_argnames=("config", "training", "views", "sequential", "batch_size")
)
def _sweep(
    data: Any,
    settings: dict[str, jax.Array],
    class_weights: Any,
    steps: Any,
    key: jax.Array,
    *,
    config: FewShotConfig,
    training: FewShotTraining,
    views: int,
    sequential: bool,
    batch_size: int,
) -> Any:
    def one(run: Any, setting: dict[str, jax.Array], batch_size: int = batch_size) -> Any:
        number, support, labels, order, held_out = run
        given = {name: value for name, value in setting.items() if name}
        method, recipe = with_settings(config, training, given)
        start = jax.random.fold_in(key, number)
        state = method.init(support, labels, class_weights=class_weights, views=views, key=start)
        if method.trains:
            state, _ = fit_few_shot(
                method, state, support, labels, order, training=recipe, steps=steps
            )
        return {
            name: _score(method, state, *images, batch_size=batch_size)
            for name, images in held_out.items()
        }

    if sequential and config.trains:
        return jax.lax.map(lambda run: jax.lax.map(lambda x: one(run, x), settings), data)
    if sequential:
        # What does not depend on the setting, such as the whole of LP++, is done once for all.
        fewer = max(1, batch_size // len(settings[""]))
        scored = jax.vmap(functools.partial(one, batch_size=fewer), in_axes=(None, 0))
        return jax.lax.map(lambda run: scored(run, settings), data)
    over_grid = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_grid, in_axes=(0, None))(data, settings)


def _score(
    config: FewShotConfig,
    state: FewShotState,
    inputs: FewShotInputs,
    labels: jax.Array,
    *,
    batch_size: int,
) -> dict[str, jax.Array]:
    known = labels >= 0
    count = jnp.maximum(known.sum(), 1)

    def share(values: jax.Array) -> jax.Array:
        return jnp.where(known, values, 0).sum() / count

    logits = few_shot_logits(config, state, inputs, batch_size=batch_size)
    found = {
        "accuracy": share(logits.argmax(-1) == labels),
        "cross_entropy": share(cross_entropy(logits, jnp.where(known, labels, 0))),
    }
    if isinstance(config, AMUConfig):
        alone = few_shot_logits(
            config, state, inputs, batch_size=batch_size, method="auxiliary_logits"
        )
        found["auxiliary_accuracy"] = share(alone.argmax(-1) == labels)
    return found


def best_setting(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of every run the setting with the best accuracy, of equal ones that of lower cross-entropy.

    Args:
      scores: of validation images, as :func:`sweep_few_shot` returns them; never of test images.

    Returns:
      ``[runs]`` numbers of settings.

    >>> scores = {"accuracy": np.array([[0.5, 0.8, 0.8]]), "cross_entropy": np.array([[1, 3, 2]])}
    >>> best_setting(scores)
    array([2])
    """
    accuracy, entropy = np.asarray(scores["accuracy"]), np.asarray(scores["cross_entropy"])
    tied = accuracy >= accuracy.max(-1, keepdims=True)
    return np.where(tied, np.nan_to_num(entropy, nan=np.inf), np.inf).argmin(-1)

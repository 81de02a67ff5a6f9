"""A trained few-shot head: fitted in one call, asked for classes, written to disk and read."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from logitjax.few_shot import methods
from logitjax.few_shot._candidates import Candidate
from logitjax.few_shot._labelled import Pictures
from logitjax.few_shot._method import FewShotTask, Inputs, Method, State
from logitjax.few_shot._sweep import best_setting, sweep
from logitjax.ops import Array
from logitjax.storage import guard, read_head, write_head

_KIND = "few-shot head"  # files of other heads lie under the same names


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedHead:
    """A trained method, with the zero-shot classifier that it is added to.

    Attributes:
        method: The method, at the chosen setting.
        state: Its trained state.
        class_weights: `[features, classes]` of the zero-shot classifier.
        scale: Scale of the classifier's cosines.
        class_names: Names by class number.
    """

    method: Method
    state: State
    class_weights: Any
    scale: float
    class_names: tuple[str, ...]

    def logits(
        self,
        features: Float[Array, "batch features"],
        auxiliary: Float[Array, "batch auxiliary"] | None = None,
        *,
        hidden: Float[Array, "batch hidden"] | None = None,
    ) -> Float[jax.Array, "batch classes"]:
        """float32 `[batch, classes]`, the fused logits of pictures.

        Args:
            features: Features of the encoder that names classes, of any length.
            auxiliary: Features of the other encoder, if the head was trained with one.
            hidden: Features of the first encoder before its last projection, for
                `methods.ProLIP`.

        Raises:
            ValueError: Features that the method needs are missing, or of another width.
        """
        width = self.class_weights.shape[0]
        if np.ndim(features) != 2 or np.shape(features)[1] != width:
            raise ValueError(f"features: expected [batch, {width}], got {np.shape(features)}")
        learnt = (self.state, self.class_weights)
        return _fused(learnt, features, auxiliary, hidden, method=self.method, scale=self.scale)

    def predict(self, *features: Any, **hidden: Any) -> Int[np.ndarray, " batch"]:
        """`[batch]` numbers of classes; arguments as of `logits`."""
        return np.asarray(self.logits(*features, **hidden)).argmax(-1)

    def accuracy(self, pictures: Pictures) -> float:
        """Share of the pictures whose class is predicted."""
        given = (pictures.features, pictures.auxiliary)  # None without a second encoder
        return float((self.predict(*given, hidden=pictures.hidden) == pictures.labels).mean())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the head as ``head.safetensors`` and ``head.json``, which names the method."""
        # The file takes no strides.
        tensors = {"class_weights": np.ascontiguousarray(self.class_weights)}
        state = _form(tuple(self.state), "state", tensors)
        record = {
            "kind": _KIND,
            "method": _described(self.method),
            "state": state,
            "scale": self.scale,
            "class_names": list(self.class_names),
        }
        write_head(directory, record, tensors)


@functools.partial(jax.jit, static_argnames=("method", "scale"))
def _fused(
    learnt: Any, features: Any, auxiliary: Any, hidden: Any, *, method: Method, scale: float
) -> jax.Array:
    state, class_weights = learnt  # traced: heads of one setting share a program
    inputs = Inputs.of(features, class_weights, scale=scale, auxiliary=auxiliary, hidden=hidden)
    return method.logits(state, method.prepare(inputs))


def fit(
    candidate: Candidate | str,
    pictures: Pictures,
    validation: Pictures | None = None,
    *,
    seed: int = 0,
) -> FittedHead:
    """Choose a method's setting on validation pictures, and train it with that setting.

    Args:
        candidate: The method with its recipe and settings, or its name in `Candidate.all()`.
        pictures: Pictures to learn from.
        validation: Other pictures to choose on, with features of the same encoders. Without them
            the method keeps its published setting, which is CLAP's protocol. LP++ as released
            also stops by them.
        seed: Seed of the order of pictures, and of a random start.

    Raises:
        ValueError: An unknown method, missing features, or pictures that the method refuses.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(12) % 3
    >>> features = np.eye(8)[labels] + 0.1 * rng.normal(size=(12, 8))
    >>> pictures = Pictures(features=features, labels=labels, class_weights=np.eye(8)[:, :3])
    >>> head = fit("tip_adapter", pictures)
    >>> head.predict(features[:4]).tolist()
    [0, 1, 2, 0]
    """
    if isinstance(candidate, str):
        known = Candidate.all()
        if candidate not in known:
            raise ValueError(f"method: expected one of {', '.join(known)}, got {candidate!r}")
        candidate = known[candidate]
    candidate = candidate.at_scale(pictures.scale)
    for name in candidate.method.needs:
        if getattr(pictures, name) is None:
            raise ValueError(f"{name}: expected features, which the method reads, got none")
    task = pictures.task
    if validation is not None and candidate.method.stops:
        seen, known = validation.inputs, validation.labels
        task = dataclasses.replace(task, validation=seen, validation_labels=known)
    if validation is not None and candidate.grid:
        # `sweep` wants an axis of runs, but for what all runs share.
        fixed = dict.fromkeys(("class_weights", "projection", "projection_bias"))
        one = jax.tree.map(lambda x: x[None], dataclasses.replace(task, **fixed))
        shared = {name: getattr(task, name) for name in fixed}
        scores = sweep(
            candidate.method,
            dataclasses.replace(one, **shared),
            {"validation": (validation.inputs[None], validation.labels[None])},
            training=candidate.recipe,
            grid=candidate.grid,
            seed=seed,
            sequential=True,  # the memory of one setting, not of the grid
        )
        candidate = candidate.chosen(int(best_setting(scores["validation"])[0]))
    return FittedHead(
        method=candidate.method,
        state=_learnt(candidate, task, seed),
        class_weights=pictures.class_weights,
        scale=pictures.scale,
        class_names=pictures.class_names,
    )


def _learnt(candidate: Candidate, task: FewShotTask, seed: int) -> State:
    """The first run of a `sweep` with this seed."""
    method, recipe = candidate.method, candidate.recipe
    method.check(task)
    order = None
    if method.trains:
        order = recipe.order((seed, 0), len(task.labels), views=task.views)  # run 0 of a sweep

    @jax.jit
    def run(task: FewShotTask, order: Any) -> State:
        state = method.init(task, key=jax.random.fold_in(jax.random.key(seed), 0))
        return state if order is None else recipe.train(method, task, state, order)[0]

    return run(task, order)


def load(directory: str | os.PathLike[str]) -> FittedHead:
    """Reads what `FittedHead.save` or `logitjax few-shot` wrote.

    Raises:
        FileNotFoundError: There is no head in the directory.
        ValueError: It is damaged; names the file.
    """
    record, tensors = read_head(directory)
    with guard.naming(epath.Path(directory), "a few-shot head"):
        if record.get("kind") != _KIND:
            raise ValueError(f"kind: expected {_KIND!r}, got {guard.short(record.get('kind'))}")
        weights, names = tensors["class_weights"], tuple(map(str, record["class_names"]))
        if weights.ndim != 2 or weights.shape[1] != len(names):
            raise ValueError(
                f"class_weights: expected a column for each of {len(names)} classes, got "
                f"{weights.shape}"
            )
        return FittedHead(
            method=_method_of(record["method"]),
            state=State(*_filled(record["state"], tensors)),
            class_weights=weights,
            scale=float(record["scale"]),
            class_names=names,
        )


def _form(tree: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """What of a state is no array, as JSON; its arrays go to `tensors`, under their names."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: _form(value, f"{name}.{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, tuple):  # a list in JSON, which `_filled` turns back
        return [_form(value, f"{name}.{i}", tensors) for i, value in enumerate(tree)]
    tensors[name] = np.ascontiguousarray(tree)
    return name


def _filled(form: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    """The inverse of `_form`."""
    if isinstance(form, dict):
        return {key: _filled(value, tensors) for key, value in form.items()}
    if isinstance(form, list):
        return tuple(_filled(value, tensors) for value in form)
    return None if form is None else tensors[form]


def _described(value: Any) -> Any:
    """A method or an `Uncertainty` as its name and its fields."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        settings = {field.name: _described(getattr(value, field.name)) for field in fields}
        return {"name": type(value).__name__, "settings": settings}
    return value


def _method_of(record: Any) -> Any:
    """The inverse of `_described`."""
    if not isinstance(record, dict):
        return record
    # Nothing but the library's methods: a file must not name any class it likes.
    kind: Any = getattr(methods, str(record["name"]), None)
    if not hasattr(kind, "__dataclass_fields__"):
        raise ValueError(f"method: expected one that is known, got {guard.short(record['name'])}")
    return kind(**{name: _method_of(value) for name, value in record["settings"].items()})

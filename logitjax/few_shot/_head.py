"""A trained few-shot head: fitted in one call, used to predict, written to and read from disk."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.core import Tracer
from jaxtyping import Float, Int

from logitjax.few_shot import methods
from logitjax.few_shot._candidates import Candidate
from logitjax.few_shot._labelled import Pictures, Sample, finite, unit
from logitjax.few_shot._method import Inputs, Method, State
from logitjax.few_shot._mixture import Mixture, likeliest_weights
from logitjax.few_shot._sweep import learn
from logitjax.ops import Array
from logitjax.storage import guard, read_head, write_head

# Files of other heads have the same names.
_KIND = "few-shot head"
_WRITTEN = ("scale", "class_names", "encoders", "about", "temperature", "likeness")
# Arrays that are not part of the state.
_KEPT = ("calibration", "examples", "example_labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FittedHead:
    """A trained method with its zero-shot classifier.

    Attributes:
        method: The method, at the chosen setting.
        class_weights: `[features, classes]` of the zero-shot classifier.
        scale: Scale of the classifier's cosines.
        encoders: Provenance of the features, as in `Pictures.encoders`.
        about: Further entries of ``head.json``, such as encoders and prompts by name.
        temperature: Divisor of the logits, calibrated on pictures that the head did not see.
        calibration: Probabilities of these pictures' classes; None without such pictures.
        examples: `[n, features]` of the pictures that the head learned from, of length one.
        example_labels: `[n]` their classes.
        likeness: Lower bound of the cosine of this encoder's features with the nearest example.
    """

    method: Method
    state: State
    class_weights: Any
    scale: float
    class_names: tuple[str, ...]
    encoders: tuple[str, ...] = ()
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0
    calibration: Any = None
    examples: Any = None
    example_labels: Any = None
    likeness: float = -1.0

    def logits(
        self,
        features: Float[Array, "batch features"],
        auxiliary: Float[Array, "batch auxiliary"] | None = None,
        *,
        hidden: Float[Array, "batch hidden"] | None = None,
    ) -> Float[jax.Array, "batch classes"]:
        """Fused logits of pictures, float32 `[batch, classes]`.

        Args:
            features: Features of the encoder that names classes, of any length.
            auxiliary: Features of the other encoder, if the head was trained with one.
            hidden: Features of the first encoder before its last projection, for `methods.ProLIP`.

        Raises:
            ValueError: Features that the method needs are missing, of another width, not finite, or
                so far from all training features that another encoder must have made them.
        """
        width = self.class_weights.shape[0]
        if np.ndim(features) != 2 or np.shape(features)[1] != width:
            raise ValueError(f"features: expected [batch, {width}], got {np.shape(features)}")
        inputs = {"features": features, "auxiliary": auxiliary, "hidden": hidden}
        for name, rows in inputs.items():
            if rows is not None and not isinstance(rows, Tracer):
                unit(finite(rows, name, 2), name)
        if self.likeness > -1 and not isinstance(features, Tracer):
            nearest = float(self.nearest(features, 1)[1].max())
            if nearest < self.likeness:
                raise ValueError(
                    "features: expected those of the encoder that the head learned from, got a "
                    f"cosine of at most {nearest:.3f} with its pictures, below {self.likeness:.3f}"
                )
        learnt = (self.state, self.class_weights)
        return _fused(learnt, features, auxiliary, hidden, method=self.method, scale=self.scale)

    def predict(self, *features: Any, **named: Any) -> Int[np.ndarray, " batch"]:
        """Class numbers `[batch]`; arguments as for `logits`."""
        return np.asarray(self.logits(*features, **named)).argmax(-1)

    def predict_proba(self, *features: Any, **named: Any) -> np.ndarray:
        """Probabilities `[batch, classes]`, from logits divided by `temperature`."""
        return np.asarray(jax.nn.softmax(self.logits(*features, **named) / self.temperature))

    def predict_sets(self, *features: Any, coverage: float = 0.9, **named: Any) -> np.ndarray:
        """Whether each class is in a picture's set, `[batch, classes]` (split conformal sets).

        For new pictures like those that calibrated the head (ValueError without any), the set
        contains the class with probability `coverage` over draws of both; few make large sets.
        """
        if self.calibration is None:
            raise ValueError("calibration: expected pictures that the head did not learn from")
        # 10 * (1 - .9) is slightly less than 1.
        number = int((len(self.calibration) + 1) * (1 - coverage) + 1e-9)
        least = np.sort(self.calibration)[number - 1] if number else 0.0
        return self.predict_proba(*features, **named) >= least

    def nearest(self, features: Any, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
        """Indices `[batch, count]` of the `examples` nearest to each picture, and their cosines."""
        cosines = unit(finite(features, "features", 2), "features") @ self.examples.T
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :count]
        return order, np.take_along_axis(cosines, order, 1)

    def inputs(self, pictures: Pictures) -> dict[str, Any]:
        """Features as for `logits`; ValueError for another encoder, size or fit."""
        # Most methods ignore a second encoder.
        if pictures.encoders and pictures.encoders[: len(self.encoders)] != self.encoders:
            raise ValueError(
                f"encoders: expected those that the head learned from, {self.encoders}, got "
                f"{pictures.encoders}"
            )
        return {name: getattr(pictures, name) for name in ("features", "auxiliary", "hidden")}

    def accuracy(self, pictures: Pictures) -> float:
        """Share of pictures classified correctly; errors as for `inputs`."""
        return float((self.predict(**self.inputs(pictures)) == pictures.labels).mean())

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the head as ``head.safetensors`` and ``head.json``, which names the method."""
        # The file format has no strides.
        tensors = {"class_weights": np.ascontiguousarray(self.class_weights)}
        record = {
            "kind": _KIND,
            "method": _described(self.method),
            "state": _form(tuple(self.state), "state", tensors),
            **{name: getattr(self, name) for name in _WRITTEN},
        }
        for name in _KEPT:
            if getattr(self, name) is not None:
                tensors[name] = np.ascontiguousarray(getattr(self, name))
        write_head(directory, record, tensors)


@functools.partial(jax.jit, static_argnames=("method", "scale"))
def _fused(
    learnt: Any, features: Any, auxiliary: Any, hidden: Any, *, method: Method, scale: float
) -> jax.Array:
    # Traced, so that heads with one setting share a program.
    state, class_weights = learnt
    inputs = Inputs.of(features, class_weights, scale=scale, auxiliary=auxiliary, hidden=hidden)
    return method.logits(state, inputs)


def fit(
    candidate: Candidate | str | Sequence[Candidate | str],
    pictures: Pictures,
    validation: Pictures | None = None,
    *,
    weights: Sequence[float] | None = None,
    folds: int = 0,
    seed: int = 0,
) -> FittedHead:
    """Choose a method's setting, train the method with it, and calibrate the head.

    Probabilities are calibrated on the validation pictures, or else on parts of the training
    pictures, each predicted by a head that did not see it; one picture per class leaves no part.
    ValueError for an unknown method, missing features, or pictures that the method refuses.

    Args:
        candidate: The method with its recipe and settings, or its name in `Candidate.all()`; or
            several, whose probabilities are mixed.
        pictures: Pictures to learn from.
        validation: Other pictures to choose on, with features of the same encoders. Without them
            the method keeps its published setting, as in CLAP's protocol, or uses folds.
        weights: Weights of several methods; by default those that make the labels of the pictures
            likeliest that calibrate the heads. Methods with the weight 0 are left out.
        folds: Number of parts of the training pictures to choose on instead, as for `sweep`.
        seed: Seed of the order of pictures, and of a random initialisation.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(12) % 3
    >>> features = np.eye(8)[labels] + 0.1 * rng.normal(size=(12, 8))
    >>> pictures = Pictures(features=features, labels=labels, class_weights=np.eye(8)[:, :3])
    >>> head = fit("tip_adapter", pictures)
    >>> head.predict(features[:4]).tolist()
    [0, 1, 2, 0]
    """
    if not isinstance(candidate, Candidate | str):
        options: Any = dict(folds=folds, seed=seed)
        return _mixed([fit(one, pictures, validation, **options) for one in candidate], weights)
    if isinstance(candidate, str):
        existing = Candidate.all()
        if candidate not in existing:
            raise ValueError(f"method: expected one of {', '.join(existing)}, got {candidate!r}")
        candidate = existing[candidate]
    candidate = candidate.at_scale(pictures.scale)
    for name in candidate.method.needs:
        if getattr(pictures, name) is None:
            raise ValueError(f"{name}: expected features, which the method reads, got none")
    every = Sample(np.arange(len(pictures)), *np.zeros((2, 0), int))
    task, shown = pictures.stack([every], room=every, validation=validation)
    part = "train" if validation is None else "calibration"
    if candidate.grid and (folds or validation is not None):
        options: Any = dict(seed=seed, folds=folds, sequential=True)
        _, best = candidate.sweep(task, {part: shown[part]}, part, **options)
        candidate = candidate.at(int(best[0]))
    method = candidate.method
    # Refuses here what it cannot see inside `jit`.
    method.check(pictures.task)
    folds = candidate.folds(pictures.labels) if validation is None else 0
    held_out = {part: shown[part]} if folds or validation is not None else {}
    scores = learn(method, candidate.recipe, task, held_out, folds=folds, seed=seed)
    head = FittedHead(
        method=method,
        state=scores["state"],
        class_weights=pictures.class_weights,
        scale=pictures.scale,
        class_names=pictures.class_names,
        encoders=pictures.encoders[: 1 + ("auxiliary" in method.needs)],
        examples=pictures.features,
        example_labels=pictures.labels,
        likeness=_likeness(pictures.features),
    )
    if part not in scores:
        return head
    labels = shown[part][1][0]
    return dataclasses.replace(
        head,
        temperature=float(scores[part]["temperature"]),
        calibration=np.asarray(scores[part]["probabilities"])[np.arange(len(labels)), labels],
    )


def _mixed(heads: Sequence[FittedHead], weights: Sequence[float] | None) -> FittedHead:
    """The mixture of heads that learned from the same pictures."""
    each = [head.calibration for head in heads]
    likely = None if not each or each[0] is None else np.stack(each, 1)
    if weights is None and likely is not None:
        weights = likeliest_weights(np.maximum(likely, 1e-6)).tolist()
    shares = np.asarray(() if weights is None else weights, np.float32)
    if shares.shape != (len(heads),) or not shares.any() or shares.min() < 0:
        raise ValueError(
            f"weights: expected one for each of {len(heads)} methods, or pictures that choose "
            f"them, got {weights}"
        )
    shares, kept = shares / shares.sum(), np.flatnonzero(shares).tolist()
    heads = [heads[number] for number in kept]
    temperatures = np.array([head.temperature for head in heads], np.float32)
    return dataclasses.replace(
        max(heads, key=lambda head: len(head.encoders)),
        method=Mixture(methods=tuple(head.method for head in heads)),
        state=State(tuple(head.state for head in heads), (shares[kept], temperatures)),
        temperature=1.0,
        calibration=None if likely is None else likely @ shares,
    )


def _likeness(features: np.ndarray) -> float:
    """The lowest cosine to a nearest picture, minus its distance from the median such cosine."""
    cosines = features[:1000] @ features.T
    np.fill_diagonal(cosines, -1.0)
    nearest = cosines.max(1)
    return max(-1.0, float(2 * nearest.min() - np.median(nearest)) - 1e-3)


def load(directory: str | os.PathLike[str]) -> FittedHead:
    """Read a head that `FittedHead.save` or `logitjax few-shot` wrote.

    FileNotFoundError if there is no head in the directory; ValueError names a damaged file.
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
            encoders=tuple(map(str, record["encoders"])),
            about=record["about"],
            temperature=float(record["temperature"]),
            likeness=float(record["likeness"]),
            **{name: tensors.get(name) for name in _KEPT},
        )


def _form(tree: Any, name: str, tensors: dict[str, np.ndarray]) -> Any:
    """Split a state into JSON, and arrays that go to `tensors` under their names."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {key: _form(value, f"{name}.{key}", tensors) for key, value in tree.items()}
    # A list in JSON, which `_filled` turns back.
    if isinstance(tree, tuple):
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
    """A method, an `Uncertainty` or several of them as names and fields."""
    if isinstance(value, tuple):
        return [_described(each) for each in value]
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        settings = {field.name: _described(getattr(value, field.name)) for field in fields}
        return {"name": type(value).__name__, "settings": settings}
    return value


def _method_of(record: Any) -> Any:
    """The inverse of `_described`."""
    if isinstance(record, list):
        return tuple(_method_of(each) for each in record)
    if not isinstance(record, dict):
        return record
    # Only the library's methods: a file must not name arbitrary classes.
    kind: Any = (vars(methods) | {"Mixture": Mixture}).get(str(record["name"]))
    if not hasattr(kind, "__dataclass_fields__"):
        raise ValueError(f"method: expected a known one, got {guard.short(record['name'])}")
    return kind(**{name: _method_of(value) for name, value in record["settings"].items()})

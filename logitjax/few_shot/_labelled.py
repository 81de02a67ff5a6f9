"""Encoded pictures with their classes, from files or memory, and samples of them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from etils import epath
from jaxtyping import Int

from logitjax.few_shot._feature_cache import FeatureCache
from logitjax.few_shot._method import CLASSIFIER, FewShotTask, Inputs
from logitjax.ops import checks
from logitjax.storage import digest, guard
from logitjax.storage.weights import SafetensorsSource, read_npy, read_npz

Validation = Literal["min4", "shots", "folds", "none"]
"""Number of pictures of a class for choosing settings: see `Pictures.sample`."""

_FEATURES = ("features", "auxiliary", "hidden")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """Encoded pictures with their labels, and a zero-shot classifier of their classes.

    Arrays are checked at construction. Features and class weights are scaled to length one.

    Attributes:
        features: `[n, features]` of the encoder that names classes.
        labels: `[n]` classes.
        class_weights: `[features, classes]` of the zero-shot classifier, such as from
            `vision.Encoder.zero_shot`.
        auxiliary: `[n, auxiliary]` of another encoder, for methods that use it.
        hidden: `[n, hidden]` of the first encoder before its last projection, for `methods.ProLIP`,
            which also needs `projection` and, if there is one, `projection_bias`.
        projection: `[hidden, features]`.
        projection_bias: `[features]`.
        texts: `[classes, prompts, width]` features of every prompt, for `methods.TIMO`; before
            `text_projection` `[width, features]`, which `methods.ProLIPText` trains.
        scale: Scale of the zero-shot classifier's cosines; CLIP's by default.
        class_names: Names by class number; the numbers if omitted.
        encoders: Provenance of the features: digests of the first encoder and of the second, each
            with its size and fit. A head refuses pictures from others.
        views: Other views of the same pictures, such as random crops, from which methods learn
            instead. Settings are chosen and heads are tested on the pictures themselves.

    Raises:
        TypeError: Labels that are not integers.
        ValueError: Wrong shapes or lengths, numbers that are not finite, a picture whose features
            are all 0, a single class, a label outside the classes, or views with other labels.
    """

    features: Any
    labels: Any
    class_weights: Any
    auxiliary: Any = None
    hidden: Any = None
    projection: Any = None
    projection_bias: Any = None
    texts: Any = None
    text_projection: Any = None
    scale: float = 100.0
    class_names: tuple[str, ...] = ()
    encoders: tuple[str, ...] = ()
    views: tuple["Pictures", ...] = ()

    def __post_init__(self) -> None:
        weights = finite(self.class_weights, "class_weights", 2)
        labels = np.asarray(self.labels)
        data: dict[str, Any] = {"class_weights": unit(weights.T, "class_weights").T}  # by column
        for name in _FEATURES:
            rows = getattr(self, name)
            if rows is None:
                continue
            result = finite(rows, name, 2)
            if labels.shape != result.shape[:1]:
                raise ValueError(
                    f"labels: expected one for each of {len(result)} rows of {name}, got shape "
                    f"{labels.shape}"
                )
            # The projection needs the length.
            data[name] = result if name == "hidden" else unit(result, name)
        width, classes = weights.shape
        if data["features"].shape[1] != width:
            turned = "; transposed, they would fit" if data["features"].shape[1] == classes else ""
            raise ValueError(
                f"class_weights: expected [{data['features'].shape[1]}, classes] for the features, "
                f"got {weights.shape}{turned}"
            )
        for name, rank in zip(CLASSIFIER[1:], (2, 1, 3, 2)):
            if getattr(self, name) is not None:
                data[name] = finite(getattr(self, name), name, rank)
        if "texts" in data:
            shape, last = data["texts"].shape, data.get("text_projection", np.empty((width, width)))
            if (shape[0], shape[2], width) != (classes, *last.shape):
                raise ValueError(
                    f"texts: expected [{classes}, prompts, {len(last)}] and a projection to {width}"
                    f" features, if any, got {shape} and {last.shape}"
                )
        if classes < 2:
            raise ValueError("class_weights: expected at least two classes, got one")
        checks.ids(labels, classes, "labels")
        data["labels"] = labels.astype(np.int32)
        names = self.class_names or tuple(map(str, range(classes)))
        if len(names) != classes:
            raise ValueError(
                f"class_names: expected {classes}, a name for each column of class_weights, got "
                f"{len(names)}"
            )
        for view in self.views:
            if not np.array_equal(view.labels, labels):
                raise ValueError("views: expected the labels of the pictures, got others")
        for name, value in (data | {"class_names": tuple(names)}).items():
            # The dataclass is frozen.
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> "Pictures":
        """Select pictures by a slice or an array of numbers."""
        entries = {name: getattr(self, name) for name in _FEATURES}
        chosen = {name: x[rows] for name, x in entries.items() if x is not None}
        views = tuple(view[rows] for view in self.views)
        return dataclasses.replace(self, labels=self.labels[rows], views=views, **chosen)

    @property
    def inputs(self) -> Inputs:
        """The pictures in the form that methods take, with the zero-shot classifier's logits."""
        entries = {name: getattr(self, name) for name in _FEATURES}
        # Like `Inputs.of`, whose program would be compiled for each number of rows.
        zero_shot = np.float32(self.scale) * (self.features @ self.class_weights)
        return Inputs(zero_shot=zero_shot, **entries)

    @property
    def task(self) -> FewShotTask:
        """The task of learning from these pictures, or from their views."""
        fixed = {name: getattr(self, name) for name in ("labels", *CLASSIFIER)}
        seen = [view.inputs for view in self.views or (self,)]
        # One view after another.
        support = jax.tree.map(lambda *views: np.concatenate(views), *seen)
        return FewShotTask(support=support, views=len(seen), **fixed)

    def sample(
        self,
        shots: int,
        *,
        validation: Validation = "min4",
        seed: int | Sequence[int] = 0,
        rest: bool = True,
    ) -> "Sample":
        """Draw pictures to learn from, to choose settings on and to test on.

        Samples of one seed are nested: those with more shots contain those with fewer. A class with
        too few pictures uses all it has, at least one for each part. Fewer raise a ValueError.

        Args:
            shots: Pictures of each class to learn from.
            validation: Pictures of each class to choose on: as many as shots (`'shots'`), as many
                but at most four, as in CoOp (`'min4'`), or none: settings are chosen on folds of
                the training pictures (`'folds'`), or not at all (`'none'`).
            rest: Whether a picture of each class must remain for testing.
        """
        kinds = get_args(Validation)
        if validation not in kinds:
            raise ValueError(f"validation: expected one of {', '.join(kinds)}, got {validation!r}")
        if shots < 1:
            raise ValueError(f"shots: expected at least 1, got {shots}")
        held_out = {"min4": min(shots, 4), "shots": shots}.get(validation, 0)
        rng = np.random.default_rng(seed)
        parts: tuple[list, list, list] = ([], [], [])
        for number, name in enumerate(self.class_names):
            # Shots are the beginning of one order, so that more shots contain fewer.
            rows = rng.permutation(np.flatnonzero(self.labels == number))
            # At least one picture for each part.
            least = 1 + (held_out > 0) + rest
            if len(rows) < least:
                raise ValueError(
                    f"shots: expected at least {least} pictures of each class, to learn from"
                    f"{', choose on' if held_out else ''}{' and test on' if rest else ''}, got "
                    f"{len(rows)} of {name!r}"
                )
            # Validation pictures come from the end, so that they are in no set of shots, and are at
            # most half of all: more shots never learn from fewer pictures.
            spare = len(rows) - rest
            chosen_on = min(held_out, spare // 2)
            learnt = min(shots, spare - chosen_on)
            parts[0].append(rows[:learnt])
            parts[1].append(rows[len(rows) - chosen_on :])
            parts[2].append(rows[learnt : len(rows) - chosen_on])
        train, chosen, left = (np.concatenate(part).astype(np.int64) for part in parts)
        return Sample(train=train, validation=chosen, rest=left)

    def stack(
        self,
        samples: Sequence["Sample"],
        *,
        room: "Sample",
        validation: "Pictures | None" = None,
        test: "Pictures | None" = None,
    ) -> tuple[FewShotTask, dict[str, tuple[Inputs, np.ndarray]]]:
        """Stack samples along an axis of runs and pad them, for `sweep`.

        Returns the training task, and by name the pictures of `"calibration"`, which choose
        settings, if any, `"test"` and `"train"`, the training pictures.

        Args:
            samples: One sample of these pictures for each run.
            room: A sample that sets the number of rows of each part, so that calls share a program.
            validation: Pictures to choose settings on; those of each sample if None.
            test: Pictures to test on; the rest of each sample if None.
        """
        plain = [self.inputs]
        views = [view.inputs for view in self.views] or plain

        def part(name: str, seen: Sequence[Inputs] = plain) -> tuple[Inputs, np.ndarray]:
            rows = np.full((len(samples), len(getattr(room, name))), -1)  # padding
            for run, sample in enumerate(samples):
                local = getattr(sample, name)
                rows[run, : len(local)] = local
            # [runs, views * n, ...]: one view of a sample after another.
            inputs = jax.tree.map(lambda *x: np.concatenate([v[rows] for v in x], 1), *seen)
            return inputs, np.where(rows >= 0, self.labels[rows], -1)

        support, labels = part("train", views)

        def whole(pictures: "Pictures") -> tuple[Inputs, np.ndarray]:
            every = pictures.inputs, pictures.labels
            return jax.tree.map(lambda x: np.repeat(x[None], len(samples), 0), every)

        fixed = {name: getattr(self, name) for name in CLASSIFIER}
        held_out = {"calibration": part("validation")} if len(room.validation) else {}
        if validation is not None:
            held_out["calibration"] = whole(validation)
        task = FewShotTask(support=support, labels=labels, views=len(views), **fixed)
        held_out["test"] = part("rest") if test is None else whole(test)
        return task, held_out | {"train": part("train")}


@dataclasses.dataclass(frozen=True)
class Sample:
    """Numbers of pictures: to learn from, to choose settings on, and the others."""

    train: Int[np.ndarray, " train"]
    validation: Int[np.ndarray, " validation"]
    rest: Int[np.ndarray, " rest"]


def read_pictures(
    features: epath.PathLike,
    auxiliary: epath.PathLike | None = None,
    *,
    class_weights: Any,
    class_names: Sequence[str] = (),
    scale: float | None = None,
    projection: tuple[Any, Any] | None = None,
    views: Sequence[epath.PathLike] = (),
) -> Pictures:
    """Read pictures that this library or another program has encoded.

    A file is a directory that `extract_features` filled with one view of each picture, or an
    ``.npz`` or ``.safetensors`` with the arrays `features` `[n, features]` and `labels` `[n]`, and
    optionally `hidden` `[n, hidden]`. From torch::

        numpy.savez("train.npz", features=features.numpy(), labels=labels.numpy())

    A missing file, or one of another kind, or one that `Pictures` refuses, is a ValueError.

    Args:
        features: File of the encoder that names classes.
        auxiliary: File of another encoder, with the same pictures in the same order.
        class_weights: `[features, classes]`: an array, or its file: ``.npy``, or ``.npz`` or
            ``.safetensors`` with `class_weights` and optionally `projection`, `projection_bias`,
            `texts`, `text_projection` and `scale`.
        class_names: Names by class number; by default those of a cache.
        scale: Scale of the zero-shot classifier's cosines; by default the file's, or CLIP's 100.
        projection: `vision.Encoder.projection` of the first encoder, if its features are from
            `vision.Encoder.before_projection`.
        views: Directories that `extract_features` filled with several views of the same pictures,
            by the first encoder and by the second if there is one, to learn from.
    """
    encoded, names, encoders, pictures = _read_views(features, auxiliary)
    if len(encoded) != 1:
        raise ValueError(
            f"{os.fspath(features)}: expected one view of each picture, got {len(encoded)}"
        )
    if views:
        more, _, others, same = _read_views(*views)
        alike = pictures == same or "" in (pictures, same)
        if not alike or (encoders and others and _prints(encoders) != _prints(others)):
            raise ValueError(
                f"views: expected the pictures and encoders of {os.fspath(features)}, got others"
            )
        encoded += more
    classifier = _read_classifier(class_weights)
    fixed = float(np.asarray(classifier.pop("scale", 100.0)).reshape(()))  # CLIP's
    if projection is not None:
        kernel, bias = projection
        classifier |= {"projection": kernel, "projection_bias": bias}
        for view in encoded:
            view["hidden"] = view["features"]
            view["features"] = view["hidden"] @ kernel + (0 if bias is None else bias)
    classifier |= {
        "scale": fixed if scale is None else scale,
        "class_names": tuple(class_names) or names,
        "encoders": encoders,
    }
    plain, *others = (Pictures(**view, **classifier) for view in encoded)
    return dataclasses.replace(plain, views=tuple(others))


def _prints(encoders: Sequence[str]) -> list[str]:
    # Behind a blank stands how many views there are.
    return [encoder.partition(" ")[0] for encoder in encoders]


def _read_views(
    features: epath.PathLike, auxiliary: epath.PathLike | None = None
) -> tuple[list[dict[str, np.ndarray]], tuple[str, ...], tuple[str, ...], str]:
    """Arrays of every view by the names of `Pictures`, classes, encoders, and the pictures."""
    first, names, rows, *encoders = _read_features(epath.Path(features))
    if auxiliary is not None:
        second, _, others, encoder = _read_features(epath.Path(auxiliary))
        encoders.append(encoder)
        # Arrays of other programs have no fingerprint, so only their labels can be compared.
        alike = len(second) == len(first) and (rows == others or "" in (rows, others))
        if not alike or not np.array_equal(second[0]["labels"], first[0]["labels"]):
            raise ValueError(
                f"auxiliary: expected the pictures of {os.fspath(features)} in their order, got "
                f"other pictures, labels or views in {os.fspath(auxiliary)}"
            )
        for view, other in zip(first, second):
            view["auxiliary"] = other["features"]
    return first, names, tuple(encoders) if all(encoders) else (), rows


def _read_features(
    path: epath.Path,
) -> tuple[list[dict[str, np.ndarray]], tuple[str, ...], str, str]:
    """Arrays by view, names of classes, and a cache's fingerprints of pictures and encoder."""
    if path.is_dir():
        cache = FeatureCache(path)
        rows = cache.all()
        views = np.moveaxis(rows.features, 1, 0)
        pictures = digest(cache.identity.data_fingerprint, np.asarray(cache.row_numbers))
        items = [{"features": view, "labels": rows.labels} for view in views]
        info = cache.identity
        return items, cache.class_names, pictures, f"{info.encoder_fingerprint} {info.views}"
    return [_read_arrays(path, ("features", "labels"), ("hidden",))], (), "", ""


def _read_classifier(source: Any) -> dict[str, Any]:
    if not isinstance(source, str | os.PathLike):
        return {"class_weights": source}
    path = epath.Path(source)
    if path.suffix == ".npy":
        return {"class_weights": read_npy(path)}
    return _read_arrays(path, CLASSIFIER[:1], (*CLASSIFIER[1:], "scale"))


def _read_arrays(
    path: epath.Path, required: Sequence[str], optional: Sequence[str]
) -> dict[str, np.ndarray]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    entries: Mapping[str, np.ndarray]
    if path.suffix == ".npz":
        entries = read_npz(path)
    elif path.suffix == ".safetensors":
        source = SafetensorsSource(path)
        entries = {name: source.read(name) for name in source.names()}
    else:
        raise ValueError(f"{path}: expected a feature cache, .npz or .safetensors")
    with guard.naming(path, "encoded pictures"):
        missing = [name for name in required if name not in entries]
        if missing:
            present = ", ".join(sorted(entries)[:5]) or "nothing"
            raise ValueError(f"{missing[0]}: expected an array of that name, got {present}")
        for name in ("features", "hidden"):
            if name in entries:
                finite(entries[name], name, 2)
    return {name: entries[name] for name in (*required, *optional) if name in entries}


def finite(values: Any, name: str, rank: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != rank or not array.size:
        form = ("[numbers]", "[rows, columns]", "[classes, prompts, width]")[rank - 1]
        raise ValueError(f"{name}: expected {form}, got shape {array.shape}")
    array = np.asarray(checks.as_float(array, name), np.float32)
    if not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ValueError(f"{name}: expected finite numbers, got others in row {row}")
    return array


def unit(values: np.ndarray, name: str) -> np.ndarray:
    none = np.flatnonzero(~values.any(1))
    if none.size:
        raise ValueError(f"{name}: expected vectors with a direction, got zeros at {none[0]}")
    length = np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True)
    # Rows of length one stay unchanged, to the last bit.
    length = np.where(np.abs(length - 1) < 1e-6, 1.0, length)
    return (values / length).astype(np.float32)

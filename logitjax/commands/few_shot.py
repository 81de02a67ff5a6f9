"""Train heads on a few labelled pictures of each class, and compare them.

    logitjax few-shot --data=folder:PICTURES --encoder=hf:openai/clip-vit-base-patch32 \\
        --prompts='a photo of a {}.' --shots=1,4,16 --out=runs/birds
    logitjax few-shot --features=train.npz,train_moco.npz --test_features=test.npz,test_moco.npz \\
        --class_weights=text.npz --method=gda --method=amu --shots=4 --out=runs/mine

The pictures come from a folder with a folder for each class (or with folders `train` and `test` of
such), from tfds, or already encoded: a directory that `logitjax extract-features` filled, or an
.npz or .safetensors file with `features` [n, features] and `labels` [n], which any torch program
can write. Methods that read a second encoder take it from `--auxiliary`, or from a second file.
With `--views=random:10` methods learn from ten random crops of each picture.

Classes are named by `--prompts` through the encoder's text tower, or by `--class_weights`: an .npy
file, or .npz or .safetensors with `class_weights` [features, classes] and perhaps `scale`.

Every method tries equally many settings and chooses on validation pictures of its own sample
(`--validation=min4|shots`; with `none` it keeps its published setting). It is tested on the test
pictures, or on those that a sample leaves. OUT/report.md has accuracies by method and shots,
OUT/confusion.png shows which classes the best method confuses, and OUT/heads/METHOD is the head of
the first sample at the most shots:

    head = few_shot.load("OUT/heads/gda")
    head.predict(features)

You may kill the run at any time: the same command continues without training anything twice. See
docs/few_shot.md.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging
from etils import epath

from logitjax import data, few_shot, processes, storage, vision
from logitjax.commands import figures
from logitjax.commands.cli import field
from logitjax.commands.extract_features import slug
from logitjax.commands.tables import markdown_table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The pictures or features, the methods, and the protocol."""

    data: str | None = field(None, "Pictures: folder:DIR, tfds:NAME, recognition:NAME or stamps.")
    split: str | None = field(
        None, "Split to learn from. By default train if there is one, else all."
    )
    test_split: str | None = field(
        None, "Split to test on. By default test if there is one, else what a sample leaves."
    )
    encoder: str | None = field(None, "Encoder that also names the classes, by name or path.")
    auxiliary: str | None = field(None, "Second encoder, by name or path.")
    tokenizer: str | None = field(None, "Tokenizer of an encoder that brings none.")
    prompts: tuple[str, ...] = field(
        ("a photo of a {}.",), "Text of a class, with {} for its name."
    )
    fit: Literal["crop", "pad"] = field("crop", "How pictures become square: cropped, or padded.")
    rows: str = field("all", "Pictures to learn from: all, a number, or per_class:N.")
    views: str = field("plain", "Views of the pictures to learn from: plain or random:COUNT.")
    batch_size: int = field(16, "Number of pictures encoded at once.", minimum=1)
    features: str | None = field(
        None, "File of encoded pictures, and after a comma the file of the second encoder."
    )
    test_features: str | None = field(None, "Files of the encoded pictures to test on, likewise.")
    class_weights: str | None = field(None, "File of the zero-shot classifier's weights.")
    scale: float | None = field(
        None, "Scale of the classifier's cosines. By default the file's, or CLIP's 100."
    )
    method: tuple[str, ...] = field(("all",), "Method, or all that the features allow.")
    shots: tuple[int, ...] = field(
        (1, 2, 4, 8, 16), "Number of pictures of each class to learn from."
    )
    samples: int = field(3, "Number of samples for each number of shots.", minimum=1)
    validation: Literal["min4", "shots", "none"] = field(
        "min4",
        "Pictures of each class to choose settings on: as many as shots but at most 4 (min4), as "
        "many as shots, or none.",
    )
    grid: Literal["small", "full"] = field("small", "Whether a method tries 4 settings or 12.")
    steps: int = field(
        60, "Number of steps of 32 pictures, for methods without a published recipe.", minimum=1
    )
    seed: int = field(0, "Seed of samples, of orders and of random starts.")

    def __post_init__(self) -> None:
        if (self.data is None) == (self.features is None):
            raise ValueError("data, features: expected one of them")
        if self.data is not None and self.encoder is None:
            raise ValueError("encoder: expected one for the pictures, got none; give --encoder=...")
        if self.features is not None and self.views != "plain":
            raise ValueError(f"views: expected plain for --features, got {self.views!r}")
        if self.features is not None:
            for name in ("split", "test_split", "encoder", "auxiliary", "tokenizer"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: expected none beside --features")
        if self.data is not None and self.test_features is not None:
            raise ValueError("test_features: expected --test_split beside --data")
        if self.test_features is not None and self.test_features == self.features:
            raise ValueError("test_features: expected other pictures than --features")
        if self.test_split is not None and self.test_split == (self.split or "train"):
            raise ValueError(f"test_split: expected another than --split, got {self.test_split!r}")
        if self.features is not None and self.class_weights is None:
            raise ValueError("class_weights: expected a file to go with --features, got none")
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots: expected positive numbers, got {self.shots}")
        candidates = few_shot.Candidate.all()
        for name in self.method:
            if name != "all" and name not in candidates:
                raise ValueError(
                    f"method: expected all or one of {', '.join(candidates)}, got {name!r}"
                )
        for prompt in self.prompts:
            if "{}" not in prompt:
                raise ValueError(f"prompts: expected {{}} where the name goes, got {prompt!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Encoded pictures to sample from and to test on, and digests of what they are made of.

    Without pictures to test on, what a sample leaves is tested.
    """

    config: Config
    pictures: few_shot.Pictures
    test: few_shot.Pictures | None
    made_of: Mapping[str, str | None]

    def sample(self, shots: int, number: int) -> Any:
        return self.pictures.sample(
            shots,
            validation=self.config.validation,
            seed=(self.config.seed, number),
            rest=self.test is None,
        )

    def score(self, candidate: few_shot.Candidate, shots: int) -> dict[str, Any]:
        """Accuracies of every sample at its chosen setting; one program serves all shots."""
        numbers = range(self.config.samples)
        samples = [self.sample(shots, number) for number in numbers]
        # The fewer the shots, the more is left to test on.
        room = dataclasses.replace(
            self.sample(max(self.config.shots), 0), rest=self.sample(1, 0).rest
        )
        task, held_out = self.pictures.stack(samples, room=room, test=self.test)
        scores = few_shot.sweep(
            candidate.method,
            task,
            held_out,
            training=candidate.recipe,
            grid=candidate.grid,
            seed=self.config.seed,
            sequential=True,
        )
        best = np.zeros(len(samples), int)
        if "validation" in scores:
            best = few_shot.best_setting(scores["validation"])
        # One setting a sample, each chosen on its own validation pictures.
        rows = np.arange(len(best))
        record: dict[str, Any] = {"validation": [], "chosen": best.tolist()}
        record |= {part: result["accuracy"][rows, best].tolist() for part, result in scores.items()}
        images, labels = held_out["test"]
        # Rows of padding have the label -1, which no argmax is.
        right = np.asarray(images.zero_shot).argmax(-1) == labels
        record["zero_shot"] = (right.sum(1) / (labels >= 0).sum(1)).tolist()
        record["updates"] = candidate.updates(len(samples[0].train))
        return record

    def head(self, candidate: few_shot.Candidate, setting: int) -> Any:
        """The first sample's at the most shots: `few_shot.fit` on its parts makes the same."""
        sample = self.sample(max(self.config.shots), 0)
        chosen = candidate.chosen(setting)
        validation = self.pictures[sample.validation] if len(sample.validation) else None
        return few_shot.fit(chosen, self.pictures[sample.train], validation, seed=self.config.seed)

    def confusion(self, head: Any) -> np.ndarray:
        """`[classes, predicted]` counts of the pictures that `head` did not learn from."""
        test = self.test
        if test is None:
            test = self.pictures[self.sample(max(self.config.shots), 0).rest]
        predicted = head.predict(test.features, test.auxiliary, hidden=test.hidden)
        counts = np.zeros((len(head.class_names),) * 2, np.int64)
        np.add.at(counts, (test.labels, predicted), 1)
        return counts


def run(config: Config, out: epath.Path) -> None:
    """Encodes what is not encoded, trains and tests every method, writes what came of it."""
    problem = _read(config) if config.features else _encode(config, out)
    processes.run_on_first("few-shot heads", lambda: _run(problem, out))


def _run(problem: Problem, out: epath.Path) -> None:
    config, most = problem.config, max(problem.config.shots)
    chosen, left_out = _methods(problem)
    # What is in the folder was made of these pictures.
    manifest = storage.Manifest(out, "few-shot run")
    if manifest.exists():
        manifest.check(problem.made_of)
    else:
        manifest.write(problem.made_of)
    records: dict[str, dict[int, Any]] = {name: {} for name in chosen}
    for name, candidate in chosen.items():
        for shots in sorted(config.shots):
            path = out / "results" / f"{name}_{shots}.json"
            if not path.exists():
                storage.progress.mark(f"training {name}, {shots} shots", log=True)
                record = problem.score(candidate, shots)
                storage.write_atomic(path, json.dumps(record, indent=1) + "\n")
            records[name][shots] = json.loads(path.read_text())
            logging.info("%s, %d shots: %s", name, shots, _cell(records[name][shots]["test"]))
        directory = out / "heads" / name
        if not (directory / "head.json").exists():
            setting = records[name][most]["chosen"][0]
            problem.head(candidate, setting).save(directory)
    # Without validation pictures nothing may choose among methods: the first is shown.
    best = max(chosen, key=lambda name: _mean(records[name][most]["validation"]))
    head = few_shot.load(out / "heads" / best)
    confusion = problem.confusion(head)
    _plot(confusion, head.class_names, out / "confusion.png")
    text = _report(problem, chosen, records, left_out, best, confusion)
    storage.write_atomic(out / "report.md", text)
    print(text)


def _read(config: Config) -> Problem:
    """Encoded pictures from files."""

    def read(spec: str) -> few_shot.Pictures:
        first, _, second = spec.partition(",")
        return few_shot.read_pictures(
            first, second or None, class_weights=config.class_weights, scale=config.scale
        )

    assert config.features is not None
    pictures = read(config.features)
    test = config.test_features
    return Problem(
        config=config,
        pictures=pictures,
        test=None if test is None else read(test),
        made_of={
            "pictures": _digest(config.features.split(",")),
            "test": None if test is None else _digest(test.split(",")),
            "class_weights": _digest([config.class_weights]),
        },
    )


def _digest(places: Sequence[Any]) -> str:
    """Of files, and of the pictures and encoders of caches: features differ by the machine."""
    items: list[Any] = []
    for location in map(epath.Path, places):
        if location.is_dir():
            cache = few_shot.FeatureCache(location)
            items.append((cache.identity, np.asarray(cache.row_numbers)))
        else:
            items.append(location)
    return storage.digest(*items, length=12)


def _encode(config: Config, out: epath.Path) -> Problem:
    """Pictures through the encoders, and classes through the text tower."""
    assert config.data is not None
    assert config.encoder is not None
    specs = [config.encoder, *([config.auxiliary] if config.auxiliary else [])]
    encoders = [
        vision.load_encoder(spec, tokenizer=None if number else config.tokenizer)
        for number, spec in enumerate(specs)
    ]
    split, test_split = _splits(config)
    first = encoders[0]
    scale = config.scale
    if scale is None and config.class_weights is None:
        scale = first.logit_scale  # trained with the text tower
    if first.projection is not None:
        # What comes before it is what ProLIP reads; `read_pictures` makes the features of it.
        encoders[0], specs[0] = first.before_projection(), f"{specs[0]} hidden"

    made_of: dict[str, str | None] = {"pictures": None, "test": None}
    if config.class_weights is not None:
        made_of["class_weights"] = _digest([config.class_weights])

    def encode(
        split: str, chosen: str, kinds: Sequence[str], weights: Any = None
    ) -> few_shot.Pictures:
        images = data.load_image_set(str(config.data), split=split)
        if weights is None:
            weights = _class_weights(config, first, images.class_names)
        rows = images.choose(chosen, seed=config.seed)
        caches: list[list[epath.Path]] = []
        for kind in kinds:
            caches.append([])
            for spec, encoder in zip(specs, encoders):
                views = data.ImageViews.of(encoder, kind, fit=config.fit, seed=config.seed)
                directory = slug(split if kind == "plain" else f"{split} {kind}")
                cache = few_shot.extract_features(
                    encoder,
                    images,
                    out / "features" / slug(spec) / directory,
                    views=views,
                    rows=rows,
                    batch_size=config.batch_size,
                    dtype="float32",
                )
                caches[-1].append(cache.directory)
        processes.barrier(f"features of {split}")
        # Called once for each part, in this order.
        part = "pictures" if made_of["pictures"] is None else "test"
        made_of[part] = _digest([directory for kind in caches for directory in kind])
        plain, *others = caches
        return few_shot.read_pictures(
            *plain,
            class_weights=weights,
            class_names=images.class_names,
            scale=scale,
            projection=first.projection,
            views=others[0] if others else (),
        )

    # What can be refused is refused before hours of encoding.
    _check_pictures(config, first, split, test_split)
    pictures = encode(split, config.rows, list(dict.fromkeys(("plain", config.views))))
    test = None
    if test_split is not None:
        test = encode(test_split, "all", ("plain",), pictures.class_weights)
    return Problem(config=config, pictures=pictures, test=test, made_of=made_of)


def _check_pictures(
    config: Config, encoder: vision.Encoder, split: str, test_split: str | None
) -> None:
    """Refuses methods and pictures that no head can be trained with."""
    candidates = few_shot.Candidate.all(config.grid, steps=config.steps)
    for name in config.method:
        if (
            name != "all"
            and "auxiliary" in candidates[name].method.needs
            and config.auxiliary is None
        ):
            raise ValueError(f"method: expected auxiliary, which {name} needs, got none")
    data.ImageViews.of(encoder, config.views, fit=config.fit, seed=config.seed)
    images = data.load_image_set(str(config.data), split=split)
    if test_split is not None:
        others = data.load_image_set(str(config.data), split=test_split)
        if others.class_names != images.class_names:
            raise ValueError(f"test_split: expected the classes of {split}, got others")
    counts = np.bincount(
        images.labels[images.choose(config.rows, seed=config.seed)],
        minlength=len(images.class_names),
    )
    # A picture to learn from, and one for each of the parts that a sample is split into.
    least = 1 + (config.validation != "none") + (test_split is None)
    if counts.min() < least:
        scarce = images.class_names[int(counts.argmin())]
        raise ValueError(
            f"data: expected at least {least} pictures of each class, got {counts.min()} of "
            f"{scarce!r}"
        )


def _splits(config: Config) -> tuple[str, str | None]:
    """Which to learn from, and which to test on if any."""
    kind, _, location = str(config.data).partition(":")
    parted = kind in ("tfds", "recognition", "synthetic")
    if kind == "folder":
        root = epath.Path(location).expanduser()
        parted = (root / "train").is_dir() and (root / "test").is_dir()
    split = config.split or ("train" if parted else "all")
    # Of a source that is read from elsewhere nobody knows which splits it has.
    present = config.split is None or (kind == "folder" and split.partition("[")[0] == "train")
    return split, config.test_split or ("test" if parted and present else None)


def _class_weights(config: Config, encoder: vision.Encoder, class_names: Sequence[str]) -> Any:
    if config.class_weights is not None:
        return config.class_weights
    if not encoder.has_text:
        raise ValueError(
            f"class_weights: expected a file, for {encoder.name} has no text tower to name "
            "classes with, got none"
        )
    words = [name.replace("_", " ") for name in class_names]  # folders spell spaces so
    return np.asarray(encoder.zero_shot(words, config.prompts))


def _methods(problem: Problem) -> tuple[dict[str, few_shot.Candidate], dict[str, str]]:
    """The methods that were asked for, and of all of them those that cannot be, with a reason."""
    config, pictures = problem.config, problem.pictures
    chosen, left_out = {}, {}
    for name, candidate in few_shot.Candidate.all(config.grid, steps=config.steps).items():
        if name not in config.method and "all" not in config.method:
            continue
        sides = [pictures] if problem.test is None else [pictures, problem.test]
        missing = [
            part
            for part in candidate.method.needs
            if any(getattr(side, part) is None for side in sides)
        ]
        learnt = problem.sample(max(config.shots), 0).train
        # Its covariance is of differences within a class, and one picture has none.
        if name == "gda" and len(learnt) == len(pictures.class_names) and not pictures.views:
            missing = ["a second picture of a class"]
        if candidate.method.stops and config.validation == "none":
            missing = ["validation pictures"]
        if not missing:
            grid = None if config.validation == "none" else candidate.grid
            candidate = dataclasses.replace(candidate, grid=grid)
            chosen[name] = candidate.at_scale(pictures.scale)
        elif name in config.method:
            raise ValueError(f"method: expected {missing[0]}, which {name} needs, got none")
        else:
            left_out[name] = missing[0]
    return chosen, left_out


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _cell(values: Sequence[float]) -> str:
    return f"{100 * _mean(values):.1f} +- {100 * float(np.std(values)):.1f}"


def _report(
    problem: Problem,
    chosen: Mapping[str, few_shot.Candidate],
    records: Mapping[str, Mapping[int, Any]],
    left_out: Mapping[str, str],
    best: str,
    confusion: np.ndarray,
) -> str:
    config, most = problem.config, max(problem.config.shots)
    names = problem.pictures.class_names

    def row(name: str, part: str, by_shots: Mapping[int, Any]) -> dict[str, Any]:
        cells = {f"{n} a class": _cell(record[part]) for n, record in by_shots.items()}
        return {"method": name, **cells}

    rows = [row("zero-shot", "zero_shot", records[best])]
    for name, by_shots in records.items():
        cost = {"settings": chosen[name].settings, f"updates at {most}": by_shots[most]["updates"]}
        rows.append(row(name, "test", by_shots) | cost)
    # The diagonal is what is right.
    wrong = confusion * (1 - np.eye(len(confusion), dtype=int))
    pairs = sorted(np.argwhere(wrong), key=lambda at: -wrong[tuple(at)])[:10]
    taken = [
        {"class": names[i], "taken for": names[j], "pictures": int(wrong[i, j])} for i, j in pairs
    ]
    by = f"the best on validation pictures at {most} shots"
    if config.validation == "none":
        by = "the first, as nothing was held out to choose among them"
    tested = f"{len(problem.test)} other pictures" if problem.test else "what a sample leaves"
    parts = [
        "# Few-shot heads",
        f"{len(problem.pictures)} pictures of {len(names)} classes; accuracy (%) on {tested}, mean "
        f"+- standard deviation of {config.samples} samples; settings chosen on pictures of each "
        f"sample, `{config.validation}`.",
        markdown_table(rows),
        f'`{best}` is {by}; `few_shot.load("heads/{best}")` loads it. It classifies '
        f"{int(np.trace(confusion))} of {int(confusion.sum())} pictures right. Its confusions:",
        markdown_table(taken) if taken else "None.",
        "![confusion](confusion.png)",
    ]
    if left_out:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in left_out.items())
        parts.append(f"Methods that were left out, and what they need: {reasons}.")
    return "\n\n".join(parts) + "\n"


def _plot(confusion: np.ndarray, names: Sequence[str], path: epath.Path) -> None:
    # A class without test pictures has a row of zeros, not of nans.
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figures.draw_matrix(path, shares, names, x="predicted class", y="pictures of a class")

"""Train classifiers on a few labelled pictures per class, and compare them.

    logitjax few-shot --data=folder:PICTURES --encoder=hf:openai/clip-vit-base-patch32 \\
        --prompts='a photo of a {}.' --shots=1,4,16 --out=runs/birds
    logitjax few-shot --features=train.npz,train_moco.npz --test_features=test.npz,test_moco.npz \\
        --class_weights=text.npz --method=gda --method=amu --shots=4 --out=runs/mine

The pictures come from a folder with a subfolder for each class (or with folders `train` and `test`
that have them), from tfds, or already encoded: a directory written by `logitjax extract-features`,
or an .npz or .safetensors file with `features` [n, features] and `labels` [n], which any torch
program can write. Some methods need a second encoder, given by `--auxiliary` or by a second
file. With `--views=random:10` methods learn from ten random crops of each picture.

The encoder's text tower encodes the class names in `--prompts`; or give `--class_weights`, an
.npy file, or .npz or .safetensors with `class_weights` [features, classes] and optionally `scale`.

Every method tries the same number of settings and chooses on validation pictures of its own sample
(`--validation=min4|shots`; with `none` it keeps its published setting). It is tested on the test
pictures or, without any, on those outside the sample. OUT/heads/METHOD is the head of the first
sample with the most shots. OUT/heads/mixture, the recommended one, adds the probabilities of a few
of them, with the weights that make the labels of the validation pictures likeliest. OUT/report.md
lists accuracies by method and shots, and OUT/mistakes.html shows the mixture's mistakes. Both kinds
of head are for `logitjax classify`:

    head = few_shot.load("OUT/heads/mixture")
    head.predict(features)

You may kill the run at any time: the same command continues without training anything twice. See
docs/few_shot.md.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging
from etils import epath

from logitjax import data, few_shot, processes, storage, vision
from logitjax.commands.cli import field
from logitjax.commands.few_shot_report import MIXTURE, advised, cell, columns, mistakes, report
from logitjax.commands.pictures import Encoders, describe, digest_of

_SPLITS = ("train", "val", "valid", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The pictures or features, the methods, and the protocol."""

    data: str | None = field(None, "Pictures: folder:DIR, tfds:NAME, recognition:NAME or stamps.")
    split: str | None = field(
        None, "Split to learn from. By default train if there is one, else all."
    )
    test_split: str | None = field(
        None, "Split to test on. By default test if there is one, else pictures outside the sample."
    )
    encoder: str | None = field(None, "Encoder that also names the classes, by name or path.")
    auxiliary: str | None = field(None, "Second encoder, by name or path.")
    tokenizer: str | None = field(None, "Tokenizer for an encoder without one.")
    prompts: tuple[str, ...] = field(
        ("a photo of a {}.",), "Prompt for a class, with {} for its name."
    )
    fit: Literal["crop", "pad"] = field("crop", "How to make pictures square: crop or pad.")
    rows: str = field("all", "Pictures to learn from: all, a number, or per_class:N.")
    towers: Literal["frozen", "lora", "norms"] = field(
        "frozen",
        "Train the encoder's towers first, on one sample: adapters as in CLIP-LoRA (lora) or "
        "norms as in 2SFS (norms).",
    )
    views: str = field("plain", "Views of the pictures to learn from: plain or random:COUNT.")
    batch_size: int = field(16, "Number of pictures encoded at once.", minimum=1)
    features: str | None = field(
        None, "File of encoded pictures, and after a comma the file of the second encoder."
    )
    test_features: str | None = field(None, "Files of pictures to test on, in the same form.")
    class_weights: str | None = field(None, "File of the zero-shot classifier's weights.")
    scale: float | None = field(
        None, "Scale of the classifier's cosines. By default the file's, or CLIP's 100."
    )
    method: tuple[str, ...] = field(("all",), "Method, or all that the features allow.")
    shots: tuple[int, ...] = field(
        (1, 2, 4, 8, 16), "Number of pictures of each class to learn from."
    )
    samples: int = field(3, "Number of samples for each number of shots.", minimum=1)
    validation: Literal["min4", "shots", "folds", "none"] = field(
        "min4",
        "Validation pictures per class for choosing settings: as many as shots but at most 4 "
        "(min4), as many as shots, cross-validation (folds), or none. A folder val is used as a "
        "whole instead.",
    )
    grid: Literal["small", "full"] = field("small", "Settings that each method tries: 4 or 12.")
    steps: int = field(
        60, "Number of steps of 32 pictures, for methods without a published recipe.", minimum=1
    )
    seed: int = field(0, "Seed of samples, orders and initial parameters.")

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
                    raise ValueError(f"{name}: expected none with --features")
        if self.data is not None and self.test_features is not None:
            raise ValueError("test_features: expected --test_split with --data")
        if self.test_features is not None and self.test_features == self.features:
            raise ValueError("test_features: expected pictures other than those of --features")
        if self.test_split is not None and self.test_split == (self.split or "train"):
            raise ValueError(f"test_split: expected another than --split, got {self.test_split!r}")
        if self.features is not None and self.class_weights is None:
            raise ValueError("class_weights: expected a file to go with --features, got none")
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"shots: expected positive numbers, got {self.shots}")
        one = self.data is not None and self.samples == 1 and len(self.shots) == 1
        if self.towers != "frozen" and (not one or self.validation in ("folds", "none")):
            raise ValueError(
                f"towers: {self.towers} expects --data, --samples=1, one number of --shots and "
                "validation pictures outside the sample, because the encoder learns from the sample"
            )
        candidates = few_shot.Candidate.all() | self.of_towers
        for name in (name for name in self.method if name != "all"):
            if name not in candidates:
                raise ValueError(
                    f"method: expected all or one of {', '.join(candidates)}, got {name!r}"
                )
            if self.data and not self.auxiliary and "auxiliary" in candidates[name].method.needs:
                raise ValueError(f"method: expected auxiliary, which {name} needs, got none")
        for prompt in self.prompts:
            if "{}" not in prompt:
                raise ValueError(f"prompts: expected {{}} in place of the name, got {prompt!r}")

    @property
    def of_towers(self) -> dict[str, few_shot.Candidate]:
        """The tuned encoder alone, and the second stage of 2SFS."""
        if self.towers == "frozen":
            return {}
        free, probe = few_shot.methods.TipAdapter(beta=0.0), few_shot.methods.CLAP(penalty=0.0)
        second = few_shot.Recipe.published("two_stage", shots=max(self.shots))
        return {
            "towers": few_shot.Candidate(method=free),
            "two_stage": few_shot.Candidate(method=probe, recipe=second),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Encoded pictures to sample from, to choose on and to test on, and their provenance.

    Without pictures to choose or to test on, each sample provides them. `files` contains the
    pictures' paths by part, and `notes` the remarks for the report.
    """

    config: Config
    pictures: few_shot.Pictures
    validation: few_shot.Pictures | None = None
    test: few_shot.Pictures | None = None
    files: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()
    made_of: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    encoder: vision.Encoder | None = None

    def sample(self, shots: int, number: int) -> Any:
        return self.pictures.sample(
            shots,
            validation="none" if self.validation is not None else self.config.validation,
            seed=(self.config.seed, number),
            rest=self.test is None,
        )

    @property
    def first(self) -> Any:
        """The sample whose heads are kept."""
        return self.sample(max(self.config.shots), 0)

    @property
    def tested(self) -> tuple[few_shot.Pictures, Sequence[str]]:
        """The pictures to test these heads on, and their files if there are any."""
        if self.test is not None:
            return self.test, self.files.get("test", ())
        rows, files = self.first.rest, self.files.get("pictures", ())
        return self.pictures[rows], [files[row] for row in rows] if files else ()

    def score(self, candidate: few_shot.Candidate, shots: int, path: epath.Path) -> dict[str, Any]:
        """Score every sample at its chosen setting; one program serves all shots.

        With the most shots, `path` gets the probabilities of the pictures to choose on, if any.
        """
        numbers = range(self.config.samples)
        samples = [self.sample(shots, number) for number in numbers]
        # Fewer shots leave more pictures to test on.
        room = dataclasses.replace(self.first, rest=self.sample(1, 0).rest)
        task, held_out = self.pictures.stack(
            samples, room=room, validation=self.validation, test=self.test
        )
        folds = 0
        if self.config.validation == "folds" and self.validation is None:
            folds = min(candidate.folds(self.pictures.labels[one.train]) for one in samples)
        part = "train" if folds else "calibration"
        scores, best = candidate.sweep(
            task, held_out, part, seed=self.config.seed, sequential=True, folds=folds
        )
        record: dict[str, Any] = {"best": best.tolist()}
        if part in scores and shots == max(self.config.shots):
            # float16 is as precise as an estimate of a probability needs.
            small = {"probabilities": scores[part]["probabilities"].astype(np.float16)}
            small["labels"] = held_out[part][1]
            storage.write_atomic(path, lambda file: np.savez(file, **small))
            record["probabilities"] = path.name
        rows = np.arange(len(best))
        record |= {name: score["accuracy"][rows, best].tolist() for name, score in scores.items()}
        images, labels = held_out["test"]
        # Padding rows have the label -1, which no argmax returns.
        right = np.asarray(images.zero_shot).argmax(-1) == labels
        record["zero_shot"] = (right.sum(1) / (labels >= 0).sum(1)).tolist()
        record["updates"] = candidate.updates(len(samples[0].train))
        return record

    def save_head(self, directory: epath.Path, candidate: Any, **about: Any) -> None:
        """Save the head of the first sample with the most shots, as `few_shot.fit` fits it.

        Several candidates are mixed: `mixture` in `about`, the further entries of ``head.json``,
        has the setting and the weight of each. A head in the directory with these entries stays.
        """
        path = directory / "head.json"
        if path.exists() and about.items() <= storage.read_json(path)["about"].items():
            return
        sample, config = self.first, self.config
        validation = self.pictures[sample.validation] if len(sample.validation) else None
        if self.validation is not None:
            validation = self.validation
        weights = [weight for _, weight in about.get(MIXTURE, {}).values()] or None
        head = few_shot.fit(
            candidate, self.pictures[sample.train], validation, weights=weights, seed=config.seed
        )
        files = self.files.get("pictures", ())
        for name in ("encoder", "auxiliary", "tokenizer", "fit", "prompts", "features"):
            about[name] = getattr(config, name)
        about["pictures"] = [files[row] for row in sample.train] if files else []
        if self.encoder is not None and self.encoder.changes is not None:
            self.encoder.save_changes(directory / "encoder", base=str(config.encoder))
        dataclasses.replace(head, about=about).save(directory)


def run(config: Config, out: epath.Path) -> None:
    """Encode the pictures if necessary, train and test every method, and write the results."""
    problem = _read(config) if config.features else _encode(config, out)
    processes.run_on_first("few-shot heads", lambda: _run(problem, out))


def _run(problem: Problem, out: epath.Path) -> None:
    names, _, merged = columns(problem)
    # Columns that learn from the same pictures are merged.
    problem = dataclasses.replace(
        problem,
        config=dataclasses.replace(problem.config, shots=tuple(names)),
        notes=[*problem.notes, *merged],
    )
    most = max(names)
    chosen, left_out = _methods(problem)
    # Results belong to these pictures.
    storage.Manifest(out, "few-shot run").claim(problem.made_of)
    records: dict[str, dict[int, Any]] = {name: {} for name in chosen}
    judged: dict[str, Any] = {}
    for name, candidate in chosen.items():
        for shots in names:
            path = out / "results" / f"{name}_{shots}.json"
            if not path.exists():
                storage.progress.mark(f"training {name}, {shots} shots", log=True)
            arrays = path.with_suffix(".npz")
            score = functools.partial(problem.score, candidate, shots, arrays)
            records[name][shots] = storage.kept(path, score)
            logging.info("%s, %d shots: %s", name, shots, cell(records[name][shots]["test"]))
            if "probabilities" in records[name][shots]:
                if not arrays.exists():
                    raise ValueError(f"{arrays}: missing; remove {path}, which is made again")
                judged[name] = storage.weights.read_npz(arrays)
        problem.save_head(out / "heads" / name, candidate.at(records[name][most]["best"][0]))
    advice = next(iter(chosen)), "the first, because nothing was held out to choose among them"
    if judged:
        probabilities = {name: arrays["probabilities"] for name, arrays in judged.items()}
        labels = next(iter(judged.values()))["labels"]
        members, *estimate = few_shot.recommend(probabilities, labels)
        advice = MIXTURE, advised(members, *estimate)
        mixed = [chosen[name].at(setting) for name, (setting, _) in members.items()]
        weights = {name: list(pair) for name, pair in members.items()}
        problem.save_head(out / "heads" / MIXTURE, mixed, mixture=weights)
    heads = {n: few_shot.load(out / "heads" / n) for n in dict.fromkeys([*chosen, advice[0]])}
    mistakes(problem, heads[advice[0]], out / "mistakes.html")
    text = report(problem, chosen, records, left_out, heads, advice)
    storage.write_atomic(out / "report.md", text)
    print(text)


def _read(config: Config) -> Problem:
    """Read encoded pictures from files."""

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
            "pictures": digest_of(config.features.split(",")),
            "test": None if test is None else digest_of(test.split(",")),
            "class_weights": digest_of([config.class_weights]),
        },
    )


def _encode(config: Config, out: epath.Path) -> Problem:
    """Encode the pictures, and the classes with the text tower."""
    assert config.encoder is not None
    specs = [config.encoder, *([config.auxiliary] if config.auxiliary else [])]
    encoders = Encoders(specs, config, fit=config.fit)
    # Invalid inputs are refused before hours of encoding.
    parts, notes = _survey(config, encoders.first)
    if config.towers != "frozen":
        notes.append(_tune(config, encoders, parts, out / "encoder"))
    first = encoders.first
    scale = config.scale
    if scale is None and config.class_weights is None:
        # The scale was trained with the text tower.
        scale = first.logit_scale
    names = parts["pictures"][1].class_names
    weights = _class_weights(config, first, names)
    entries: dict[str, few_shot.Pictures] = {}
    made_of: dict[str, str | None] = {"pictures": None, "validation": None, "test": None}
    if config.class_weights is not None:
        made_of["class_weights"] = digest_of([config.class_weights])
    for part, (split, images, rows) in parts.items():
        kinds = dict.fromkeys(("plain", config.views if part == "pictures" else "plain"))
        directories = [
            encoders.encode(images, rows, out, split, kind, config.seed) for kind in kinds
        ]
        made_of[part] = digest_of([directory for kind in directories for directory in kind])
        plain, *others = directories
        entries[part] = few_shot.read_pictures(
            *plain,
            class_weights=weights,
            class_names=names,
            scale=scale,
            projection=first.projection,
            views=others[0] if others else (),
        )
        weights = entries[part].class_weights
    if config.class_weights is None:
        last = first.text_projection
        texts = first.prompt_features(_words(names), config.prompts, projected=last is None)
        entries = {
            part: dataclasses.replace(one, texts=texts, text_projection=last)
            for part, one in entries.items()
        }
    files = {
        part: tuple(str(images.files[row]) for row in rows) if images.files else ()
        for part, (_, images, rows) in parts.items()
    }
    return Problem(
        config=config, **entries, files=files, notes=notes, made_of=made_of, encoder=first
    )


def _tune(config: Config, encoders: Encoders, parts: Mapping[str, Any], out: epath.Path) -> str:
    """Train the towers on the first sample, unless `out` has them; return a note for the report."""
    # Samples depend only on the labels.
    blank: dict[str, Any] = {}
    for part, (_, images, rows) in parts.items():
        ones = np.ones((len(rows), 1)), np.ones((1, len(images.class_names)))
        same: Any = dict(features=ones[0], class_weights=ones[1])
        blank[part] = few_shot.Pictures(labels=images.labels[rows], **same)
    _, images, rows = parts["pictures"]
    chosen = rows[Problem(config=config, **blank).first.train]
    texts = [config.prompts[0].format(name) for name in _words(images.class_names)]
    how: dict[str, Any] = dict(learn=config.towers, shots=config.shots[0], views=config.views)
    encoders.tune(images, chosen, texts, out, seed=config.seed, **how)
    return f"The towers ({config.towers}) learned from the {len(chosen)} pictures of the sample."


def _survey(config: Config, encoder: vision.Encoder) -> tuple[dict[str, Any], list[str]]:
    """The split, pictures and usable rows of each part if heads can be trained, and remarks."""
    data.ImageViews.of(encoder, config.views, fit=config.fit, seed=config.seed)
    parts: dict[str, Any] = {}
    notes: list[str] = []
    seen: dict[str, str] = {}
    splits = _splits(config)
    # A picture in several splits is kept only in the last: none is learned from and tested on.
    for part, split in reversed(splits.items()):
        images = data.load_image_set(str(config.data), split=split)
        rows = images.choose(config.rows if part == "pictures" else "all", seed=config.seed)
        if str(config.data).startswith("folder:"):
            rows, result = images.survey(rows, seen)
            notes += describe(result, split)
        parts[part] = (split, images, rows)
    _, images, rows = parts["pictures"]
    for part, split in splits.items():
        if parts[part][1].class_names != images.class_names:
            raise ValueError(
                f"{part}_split: expected the classes of {splits['pictures']}, got others"
            )
        if not len(parts[part][2]):
            raise ValueError(f"{part}_split: expected pictures in {split}, got none")
    if len(images.class_names) < 2:
        raise ValueError(f"data: expected at least two classes, got only {images.class_names[0]!r}")
    counts = np.bincount(images.labels[rows], minlength=len(images.class_names))
    # A picture to learn from, and one for each part that a sample is split into.
    held_out = config.validation in ("min4", "shots") and "validation" not in splits
    least = 1 + held_out + ("test" not in splits)
    if counts.min() < least:
        scarce = images.class_names[int(counts.argmin())]
        raise ValueError(
            f"data: expected at least {least} pictures of each class, got {counts.min()} of "
            f"{scarce!r}"
        )
    return dict(reversed(parts.items())), notes


def _splits(config: Config) -> dict[str, str]:
    """The split to learn from and, by part, those to choose on and to test on, if any."""
    kind, _, location = str(config.data).partition(":")
    parted, inside = kind in ("tfds", "recognition", "synthetic"), []
    if kind == "folder":
        root = epath.Path(location).expanduser()
        inside = [name for name in _SPLITS if (root / name).is_dir()]
        parted = "train" in inside and len(inside) > 1
    split = config.split or ("train" if parted else "all")
    # If another split was requested, its counterparts are unknown.
    present = config.split is None or (kind == "folder" and split.partition("[")[0] == "train")
    test = config.test_split
    if test is None and parted and present and (kind != "folder" or "test" in inside):
        test = "test"
    splits = {"pictures": split}
    held_out = [name for name in inside if name.startswith("val")]
    if held_out and parted and present and config.validation != "none":
        splits["validation"] = held_out[0]
    return splits | ({} if test is None else {"test": test})


def _class_weights(config: Config, encoder: vision.Encoder, class_names: Sequence[str]) -> Any:
    if config.class_weights is not None:
        return config.class_weights
    if not encoder.has_text:
        raise ValueError(
            f"class_weights: expected a file, because {encoder.name} has no text tower, got none"
        )
    return np.asarray(encoder.zero_shot(_words(class_names), config.prompts))


def _words(class_names: Sequence[str]) -> list[str]:
    # Folder names use underscores for spaces.
    return [name.replace("_", " ") for name in class_names]


def _methods(problem: Problem) -> tuple[dict[str, few_shot.Candidate], dict[str, str]]:
    """The requested methods, and those of `all` that cannot run, with the reason."""
    config, pictures = problem.config, problem.pictures
    chosen, left_out = {}, {}
    existing = few_shot.Candidate.all(config.grid, steps=config.steps) | config.of_towers
    for name, candidate in existing.items():
        if name not in config.method and "all" not in config.method:
            continue
        sides = [pictures] if problem.test is None else [pictures, problem.test]
        missing = [
            part
            for part in candidate.method.needs
            if any(getattr(side, part) is None for side in sides)
        ]
        learnt = problem.sample(max(config.shots), 0).train
        # Its covariance needs differences within a class, which one picture does not give.
        if name == "gda" and len(learnt) == len(pictures.class_names) and not pictures.views:
            missing = ["a second picture of a class"]
        if not missing:
            single = not candidate.folds(pictures.labels[learnt])
            if config.validation == "none" or (config.validation == "folds" and single):
                candidate = dataclasses.replace(candidate, grid=None)
            chosen[name] = candidate.at_scale(pictures.scale)
        elif name in config.method:
            raise ValueError(f"method: expected {missing[0]}, which {name} needs, got none")
        else:
            left_out[name] = missing[0]
    return chosen, left_out

"""Pictures through encoders, warnings about them, and pages that show them."""

import base64
import csv
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from logitjax import data, few_shot, processes, storage, vision
from logitjax.commands.cli import REQUIRED, field
from logitjax.commands.extract_features import slug

# Maximum number of pictures on a page; the table next to it has all.
SHOWN = 400
_STYLE = (
    "body{font:15px sans-serif}figure{display:inline-block;vertical-align:top;width:210px;"
    "margin:6px;border:1px solid #ccc;overflow-wrap:anywhere}img{max-width:100%}"
    "figure figure{width:60px;border:0;margin:2px;font-size:10px}"
)
_REASONS = {
    "unreadable": "skipped because they cannot be read",
    "repeated": "only the first of each is kept because their pixels are equal",
    "contradictory": "skipped because equal pixels occur in several classes",
    "elsewhere": "skipped because they equal other pictures of this run",
    "turned": "rotated by their EXIF tag",
    "transparent": "placed on a white background because they are transparent",
}
Card = tuple[str, Sequence[str], Sequence[tuple[str, str]]]
"""A picture's file, the lines below it, and files of small pictures with a line each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder:
    """Pictures that a command reads with one encoder."""

    pictures: str = field(REQUIRED, "Folder of the pictures.")
    tokenizer: str | None = field(None, "Tokenizer for an encoder without one.")
    batch_size: int = field(16, "Number of pictures encoded at once.", minimum=1)


class Encoders:
    """One or two encoders, and how pictures pass through them.

    If a first encoder ends in a projection, the features before it are stored; the others are
    computed from them with the projection.
    """

    def __init__(
        self, specs: Sequence[str], reading: Any, *, base: str | None = None, fit: str = "crop"
    ):
        self.specs, self._fit, self._batch_size = specs, fit, reading.batch_size
        self._loaded = [vision.load_encoder(specs[0], tokenizer=reading.tokenizer, base=base)]
        self._loaded += map(vision.load_encoder, specs[1:])
        self.first = self._loaded[0]

    def tune(
        self,
        images: data.ImageSet,
        rows: np.ndarray,
        texts: Sequence[str],
        out: epath.Path,
        *,
        learn: Any,
        shots: int,
        views: str,
        seed: int,
    ) -> None:
        """Train the first encoder's towers on these pictures, unless `out` has them; use those."""
        made_of: dict[str, Any] = dict(towers=learn, shots=shots, views=views, seed=seed)
        made_of |= dict(encoder=self.first.fingerprint, fit=self._fit, texts=list(texts))
        made_of["pictures"] = storage.digest(images.fingerprint, rows, length=12)
        kind = {"lora": "clip_lora", "norms": "two_stage_norms"}[learn]
        manifest = storage.Manifest(out, "tuned towers")
        with processes.first_before_others("tuned towers"):
            if manifest.exists():
                manifest.check(made_of)
            else:
                shown = data.ImageViews.of(self.first, views, fit=self._fit, seed=seed)
                seen = [shown(images[row][0], row=row) for row in rows.tolist()]
                pixels = np.stack(seen, 1).reshape(-1, *seen[0].shape[1:])
                learned = (self.first, pixels, images.labels[rows], self.first.tokenize(texts))
                recipe = few_shot.Recipe.published(kind, shots=shots)
                encoder = few_shot.tune_towers(*learned, learn=learn, recipe=recipe, seed=seed)
                encoder.save_changes(out, base=self.specs[0])
                manifest.write(made_of)
        encoder = vision.load_encoder(str(out), base=self.specs[0])
        encoder.tokenizer = self.first.tokenizer
        self.first = self._loaded[0] = encoder
        self.specs = [f"{self.specs[0]} tuned", *self.specs[1:]]

    def encode(
        self, images: data.ImageSet, rows: Any, out: epath.Path, name: str, *views: Any
    ) -> list[epath.Path]:
        """Encode, and return each encoder's directory of features; `views` are kind and seed."""
        kind, seed = views or ("plain", 0)
        directories = []
        for spec, encoder in zip(self.specs, self._loaded):
            if encoder is self.first and encoder.projection is not None:
                spec, encoder = f"{spec} hidden", encoder.before_projection()
            cache = few_shot.extract_features(
                encoder,
                images,
                out / "features" / slug(spec) / slug(name if kind == "plain" else f"{name} {kind}"),
                views=data.ImageViews.of(encoder, kind, fit=self._fit, seed=seed),
                rows=rows,
                batch_size=self._batch_size,
                dtype="float32",
            )
            directories.append(cache.directory)
        processes.barrier(f"features of {name}")
        return directories

    def encode_folder(
        self, directory: str, out: epath.Path, **classifier: Any
    ) -> tuple[few_shot.Pictures, list[str]]:
        """Encode all pictures below a folder, and list their files; warn of unreadable ones."""
        images = data.load_image_set(f"pictures:{directory}")
        rows, notes = images.survey(np.arange(len(images)), {})
        describe(notes, directory)
        if not len(rows):
            raise ValueError(f"pictures: expected a readable one in {directory}, got none")
        # Other pictures get their own folder of features.
        caches = self.encode(images, rows, out, f"pictures {images.fingerprint[:12]}")
        classifier = {"projection": self.first.projection, **classifier}
        files = [str((images.files or ())[row]) for row in rows]
        return few_shot.read_pictures(*caches, **classifier), files


def describe(notes: Mapping[str, Sequence[str]], where: str) -> list[str]:
    """Warn of each reason with all its files, and return the same lines for a report."""
    lines = [
        f"{where}, {len(files)} {_REASONS[reason]}: {'; '.join(files)}"
        for reason, files in notes.items()
    ]
    for line in lines:
        logging.warning("%s", line)
    return lines


def cards_of(
    head: Any, pictures: few_shot.Pictures, files: Sequence[str], order: np.ndarray, labelled: bool
) -> list[Card]:
    """Cards of pictures in this order with their classes and the nearest labelled pictures."""
    rows = order[:SHOWN]
    if not len(rows):
        return []
    names, examples = head.class_names, head.about.get("pictures") or ()
    probabilities = head.predict_proba(**head.inputs(pictures[rows]))
    near: Any = [()] * len(rows)
    if examples:
        near = zip(*map(np.ndarray.tolist, head.nearest(pictures.features[rows])))
    cards = []
    for row, each, nearest in zip(rows.tolist(), probabilities, near):
        lines = [f"{names[each.argmax()]}, {100 * each.max():.0f} %"]
        lines += [f"labelled {names[pictures.labels[row]]}"] if labelled else []
        small = [
            (examples[i], f"{names[head.example_labels[i]]} {cosine:.2f}")
            for i, cosine in zip(*nearest)
        ]
        cards.append((files[row], lines, small))
    return cards


def write_page(path: epath.Path, title: str, text: str, cards: Sequence[Card]) -> None:
    """Write an HTML page in one file."""

    def figure(card: Card, side: int) -> str:
        file, lines, small = card
        below = "".join(figure((name, (line,), ()), 56) for name, line in small)
        lines = "<br>".join(map(html.escape, lines))
        return f"<figure>{_image(file, side)}<figcaption>{lines}</figcaption>{below}</figure>"

    title, text = html.escape(title), html.escape(text)
    head = f'<!doctype html><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    body = "\n".join(figure(card, 208) for card in cards[:SHOWN])
    storage.write_atomic(path, f"{head}<h1>{title}</h1><p>{text}</p>\n{body}\n")


def _image(file: str, side: int) -> str:
    name = html.escape(file)
    try:
        picture = data.read_picture(epath.Path(file))
    except (OSError, ValueError):  # moved or deleted
        return f"<code>{name}</code>"
    # Scaled in place, without changing the proportions.
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{name}" title="{name}" src="data:image/jpeg;base64,{content}">'


def write_csv(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a table for programs, with the first row's keys as columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_atomic(path, text.getvalue())


def write_answers(
    head: Any, pictures: few_shot.Pictures, files: Sequence[str], out: epath.Path, coverage: float
) -> None:
    """Write `predictions.csv` and `index.html`, the most uncertain pictures first in the page."""
    names, inputs = head.class_names, head.inputs(pictures)
    probabilities = head.predict_proba(**inputs)
    order = np.argsort(-probabilities, axis=1, kind="stable")
    sets = np.zeros_like(probabilities, bool)
    if head.calibration is not None:
        sets = head.predict_sets(**inputs, coverage=coverage)
    # Heads have at least two classes.
    (first, second), rows = order[:, :2].T, np.arange(len(files))
    doubtful = np.argsort(probabilities[rows, first] - probabilities[rows, second], kind="stable")
    # Ranks, the most uncertain first.
    location = np.argsort(doubtful) + 1
    write_csv(
        out / "predictions.csv",
        [
            {
                "picture": file,
                "class": names[first[row]],
                "probability": f"{probabilities[row, first[row]]:.4f}",
                "second": names[second[row]],
                "second_probability": f"{probabilities[row, second[row]]:.4f}",
                "set": "|".join(names[k] for k in order[row] if sets[row, k]),
                "label_next": location[row],
            }
            for row, file in enumerate(files)
        ],
    )
    text = f"{len(files)} pictures; those whose labels would help most come first."
    cards = cards_of(head, pictures, files, doubtful, labelled=False)
    write_page(out / "index.html", "Pictures and their classes", text, cards)
    counts = np.bincount(first, minlength=len(names)).tolist()
    notes = ", ".join(f"{count} {name}" for name, count in zip(names, counts) if count)
    print(f"{len(files)} pictures: {notes}; {out / 'predictions.csv'}, {out / 'index.html'}")


def digest_of(places: Sequence[Any]) -> str:
    """Fingerprint of files, or of the pictures and encoders of caches: features vary by machine."""
    items: list[Any] = []
    for location in map(epath.Path, places):
        if location.is_dir():
            cache = few_shot.FeatureCache(location)
            items.append((cache.identity, np.asarray(cache.row_numbers)))
        else:
            items.append(location)
    return storage.digest(*items, length=12)

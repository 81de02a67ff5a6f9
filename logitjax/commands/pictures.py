"""Pictures through encoders, what is to be said of them, and pages that show them."""

import base64
import csv
import dataclasses
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from logitjax import data, few_shot, processes, storage, vision
from logitjax.commands.extract_features import slug

# What a page shows at most; the table beside it has all.
_SHOWN = 400
_STYLE = """body{font:15px sans-serif;margin:2em}figure{display:inline-block;vertical-align:top;
width:220px;margin:6px;padding:6px;border:1px solid #ccc}img{max-width:100%}
figure figure{width:56px;border:0;margin:1px;padding:0;font-size:10px}
figcaption{overflow-wrap:anywhere}"""
_REASONS = {
    "unreadable": "left out, as they cannot be read",
    "repeated": "only the first of each is kept, as the pixels are equal",
    "contradictory": "left out, as equal pixels lie in several classes",
    "elsewhere": "left out, as other pictures of this run are equal",
    "turned": "turned upright, as their EXIF asks",
    "transparent": "laid on white, as they are transparent",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoders:
    """One or two encoders by their names, and how pictures go through them.

    Of a first encoder with a projection at its end, features from before it are kept: the
    projection makes the others of them.
    """

    specs: tuple[str, ...]
    tokenizer: str | None = None
    fit: str = "crop"
    batch_size: int = 16

    def __post_init__(self) -> None:
        loaded = [
            vision.load_encoder(spec, tokenizer=None if number else self.tokenizer)
            for number, spec in enumerate(self.specs)
        ]
        object.__setattr__(self, "loaded", loaded)  # the class is frozen

    @property
    def first(self) -> vision.Encoder:
        return self.loaded[0]  # type: ignore[attr-defined]

    def encode(
        self,
        images: data.ImageSet,
        rows: np.ndarray,
        out: epath.Path,
        *,
        name: str,
        views: str = "plain",
        seed: int = 0,
    ) -> list[epath.Path]:
        """Directories of the features by each encoder, below `out`."""
        directories = []
        for spec, encoder in zip(self.specs, self.loaded):  # type: ignore[attr-defined]
            if not directories and encoder.projection is not None:
                spec, encoder = f"{spec} hidden", encoder.before_projection()
            cache = few_shot.extract_features(
                encoder,
                images,
                out / slug(spec) / slug(name if views == "plain" else f"{name} {views}"),
                views=data.ImageViews.of(encoder, views, fit=self.fit, seed=seed),
                rows=rows,
                batch_size=self.batch_size,
                dtype="float32",
            )
            directories.append(cache.directory)
        processes.barrier(f"features of {name}")
        return directories

    def encode_folder(
        self, directory: str, out: epath.Path, **more: Any
    ) -> tuple[few_shot.Pictures, list[str]]:
        """Pictures anywhere below a folder, and their files; those that cannot be are said."""
        images = data.load_image_set(f"pictures:{directory}")
        rows, notes = images.survey(np.arange(len(images)))
        warn(notes, directory)
        if not len(rows):
            raise ValueError(f"pictures: expected a picture in {directory} that can be read")
        # Other pictures in the same folder have features of their own.
        name = f"pictures {images.fingerprint[:12]}"
        caches = self.encode(images, rows, out / "features", name=name)
        more = {"projection": self.first.projection, **more}
        pictures = few_shot.read_pictures(*caches, **more)
        return pictures, [str((images.files or ())[row]) for row in rows]


def warn(notes: Mapping[str, Sequence[str]], where: str) -> None:
    """One warning a reason, with all of its files."""
    for reason, files in notes.items():
        logging.warning("%s: %d %s: %s", where, len(files), _REASONS[reason], "; ".join(files))


def described(notes: Mapping[str, Sequence[str]], where: str) -> list[str]:
    """The same as items of Markdown."""
    return [
        f"- {where}, {len(files)} {_REASONS[reason]}: {'; '.join(files)}"
        for reason, files in notes.items()
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """A picture on a page, the lines below it, and small pictures with a line each."""

    picture: str
    lines: Sequence[str]
    small: Sequence[tuple[str, str]] = ()


def picture_cards(
    head: Any,
    pictures: few_shot.Pictures,
    files: Sequence[str],
    probabilities: np.ndarray,
    rows: np.ndarray,
    *,
    labelled: bool = True,
) -> list[Card]:
    """Pictures of these rows with their classes, and the labelled ones that are nearest."""
    rows = rows[:_SHOWN]
    if not len(rows):
        return []
    order, cosines = head.nearest(pictures.features[rows])
    names, examples = head.class_names, head.about.get("pictures") or ()
    cards = []
    for row, near, how in zip(rows.tolist(), order.tolist(), cosines):
        best = int(probabilities[row].argmax())
        lines = [f"{names[best]}, {100 * probabilities[row, best]:.0f} %"]
        lines += [f"labelled {names[pictures.labels[row]]}"] if labelled else []
        small = [
            (examples[i] if examples else "", f"{names[head.example_labels[i]]} {cosine:.2f}")
            for i, cosine in zip(near, how)
        ]
        cards.append(Card(picture=files[row], lines=lines, small=small))
    return cards


def write_page(path: epath.Path, title: str, text: str, cards: Iterable[Card]) -> None:
    """An HTML page of its own, without other files."""
    shown = list(cards)[:_SHOWN]

    def figure(card: Card, side: int) -> str:
        small = "".join(figure(Card(picture=p, lines=(line,)), 56) for p, line in card.small)
        lines = "<br>".join(map(html.escape, card.lines))
        below = f"<figcaption>{lines}</figcaption>{small}"
        return f"<figure>{_image(card.picture, side)}{below}</figure>"

    body = "\n".join(figure(card, 208) for card in shown)
    head = f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title>'
    whole = f"{head}<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>"
    storage.write_atomic(path, f"{whole}\n{body}\n")


def _image(file: str, side: int) -> str:
    name = html.escape(file)
    try:
        picture = data.read_picture(epath.Path(file))
    except (OSError, ValueError):  # moved since
        return f"<code>{name}</code>"
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{name}" title="{name}" src="data:image/jpeg;base64,{content}">'


def write_csv(path: epath.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for programs; its columns are the first row's keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_atomic(path, text.getvalue())

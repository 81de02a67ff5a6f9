"""Training, validation and test rows of one source, packed for several models at once."""

import dataclasses
import itertools
import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from absl import logging
from etils import epath

from logitjax.data._examples import Examples
from logitjax.data._files import SUFFIXES, held_out_splits
from logitjax.data._hub import hub_splits
from logitjax.data._load import load_examples
from logitjax.data._mixture import mixed, parts_of
from logitjax.data._pack import pack
from logitjax.data._packed import PackedDataset
from logitjax.data._tokenizer import TokenizerLike

SPLITS = ("train", "validation", "test")


def load_splits(spec: str, *, on_error: Literal["raise", "skip"] = "raise") -> dict[str, Examples]:
    """Load training, validation and test examples of a source, by the names in `SPLITS`.

    For each of validation and test that is missing in the source, a tenth of the text is held out
    from the end of the training examples, the test examples last. tfds datasets must have all
    three.

    Args:
        spec: As for `load_examples`, without a split.
        on_error: As for `load_examples`.

    Raises:
        ValueError: There are too few documents to hold any out.
    """
    kind, _, location = spec.partition(":")
    if kind == "mix":
        parts = [load_splits(part, on_error=on_error) for part, _ in parts_of(spec)]
        return {s: mixed(spec, [part[s] for part in parts]) for s in SPLITS}
    local = set(SPLITS[1:]) if kind == "tfds" else held_out_splits(location, SUFFIXES.get(kind, ()))
    if kind == "hf":
        local = hub_splits(location, spec) & set(SPLITS[1:])
    loaded = {s: load_examples(spec, split=s, on_error=on_error) for s in ("train", *sorted(local))}
    missing = [s for s in SPLITS if s not in loaded]
    if missing:
        loaded |= _cut(loaded["train"], ("train", *missing), spec)
    return {s: loaded[s] for s in SPLITS}


def _cut(examples: Examples, names: tuple[str, ...], spec: str) -> dict[str, Examples]:
    """Give each name but the first a tenth of the text from the end, and the first the rest."""
    if len(examples) < len(names):
        # A text file is cut into documents between paragraphs, see `load_examples`.
        hint = "; give a longer text" if spec.startswith("text:") else ""
        raise ValueError(
            f"data: expected at least {len(names)} documents in {spec}, to hold some out, got "
            f"{len(examples)}{hint}"
        )
    # By characters: rows differ in length, and the number of tokens depends on the models.
    sizes = np.cumsum(np.fromiter(itertools.chain([0], (len(str(r)) for r in examples)), np.int64))
    stops = [len(examples)]
    for location in reversed(range(1, len(names))):
        start = sizes[-1] * (1 - 0.1 * (len(names) - location))
        nearest = int(np.abs(sizes - start).argmin())
        # Every split keeps at least one document.
        stops.insert(0, min(max(nearest, location), stops[0] - 1))
    return {
        name: examples[start:stop]
        for name, start, stop in zip(names, [0, *stops], stops, strict=False)
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSplits:
    """Packed rows of each split.

    Attributes:
        splits: Rows by the names in `SPLITS`.
        names: Columns of a batch that each model reads; models with the same tokenizer share them.
        tokenizers: Tokenizers by these columns.
        chat: Whether rows have conversations, rendered by each model's own template.
    """

    splits: Mapping[str, PackedDataset]
    names: Mapping[str, str]
    tokenizers: Mapping[str, Any]
    chat: bool

    def columns(self, batch: Mapping[str, Any], model: str) -> Mapping[str, Any]:
        """Return the part of a batch that a model reads."""
        return batch[self.names[model]]


def pack_splits(
    spec: str,
    tokenizers: Mapping[str, TokenizerLike],
    *,
    seq_len: int,
    directory: str | os.PathLike[str],
    on_error: Literal["raise", "skip"] = "raise",
) -> PackedSplits:
    """Pack every split once for all models; models with the same tokenizer share its columns.

    Conversations are encoded with each tokenizer's own chat template; those that do not fit into a
    row cannot be cut and are left out. All processes must call this; process 0 packs.

    Args:
        spec: As for `load_examples`, without a split.
        tokenizers: Tokenizers by model name.
        directory: Folder for the rows, with a subfolder per split; may be remote.
        on_error: As for `load_examples` and `pack`.

    Raises:
        ValueError: Conversations with a tokenizer without a chat template; or a mix of
            conversations and other text with several tokenizers.
    """
    # Imported late, since reading files needs neither jax nor a model.
    from logitjax import processes

    by_fingerprint: dict[str, str] = {}
    names = {m: by_fingerprint.setdefault(t.fingerprint, m) for m, t in tokenizers.items()}
    distinct = {name: tokenizers[name] for name in dict.fromkeys(names.values())}
    splits = {}
    with processes.first_before_others("load"):
        loaded = load_splits(spec, on_error=on_error)
    chat, plain = _forms(loaded, skip=on_error == "skip")
    bare = [n for n, t in distinct.items() if getattr(t, "chat_template", None) is None]
    if chat and bare:
        raise ValueError(
            f"tokenizers: {bare[0]!r} has no chat template for conversations, such as {chat}; rows "
            f"of a prompt and a response need none"
        )
    if chat and plain and len(distinct) > 1:
        # Rows are aligned either by turns or by documents.
        raise ValueError(
            f"data: expected rows of one form for models of several tokenizers, got {chat} with "
            f"'messages' and {plain} without"
        )
    for split, examples in loaded.items():
        with processes.first_before_others(f"pack {split}"):
            splits[split] = pack(
                examples,
                distinct,
                seq_len=seq_len,
                directory=epath.Path(directory) / split,
                on_long="split" if not chat else "split_or_skip" if plain else "skip",
                on_error=on_error,
            )
        malformed = splits[split].statistics.get("malformed", 0)
        logging.info(
            "%s: %d documents in %d rows of %d tokens%s",
            split,
            len(examples),
            len(splits[split]),
            seq_len,
            f", {malformed} malformed rows skipped" if malformed else "",
        )
    return PackedSplits(splits=splits, names=names, tokenizers=distinct, chat=chat is not None)


def _forms(loaded: Mapping[str, Examples], *, skip: bool) -> tuple[str | None, str | None]:
    """Find the first conversation and the first other row of all splits, for errors."""
    entries: dict[bool, str] = {}
    for split, examples in loaded.items():
        for number in range(len(examples)):
            try:
                row = examples[number]
            except ValueError:
                if skip:
                    continue
                raise
            entries.setdefault("messages" in row, f"{split} row {row.get('id', number)!r}")
            # Rows of a dataset have one form, and reading them all would take as long as packing.
            if examples.source.startswith("tfds:") or len(entries) == 2:
                break
    return entries.get(True), entries.get(False)

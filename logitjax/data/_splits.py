"""Training, validation and test rows of one source, packed for several models at once."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from absl import logging
from etils import epath

from logitjax.data._examples import Examples
from logitjax.data._load import load_examples
from logitjax.data._pack import pack
from logitjax.data._packed import PackedDataset
from logitjax.data._tokenizer import TokenizerLike

SPLITS = ("train", "validation", "test")


def load_splits(spec: str, *, on_error: Literal["raise", "skip"] = "raise") -> dict[str, Examples]:
    """Training, validation and test examples of a source.

    The source's own splits where it has them; else the last two tenths are held out.

    Args:
        spec: As for `load_examples`, without a split.
        on_error: What a malformed row does, as for `load_examples`.

    Returns:
        The examples by the names in `SPLITS`.

    Raises:
        ValueError: There are too few documents to hold some out.
    """
    if spec.startswith("tfds:") or _has_splits(spec):
        return {s: load_examples(spec, split=s, on_error=on_error) for s in SPLITS}
    examples = load_examples(spec, on_error=on_error)
    held = max(1, len(examples) // 10)
    if len(examples) < 3:
        # A text file is cut into documents between paragraphs, see `load_examples`.
        hint = "; give a longer text" if spec.startswith("text:") else ""
        raise ValueError(
            f"data: expected at least 3 documents in {spec}, to hold some out, got "
            f"{len(examples)}{hint}"
        )
    cuts = (0, len(examples) - 2 * held, len(examples) - held, len(examples))
    return {s: examples[cuts[i] : cuts[i + 1]] for i, s in enumerate(SPLITS)}


def _has_splits(spec: str) -> bool:
    root = epath.Path(spec.partition(":")[2]).expanduser()
    if not root.is_dir():
        return False
    names = {path.name.partition(".")[0] for path in root.iterdir()}
    return {"validation", "test"} <= names


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSplits:
    """The packed rows of each split.

    Attributes:
        splits: By the names in `SPLITS`.
        names: Which columns of a batch each model reads; models of one tokenizer share them.
        tokenizers: By those columns.
        chat: Whether the rows are conversations, each model's under its own template.
    """

    splits: Mapping[str, PackedDataset]
    names: Mapping[str, str]
    tokenizers: Mapping[str, Any]
    chat: bool

    def columns(self, batch: Mapping[str, Any], model: str) -> Mapping[str, Any]:
        """The part of a batch that a model reads."""
        return batch[self.names[model]]


def pack_splits(
    spec: str,
    tokenizers: Mapping[str, TokenizerLike],
    *,
    seq_len: int,
    directory: str | os.PathLike[str],
    on_error: Literal["raise", "skip"] = "raise",
) -> PackedSplits:
    """Packs every split once for all models; models that share a tokenizer share its columns.

    Conversations are encoded under each tokenizer's own chat template; one that does not fit a row
    cannot be cut and is left out. With several processes all must call; process 0 packs.

    Args:
        spec: As for `load_examples`, without a split.
        tokenizers: A model's name to its tokenizer.
        seq_len: Tokens a row.
        directory: Where the rows go, a folder a split; may be remote.
        on_error: What a malformed row does, as for `load_examples`.

    Returns:
        The `PackedSplits`.

    Raises:
        ValueError: Conversations, and a tokenizer without a chat template.
    """
    # Whoever only reads files needs neither jax nor a model.
    from logitjax import processes

    by_fingerprint: dict[str, str] = {}
    names = {m: by_fingerprint.setdefault(t.fingerprint, m) for m, t in tokenizers.items()}
    distinct = {name: tokenizers[name] for name in dict.fromkeys(names.values())}
    splits = {}
    with processes.first_before_others("load"):
        loaded = load_splits(spec, on_error=on_error)
    chat = "messages" in loaded["train"][0]
    bare = [n for n, t in distinct.items() if getattr(t, "chat_template", None) is None]
    if chat and bare:
        raise ValueError(f"tokenizers: {bare[0]!r} has no chat template for conversations")
    for split, examples in loaded.items():
        with processes.first_before_others(f"pack {split}"):
            splits[split] = pack(
                examples,
                distinct,
                seq_len=seq_len,
                directory=epath.Path(directory) / split,
                on_long="skip" if chat else "split",
            )
        logging.info(
            "%s: %d documents in %d rows of %d tokens%s",
            split,
            len(examples),
            len(splits[split]),
            seq_len,
            f", {examples.errors} malformed rows skipped" if examples.errors else "",
        )
    return PackedSplits(splits=splits, names=names, tokenizers=distinct, chat=chat)

"""Text over a small vocabulary, for small models trained from scratch."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from logitjax import data
from logitjax.models import Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """Rows over a small vocabulary: the most frequent tokens, and one for all others."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    train_mask: np.ndarray
    validation_mask: np.ndarray
    test_mask: np.ndarray
    unigram: np.ndarray
    kept: np.ndarray

    def batch(self, step: int, *, seed: int, size: int) -> dict[str, np.ndarray]:
        """Training rows of a step: a function of seed and step alone."""
        rows = np.random.default_rng([seed, step]).integers(0, len(self.train), size)
        return {"tokens": self.train[rows], "mask": self.train_mask[rows]}

    def blocks(self, split: str, size: int = 16) -> list[dict[str, np.ndarray]]:
        """A held-out split in batches of one size; a rest is left out."""
        tokens, mask = getattr(self, split), getattr(self, f"{split}_mask")
        size = min(size, len(tokens))
        return [
            {"tokens": tokens[i : i + size], "mask": mask[i : i + size]}
            for i in range(0, len(tokens) - size + 1, size)
        ]


def pack_splits(
    spec: str, splits: Sequence[str], tokenizer: Tokenizer, *, seq_len: int, directory: epath.Path
) -> dict[str, data.PackedDataset]:
    """Packs training, validation and test text as the stream `model`.

    Args:
        spec: `text:PATH`, `jsonl:PATH` or `tfds:NAME`.
        splits: The parts of a tfds dataset to train, choose and report on.
    """
    examples: Mapping[str, data.Examples]
    if spec.startswith("tfds:"):
        named = zip(data.SPLITS, splits, strict=True)
        examples = {name: data.load_examples(spec, split=split) for name, split in named}
    else:
        examples = data.load_splits(spec, on_error="raise")
    return {
        name: data.pack(rows, {"model": tokenizer}, seq_len=seq_len, directory=directory / name)
        for name, rows in examples.items()
    }


def small_text(packed: Mapping[str, data.PackedDataset], unigram: np.ndarray, size: int) -> Text:
    """Packed splits with a stream `model`, their tokens renumbered.

    Args:
        packed: `train`, `validation` and `test`.
        unigram: `[vocab]` counts: the most frequent tokens keep a number.
        size: Tokens of the small vocabulary.
    """
    vocab = len(unigram)
    order = np.argsort(-np.asarray(unigram), kind="stable")
    kept = np.sort(order[: min(size, vocab) - 1])
    small = np.full(vocab, len(kept), np.int32)
    small[kept] = np.arange(len(kept))
    parts = {}
    for split, rows in (("train", None), ("validation", 32), ("test", 64)):
        batches = packed[split].iterate_once(batch_size=64, max_rows=rows)
        columns = [batch["model"] for batch in batches]
        parts[split] = small[np.concatenate([c["tokens"] for c in columns])]
        parts[f"{split}_mask"] = np.concatenate([c["loss_mask"] for c in columns])
    counts = np.bincount(parts["train"][parts["train_mask"]], minlength=len(kept) + 1)
    return Text(**parts, unigram=counts + 0.1, kept=kept)


def count_tokens(packed: data.PackedDataset, vocab: int) -> np.ndarray:
    """`[vocab]` counts of the labels in a split."""
    counts = np.zeros(vocab)
    for batch in packed.iterate_once(batch_size=256):
        tokens = batch["model"]["tokens"][batch["model"]["loss_mask"]]
        counts += np.bincount(tokens, minlength=vocab)
    return counts

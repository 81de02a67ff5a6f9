"""Rows of text for graph fusion, and what the sources say about them."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tqdm
from absl import logging
from etils import epath

from experiments import _fusion, _processes
from logitjax import data, losses, models
from logitjax.models import Tokenizer

SPLITS = ("train", "validation", "test")


def load_splits(spec: str, *, on_error: str) -> dict[str, data.Examples]:
    """A tfds dataset's own splits; of other sources the last two tenths are held out."""
    if spec.startswith("tfds:"):
        return {s: data.load_examples(spec, split=s, on_error=on_error) for s in SPLITS}
    examples = data.load_examples(spec, on_error=on_error)
    held = max(1, len(examples) // 10)
    if len(examples) < 3:
        raise ValueError(f"data: {spec} has {len(examples)} documents, too few to hold some out")
    cuts = (0, len(examples) - 2 * held, len(examples) - held, len(examples))
    return {s: examples[cuts[i] : cuts[i + 1]] for i, s in enumerate(SPLITS)}


@dataclasses.dataclass(frozen=True)
class Packed:
    """The packed rows of each split; ``names`` says which tokenizer's columns a model reads."""

    splits: Mapping[str, data.PackedDataset]
    names: Mapping[str, str]
    lengths: Mapping[str, np.ndarray]

    def columns(self, batch: Mapping[str, Any], model: str) -> Mapping[str, Any]:
        return batch[self.names[model]]


def pack_splits(
    spec: str,
    tokenizers: Mapping[str, Tokenizer],
    *,
    seq_len: int,
    on_error: str,
    directory: epath.Path,
) -> Packed:
    """Pack every split once for all models; models that share a tokenizer share its columns."""
    by_fingerprint: dict[str, str] = {}
    names = {m: by_fingerprint.setdefault(t.fingerprint, m) for m, t in tokenizers.items()}
    distinct = {name: tokenizers[name] for name in dict.fromkeys(names.values())}
    splits = {}
    with _processes.first_alone("load"):
        loaded = load_splits(spec, on_error=on_error)
    for split, examples in loaded.items():
        with _processes.first_alone(f"pack {split}"):
            splits[split] = data.pack(
                examples, distinct, seq_len=seq_len, directory=directory / split
            )
        logging.info(
            "%s: %d documents in %d rows of %d tokens%s",
            split,
            len(examples),
            len(splits[split]),
            seq_len,
            f", {examples.errors} malformed rows skipped" if examples.errors else "",
        )
    lengths = {name: models.token_byte_lengths(t) for name, t in distinct.items()}
    return Packed(splits, names, lengths)


def needed_rows(packed: Packed, config: Any, *, distilling: bool) -> dict[str, np.ndarray]:
    """The rows of each split that some run reads from the sources' statistics, ascending."""
    train = packed.splits["train"]
    visited = [
        train.indices(step, seed=seed, batch_size=config.batch_size)
        for seed in range(config.seeds if distilling else 0)
        for step in range(config.steps)
    ]
    rows = {"train": np.unique(np.concatenate(visited)) if visited else np.zeros(0, np.int64)}
    for split in SPLITS[1:]:
        rows[split] = np.arange(min(config.eval_rows, len(packed.splits[split])))
    return rows


@dataclasses.dataclass(frozen=True)
class Source:
    """What one source says about the rows that matter, from its cache on disk.

    Attributes:
      columns: which tokenizer's columns of a batch it reads.
      ours: which the pivot reads.
      lengths: bytes of each token of both vocabularies, where they differ.
      tables: split -> (rows, arrays), the arrays indexed like the rows.
    """

    columns: str
    ours: str
    lengths: Mapping[str, np.ndarray]
    tables: Mapping[str, tuple[np.ndarray, Mapping[str, np.ndarray]]]
    vocab_size: int

    def statistics(self, split: str, batch: Mapping[str, Any]) -> tuple[Any, np.ndarray]:
        """`losses.GraphStatistics` at the pivot's positions, and where there are any."""
        rows, arrays = self.tables[split]
        places = np.searchsorted(rows, np.maximum(batch["row"], 0))
        found = {name: np.asarray(array[places]) for name, array in arrays.items()}
        where = batch[self.columns]["loss_mask"][:, 1:]
        if self.columns != self.ours:
            aligned, where = data.align_positions(
                batch[self.ours],
                batch[self.columns],
                our_lengths=self.lengths[self.ours],
                their_lengths=self.lengths[self.columns],
            )
            rows_ = np.arange(len(aligned))[:, None]
            found = {name: array[rows_, aligned] for name, array in found.items()}
        return losses.GraphStatistics(**found, vocab_size=self.vocab_size), where


def open_source(
    load: Callable[[], tuple[Any, Any]],
    *,
    name: str,
    packed: Packed,
    rows: Mapping[str, np.ndarray],
    k: int,
    batch_size: int,
    mesh: Any,
    directory: epath.Path,
) -> Source:
    """Let a source read the rows once, or open what it said about them before."""
    model: Any = None
    tables = {}
    vocab_size = 0
    for split, wanted in rows.items():
        if model is None:
            model, _ = load()
            vocab_size = model.config.vocab_size
            apply_fn, params = models.from_nnx(model)
            read = jax.jit(functools.partial(_fusion.source_statistics, apply_fn.graphdef, k=k))
        parts = []
        for start in tqdm.trange(0, len(wanted), batch_size, desc=f"{name} {split}", disable=None):
            chunk = wanted[start : start + batch_size]
            batch = packed.splits[split].rows(np.resize(chunk, batch_size))
            said = jax.device_get(read(params, batch[packed.names[name]]))
            parts.append(jax.tree.map(operator.itemgetter(slice(len(chunk))), said))
        if parts:
            fields = ("values", "indices", "log_z", "mean", "std")
            arrays = {f: np.concatenate([getattr(p, f) for p in parts]) for f in fields}
            tables[split] = (wanted, arrays)
    ours, columns = packed.names["pivot"], packed.names[name]
    return Source(columns, ours, packed.lengths, tables, vocab_size)

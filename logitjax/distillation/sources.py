"""Rows of text for graph fusion, and what the sources say about them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from logitjax import data, losses, models, processes
from logitjax.distillation import objectives
from logitjax.distillation._alignment import align_positions
from logitjax.distillation._teacher_cache import TeacherCache, TeacherIdentity
from logitjax.models import Tokenizer
from logitjax.storage import has_manifest

SPLITS = ("train", "validation", "test")


def load_splits(spec: str, *, on_error: str) -> dict[str, data.Examples]:
    """The source's own splits where it has them; else the last two tenths are held out."""
    if spec.startswith("tfds:") or _has_splits(spec):
        return {s: data.load_examples(spec, split=s, on_error=on_error) for s in SPLITS}
    examples = data.load_examples(spec, on_error=on_error)
    held = max(1, len(examples) // 10)
    if len(examples) < 3:
        raise ValueError(f"data: {spec} has {len(examples)} documents, too few to hold some out")
    cuts = (0, len(examples) - 2 * held, len(examples) - held, len(examples))
    return {s: examples[cuts[i] : cuts[i + 1]] for i, s in enumerate(SPLITS)}


def _has_splits(spec: str) -> bool:
    root = epath.Path(spec.partition(":")[2]).expanduser()
    if not root.is_dir():
        return False
    names = {path.name.partition(".")[0] for path in root.iterdir()}
    return {"validation", "test"} <= names


@dataclasses.dataclass(frozen=True)
class Packed:
    """The packed rows of each split.

    Attributes:
      splits: by name.
      names: which tokenizer's columns each model reads.
      lengths: bytes of each token, by those columns.
      chat: whether the rows are conversations, each model's under its own template.
    """

    splits: Mapping[str, data.PackedDataset]
    names: Mapping[str, str]
    lengths: Mapping[str, np.ndarray]
    chat: bool

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
    with processes.first_before_others("load"):
        loaded = load_splits(spec, on_error=on_error)
    chat = "messages" in loaded["train"][0]
    for split, examples in loaded.items():
        with processes.first_before_others(f"pack {split}"):
            splits[split] = data.pack(
                examples,
                distinct,
                seq_len=seq_len,
                directory=directory / split,
                # A conversation under a template cannot be cut.
                encode_chat=models.encode_chat if chat else None,
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
    lengths = {name: models.token_byte_lengths(t) for name, t in distinct.items()}
    return Packed(splits, names, lengths, chat)


def needed_rows(
    packed: Packed, *, steps: int, batch_size: int, seeds: int, eval_rows: int
) -> dict[str, np.ndarray]:
    """The rows of each split whose statistics some run reads, ascending.

    Args:
        packed: The rows.
        steps: Steps of a run.
        batch_size: Rows of a step.
        seeds: Runs, with seeds from 0; 0 where nothing learns from the sources.
        eval_rows: Rows of each held-out split that are scored.
    """
    train = packed.splits["train"]
    visited = [
        train.indices(step, seed=seed, batch_size=batch_size)
        for seed in range(seeds)
        for step in range(steps)
    ]
    rows = {"train": np.unique(np.concatenate(visited)) if visited else np.zeros(0, np.int64)}
    for split in SPLITS[1:]:
        rows[split] = np.arange(min(eval_rows, len(packed.splits[split])))
    return rows


@dataclasses.dataclass(frozen=True)
class Source:
    """What one source says about the rows that matter, from its caches on disk.

    Attributes:
      columns: which tokenizer's columns of a batch it reads.
      packed: the rows.
      caches: by split.
    """

    columns: str
    packed: Packed
    caches: Mapping[str, TeacherCache]

    def statistics(self, split: str, batch: Mapping[str, Any]) -> tuple[Any, np.ndarray]:
        """`losses.GraphStatistics` at the pivot's positions, and where there are any."""
        cache = self.caches[split]
        found = cache.read(batch["row"])
        where = batch[self.columns]["loss_mask"][:, 1:]
        ours = self.packed.names["pivot"]
        if self.columns != ours:
            places, where = align_positions(
                batch[ours],
                batch[self.columns],
                our_lengths=self.packed.lengths[ours],
                their_lengths=self.packed.lengths[self.columns],
                by="turn" if self.packed.chat else "document",
            )
            rows = np.arange(len(places))[:, None]
            found = {name: array[rows, places] for name, array in found.items()}
        drawn = {n: found.pop(f"tail_{n}") for n in ("values", "indices") if f"tail_{n}" in found}
        tail = losses.TailSample(**drawn) if drawn else None
        return losses.GraphStatistics(**found, tail=tail, vocab_size=cache.vocab_size), where


def let_source_read(
    spec: str,
    load: Callable[[], tuple[Any, models.Tokenizer]],
    *,
    columns: str,
    packed: Packed,
    rows: Mapping[str, np.ndarray],
    k: int,
    tail_samples: int = 0,
    batch_size: int,
    directory: epath.Path,
) -> dict[str, TeacherCache]:
    """Let a source read the rows that it has not read yet; the model is loaded if there are any."""
    loaded: list[Any] = []

    def model() -> tuple[Any, Any, Any]:
        if not loaded:
            decoder, tokenizer = load()
            apply_fn, params = models.from_nnx(decoder)
            read = jax.jit(
                functools.partial(
                    objectives.source_record, apply_fn.graphdef, k=k, tail_samples=tail_samples
                )
            )
            loaded.extend((decoder.config, tokenizer, functools.partial(read, params)))
        return tuple(loaded)

    caches = {}
    for split, wanted in rows.items():
        if not len(wanted):
            continue
        path, dataset = directory / split, packed.splits[split]
        expected = {
            "model": spec,
            "data": dataset.fingerprint,
            "k": k,
            "tail_samples": tail_samples,
        }
        complete = has_manifest(path)
        if complete:
            cache = TeacherCache(path)
            cache.check(**expected)
            complete = not len(cache.missing(wanted))
        if not processes.broadcast_from_first(lambda done=complete: done):
            config, tokenizer, read = model()
            identity = TeacherIdentity(
                **expected,
                tokenizer=tokenizer.fingerprint,
                vocab_size=config.vocab_size,
                positions=dataset.seq_len - 1,
            )

            def compute(chunk: np.ndarray, dataset: Any = dataset, read: Any = read) -> Any:
                return jax.device_get(read(dataset.rows(chunk)[columns], chunk))

            TeacherCache(path, identity).fill(
                wanted,
                compute,
                batch_size=batch_size,
                rows_per_shard=64,
                label=spec,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
            )
            processes.barrier(f"read {path}")
            cache = TeacherCache(path)
        caches[split] = cache
    return caches


def open_caches(
    directory: epath.Path, packed: Packed, columns: str, tokenizer: str, rows: Mapping[str, Any]
) -> dict[str, TeacherCache]:
    """Caches written before (``--teacher=cache:DIR``), checked against data and tokenizer."""
    caches = {}
    for split, wanted in rows.items():
        if not len(wanted):
            continue
        cache = TeacherCache(directory / split)
        cache.check(data=packed.splits[split].fingerprint, tokenizer=tokenizer)
        missing = cache.missing(wanted)
        if len(missing):
            raise ValueError(
                f"teacher cache {cache.directory} lacks {len(missing)} of the rows that this run "
                f"visits, such as {missing[0]}: write it with --rows=all"
            )
        caches[split] = cache
    return caches

"""What models to learn from (the sources) say about packed rows, from caches on disk."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from logitjax import data, losses, models, processes
from logitjax.distillation import objectives
from logitjax.distillation._alignment import align_positions
from logitjax.distillation._teacher_cache import TeacherCache, TeacherIdentity
from logitjax.storage import has_manifest


def visited_rows(
    packed: data.PackedSplits, *, steps: int, batch_size: int, seeds: int, eval_rows: int
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
    for split in data.SPLITS[1:]:
        rows[split] = np.arange(min(eval_rows, len(packed.splits[split])))
    return rows


@dataclasses.dataclass(frozen=True)
class Source:
    """What one source says about the rows that matter, from its caches on disk.

    Attributes:
        columns: Which tokenizer's columns of a batch it reads.
        packed: The rows.
        caches: Its caches, by split.
    """

    columns: str
    packed: data.PackedSplits
    caches: Mapping[str, TeacherCache]

    @functools.cached_property
    def _token_lengths(self) -> Mapping[str, np.ndarray]:
        """Bytes of text that each token stands for, by columns."""
        return {n: models.token_byte_lengths(t) for n, t in self.packed.tokenizers.items()}

    def statistics(self, split: str, batch: Mapping[str, Any]) -> tuple[Any, np.ndarray]:
        """`losses.GraphStatistics` at the pivot's positions, and where there are any."""
        cache = self.caches[split]
        columns = cache.read(batch["row"])
        where = batch[self.columns]["loss_mask"][:, 1:]
        ours = self.packed.names["pivot"]
        if self.columns != ours:
            places, where = align_positions(
                batch[ours],
                batch[self.columns],
                our_lengths=self._token_lengths[ours],
                their_lengths=self._token_lengths[self.columns],
                by="turn" if self.packed.chat else "document",
            )
            rows = np.arange(len(places))[:, None]
            columns = {name: array[rows, places] for name, array in columns.items()}
        names = [n for n in ("values", "indices") if f"tail_{n}" in columns]
        drawn = {name: columns.pop(f"tail_{name}") for name in names}
        tail = losses.TailSample(**drawn) if drawn else None
        return losses.GraphStatistics(**columns, tail=tail, vocab_size=cache.vocab_size), where


def cache_teacher(
    spec: str,
    load: Callable[[], tuple[Any, models.Tokenizer]],
    *,
    columns: str,
    packed: data.PackedSplits,
    rows: Mapping[str, np.ndarray],
    k: int,
    tail_samples: int = 0,
    batch_size: int,
    directory: epath.Path,
) -> dict[str, TeacherCache]:
    """Lets a source read the rows that it has not read yet, and keeps what it says.

    The model is loaded only if there are such rows; processes share them.

    Args:
        spec: The model, as its user names it.
        load: Loads it and its tokenizer.
        columns: Which tokenizer's columns of a batch it reads.
        packed: The rows.
        rows: By split the rows to read.
        k: Logits of each position to keep.
        tail_samples: Tokens of each position drawn from outside them.
        batch_size: Rows a process reads at once.
        directory: Folder with a cache for each split.

    Returns:
        The caches, by split.

    Raises:
        ValueError: A cache that is there was made from something else.
    """
    loaded: list[Any] = []

    def model() -> tuple[Any, Any, Any]:
        if not loaded:
            decoder, tokenizer = load()
            apply_fn, params = models.from_nnx(decoder)
            read = jax.jit(
                functools.partial(
                    objectives.teacher_record, apply_fn.graphdef, k=k, tail_samples=tail_samples
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


def open_teacher_caches(
    directory: epath.Path,
    packed: data.PackedSplits,
    tokenizer: str,
    rows: Mapping[str, Any],
) -> dict[str, TeacherCache]:
    """Caches that were written before, as `cache_teacher` returns them.

    Args:
        directory: Folder with a cache for each split.
        packed: The rows.
        tokenizer: Fingerprint of the source's tokenizer.
        rows: By split the rows that the run visits.

    Raises:
        ValueError: A cache was made from other data or another tokenizer, or lacks rows.
    """
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

"""Packed rows on disk: batches that are a pure function of the seed and the step."""

import collections
import concurrent.futures
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int32, Int64

from logitjax.data._order import global_indices, process_rows
from logitjax.storage import ArrayCodec, Manifest, ShardReader

KIND = "packed dataset"
# Stored columns of a tokenizer.
KINDS = {"tokens": "int32", "segment_ids": "int32", "loss_mask": "uint8"}
# Batches in memory in addition to the one in use.
_PREFETCH = 2

# Arrays by tokenizer, and under the key "row" the indices of the rows.
Batch = dict[str, Any]


def row_codec(names: Iterable[str], seq_len: int) -> ArrayCodec:
    """Codec for tokens, segment ids and loss mask of each tokenizer in turn."""
    return ArrayCodec({f"{n}/{kind}": (t, (seq_len,)) for n in names for kind, t in KINDS.items()})


def _positions(segment_ids: Int[np.ndarray, "*batch tokens"]) -> Int32[np.ndarray, "*batch tokens"]:
    """Compute positions, which restart in every segment and are 0 in padding."""
    index = np.arange(segment_ids.shape[-1], dtype=np.int32)
    starts = np.ones(segment_ids.shape, bool)
    starts[..., 1:] = segment_ids[..., 1:] != segment_ids[..., :-1]
    # Start of each token's segment.
    begin = np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
    return np.where(segment_ids > 0, index - begin, 0).astype(np.int32)


class PackedDataset:
    """Rows of packed documents, tokenised by one or several tokenizers.

    :func:`logitjax.data.pack` makes them; ``PackedDataset(directory)`` opens packed rows without
    data or tokenizers. A batch is ``{name: {"tokens", "segment_ids", "positions", "loss_mask"},
    "row"}`` of NumPy arrays [batch, seq_len] (int32, the mask bool) and [batch] (int64), where
    ``name`` is a tokenizer's name given to ``pack``:

    * ``segment_ids`` counts a row's documents, the same for every tokenizer, from 1; 0 is padding.
    * ``positions`` start at 0 in every segment.
    * ``teacher``, [batch] like ``row``, exists if examples name a teacher: its index in `routes`.
    * ``loss_mask[t]`` says whether to predict ``tokens[t]`` from ``t - 1``. It is false for the
      first token of a segment, so no prediction crosses documents.

    Batches can be read in any order: the state of a data pipeline is the step.

    >>> import tempfile
    >>> from logitjax import data
    >>> class Bytes:
    ...     vocab_size, bos_id, eos_id, pad_id, fingerprint = 257, None, 256, 256, "bytes"
    ...     def encode(self, text, add_bos=False): return list(text.encode())
    ...     def decode(self, ids): return bytes(i for i in ids if i < 256).decode()
    >>> directory = tempfile.mkdtemp()
    >>> _ = data.pack([{"text": f"document {i}"} for i in range(10)], {"pivot": Bytes()},
    ...               seq_len=16, directory=directory)
    >>> rows = data.PackedDataset(directory)
    >>> batch = rows.batch(3, seed=0, batch_size=4)
    >>> batch["pivot"]["tokens"].shape, batch["row"].shape
    ((4, 16), (4,))
    >>> halves = [rows.indices(3, seed=0, batch_size=4, process_index=p, process_count=2)
    ...           for p in range(2)]
    >>> bool((np.concatenate(halves) == batch["row"]).all())
    True

    Raises:
        FileNotFoundError: There are no packed rows, or a shard is missing.
        ValueError: The manifest or a shard is damaged.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = epath.Path(directory).expanduser()
        self.manifest = Manifest(self.directory, KIND).read()
        self.fingerprint: str = self.manifest["fingerprint"]
        self.seq_len: int = self.manifest["seq_len"]
        self.names: tuple[str, ...] = tuple(self.manifest["tokenizers"])
        self.pad_ids: dict[str, int] = self.manifest["pad_ids"]
        self.statistics: dict[str, Any] = self.manifest.get("statistics", {})
        # Rows for each teacher are consecutive.
        self.routes: dict[str, int] = self.manifest.get("routes", {})
        self._reader = ShardReader(self.directory, self.manifest["shards"])
        self._codec = row_codec(self.names, self.seq_len)

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Batch:
        """Return one row, as for loaders of grain and PyTorch."""
        index = range(len(self))[index]
        batch = self.rows([index])
        parts = {name: {k: v[0] for k, v in batch[name].items()} for name in self.names}
        return {key: parts[key] if key in parts else value[0] for key, value in batch.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers of a loader reopen the shards.
        return PackedDataset, (os.fspath(self.directory),)

    def __repr__(self) -> str:
        return (
            f"PackedDataset({os.fspath(self.directory)!r}, {len(self)} rows of {self.seq_len}, "
            f"{', '.join(self.names)})"
        )

    def indices(
        self,
        step: int,
        *,
        seed: int,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Int64[np.ndarray, "batch"]:
        """Return this process's rows of batch `step`, int64 [batch_size / process_count].

        Each epoch visits every row once, in its own order; a batch may straddle two epochs. The
        concatenation over processes does not depend on their number.
        """
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        local = process_rows(batch_size, process_index, process_count)
        rows = global_indices(step, length=len(self), seed=seed, batch_size=batch_size)
        return rows[local]

    def batch(self, step: int, **places: int) -> Batch:
        """Read this process's part of batch `step`; the arguments are those of `indices`."""
        return self.rows(self.indices(step, **places))

    def rows(self, indices: Sequence[int] | Int[np.ndarray, "batch"]) -> Batch:
        """Read the given rows as a batch; an index of -1 gives a row of padding."""
        indices = np.asarray(indices, np.int64)
        real = indices >= 0
        stored = self._codec.decode(self._reader.read(indices[real].tolist()))
        batch: Batch = {"row": indices}
        if self.routes:
            ends = np.cumsum(list(self.routes.values()))
            # Padding, at -1, has the first teacher, but nothing to learn.
            batch["teacher"] = np.searchsorted(ends, np.maximum(indices, 0), side="right")
        for name in self.names:
            columns = {}
            for kind in KINDS:
                fill = self.pad_ids[name] if kind == "tokens" else 0
                columns[kind] = np.full((len(indices), self.seq_len), fill, np.int32)
                columns[kind][real] = stored[f"{name}/{kind}"]
            columns["positions"] = _positions(columns["segment_ids"])
            columns["loss_mask"] = columns["loss_mask"] != 0
            batch[name] = columns
        return batch

    def iterate_once(
        self,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        max_rows: int | None = None,
    ) -> Iterator[Batch]:
        """Iterate over all rows (or the first `max_rows`) in order, for evaluation.

        Every process gets the same number of batches of the same shape; the last are filled with
        padding, which has row index -1 and nothing to predict.
        """
        local = process_rows(batch_size, process_index, process_count)
        count = len(self) if max_rows is None else min(max_rows, len(self))
        places = (np.arange(begin, begin + batch_size) for begin in range(0, count, batch_size))
        batches = (self.rows(np.where(rows < count, rows, -1)[local]) for rows in places)
        return read_ahead(batches, _PREFETCH)


def read_ahead(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """Read from `batches` in a thread, at most `depth` in advance; errors are raised here."""
    waiting: collections.deque[concurrent.futures.Future] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(1, "logitjax-data") as thread:
        while True:
            # A single thread, so that batches come in order.
            while len(waiting) < depth:
                waiting.append(thread.submit(next, batches, None))
            batch = waiting.popleft().result()
            if batch is None:
                return
            yield batch

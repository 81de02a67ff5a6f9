"""The top logits of a teacher as MaxText stores them, into a `TeacherCache` and back.

MaxText 0.2.5 writes them with `save_top_k_teacher_logits.py`: array_record files with a
`tf.train.Example` a row. They hold raw logits and no normaliser, so what the other tokens weigh is
not known: the cache has no `rest`, and losses that need it refuse such a teacher. Neither MaxText
nor TensorFlow is imported here.
"""

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from logitjax.distillation import TeacherCache, TeacherIdentity
from logitjax.storage import ShardReader, ShardWriter, digest

_LOGITS, _IDS = "top_k_logits", "top_k_indices"
# What MaxText keeps beside the logits, if its data has it; `inputs` are always there.
_COLUMNS = ("inputs", "inputs_position", "inputs_segmentation", "targets", "targets_segmentation")

# Of `tf.train.Example` what these files use. On the wire a map is a list of its entries, and one of
# several fields is a field like any other.
_MESSAGES = {
    "Floats": (("value", 1, "REPEATED", "FLOAT"),),
    "Ints": (("value", 1, "REPEATED", "INT64"),),
    "Feature": (("floats", 2, "OPTIONAL", "Floats"), ("ints", 3, "OPTIONAL", "Ints")),
    "Entry": (("key", 1, "OPTIONAL", "STRING"), ("value", 2, "OPTIONAL", "Feature")),
    "Features": (("feature", 1, "REPEATED", "Entry"),),
    "Example": (("features", 1, "OPTIONAL", "Features"),),
}


class StoredTopK:
    """Rows of MaxText's files in the order of the files; they stay on disk.

    Args:
        files: Paths on this machine, such as `sorted(folder.glob("teacher_top_k_*.array_record"))`.

    Attributes:
        files: The paths.
        positions: Positions of a row.
        k: Logits kept at each.

    Raises:
        ValueError: No rows, or a file that is cut off, damaged or of another kind; names it.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]):
        self.files = [epath.Path(file) for file in files]
        shards = [
            {"file": os.fspath(path.absolute()), "rows": _count(path), "bytes": path.stat().length}
            for path in self.files
        ]
        self._rows = np.cumsum([shard["rows"] for shard in shards])
        self._reader = ShardReader(epath.Path("/"), shards)
        if not len(self):
            raise ValueError(f"files: expected rows, got none in {len(self.files)} files")
        self.positions, self.k = self._row(0)[_LOGITS].shape

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """What the files have of these rows.

        Args:
            rows: `[batch]` numbers of rows.

        Returns:
            `inputs` and other columns, int32 `[batch, positions]`; `top_k_logits`, float32, and
            `top_k_indices`, int32, `[batch, positions, k]`.
        """
        columns = [self._row(int(row)) for row in rows]
        return {name: np.stack([row[name] for row in columns]) for name in columns[0]}

    def _row(self, row: int) -> dict[str, np.ndarray]:
        (record,) = self._reader.read([row])
        try:
            lists = {
                entry.key: np.array(entry.value.floats.value, np.float32)
                if entry.value.HasField("floats")
                else np.array(entry.value.ints.value, np.int64)
                for entry in _messages()["Example"].FromString(record).features.feature
            }
            top = {name: lists[name].reshape(len(lists["inputs"]), -1) for name in (_LOGITS, _IDS)}
            if top[_LOGITS].shape != top[_IDS].shape or not top[_IDS].size:
                raise ValueError("other ids than logits")
        except (DecodeError, KeyError, ValueError):
            file = self.files[int(np.searchsorted(self._rows, row, side="right"))]
            raise ValueError(f"{file}: expected stored top logits, got another row {row}") from None
        columns = {name: lists[name] for name in _COLUMNS if name in lists} | {_IDS: top[_IDS]}
        return {n: a.astype(np.int32) for n, a in columns.items()} | {_LOGITS: top[_LOGITS]}


def cache_stored_top_k(
    stored: StoredTopK,
    directory: str | os.PathLike[str],
    *,
    model: str,
    tokenizer: str,
    vocab_size: int,
    data: str = "",
    dtype: str = "float32",
    batch_size: int = 8,
) -> TeacherCache:
    """A cache of MaxText's rows, by their numbers, without the `rest`.

    Args:
        stored: The rows.
        directory: Where the cache goes; what is there already is not written again.
        model: The teacher, as its user names it.
        tokenizer: Fingerprint of its tokenizer.
        vocab_size: Entries of its vocabulary.
        data: Fingerprint of the packed rows, if these are some; else a digest of the files.
        dtype: How logits are stored; `'float32'` keeps them as they are.
        batch_size: Rows at a time.

    Raises:
        ValueError: An id outside of the vocabulary, or a cache of something else.
    """
    identity = TeacherIdentity(
        model=model,
        tokenizer=tokenizer,
        data=data or digest(*stored.files),
        vocab_size=vocab_size,
        positions=stored.positions,
        k=stored.k,
        dtype=dtype,
        rest=False,
    )

    def compute(rows: np.ndarray) -> dict[str, np.ndarray]:
        columns = stored.read(rows)
        ids = columns[_IDS]
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"{_IDS}: expected ids in 0..{vocab_size - 1}, got {ids.max()}")
        return {"values": columns[_LOGITS], "indices": ids}

    cache = TeacherCache(directory, identity)
    cache.fill(range(len(stored)), compute, batch_size=batch_size, label="stored logits")
    return cache


def store_top_k(
    cache: TeacherCache,
    rows: Sequence[int] | np.ndarray,
    columns: Mapping[str, Any],
    directory: str | os.PathLike[str],
    *,
    rows_per_file: int = 1024,
) -> list[epath.Path]:
    """Writes rows of a cache as MaxText reads them (`offline_data_dir`); the rest is lost.

    Args:
        cache: What the teacher says.
        rows: `[rows]` which of its rows, in this order.
        columns: `inputs`, `[rows, positions]`, and any of `inputs_position`, `inputs_segmentation`,
            `targets` and `targets_segmentation`.
        directory: Where the files go.
        rows_per_file: Rows of a file.

    Returns:
        The files.

    Raises:
        ValueError: Columns of other names or shapes.
    """
    arrays = {name: np.asarray(array) for name, array in columns.items()}
    shape = (len(rows), cache.identity.positions)
    for name in sorted({"inputs", *arrays}):
        got = arrays[name].shape if name in arrays else None
        if name not in _COLUMNS or got != shape:
            listed = ", ".join(_COLUMNS)
            raise ValueError(f"columns: expected {shape} of {listed}, got {name} {got}")
    folder = epath.Path(directory)
    with ShardWriter(folder, rows_per_file, "teacher_top_k_part_{:05d}_host_000") as writer:
        for place, row in enumerate(rows):
            said = cache.read([row])
            features = {name: array[place] for name, array in arrays.items()}
            # MaxText's own is Python's hash, which differs from process to process.
            tokens = features["inputs"].astype(np.int32).tobytes()
            number = hashlib.blake2b(tokens, digest_size=8).digest()
            features["sequence_hash"] = np.frombuffer(number, "<i8")
            features |= {_LOGITS: said["values"][0], _IDS: said["indices"][0]}
            writer.write(_record(features))
    return [folder / shard["file"] for shard in writer.shards]


def _record(features: Mapping[str, np.ndarray]) -> bytes:
    example = _messages()["Example"]()
    for name, array in features.items():
        entry = example.features.feature.add(key=name)
        kind = entry.value.floats if array.dtype.kind == "f" else entry.value.ints
        kind.value.extend(array.ravel().tolist())
    return example.SerializeToString()


@functools.cache
def _messages() -> dict[str, Any]:
    """The classes of `_MESSAGES`, without TensorFlow."""
    file = descriptor_pb2.FileDescriptorProto(name="stored.proto", syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, label, kind in fields:
            field = described.field.add(name=name, number=number, label=f"LABEL_{label}")
            if kind in _MESSAGES:
                field.type, field.type_name = field.TYPE_MESSAGE, f".{kind}"
            else:
                field.type = field.Type.Value(f"TYPE_{kind}")
    # A pool of its own: other packages may have registered the same names.
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    types = {name: pool.FindMessageTypeByName(name) for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(kind) for name, kind in types.items()}


def _count(path: epath.Path) -> int:
    """Rows of a file, which says at its end what it holds."""
    reader = ArrayRecordReader(os.fspath(path), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        size = path.stat().length
        raise ValueError(f"{path}: expected a whole array_record file, got {size} bytes of one")
    return reader.num_records()

"""A teacher's top logits as MaxText 0.2.5 stores them, into a `TeacherCache` and back.

`save_top_k_teacher_logits.py` writes array_record files with a `tf.train.Example` per row: raw
logits without a normaliser, so the mass of all other tokens is unknown. The cache has no `rest`,
and losses that need it refuse such a teacher. Neither MaxText nor TensorFlow is imported.
"""

import functools
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from etils import epath
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from logitjax.distillation import TeacherCache, TeacherIdentity
from logitjax.storage import digest, write_shards

_LOGITS, _IDS = "top_k_logits", "top_k_indices"
# Rows per part of a cache, and per file.
_PART = 256

# The part of `tf.train.Example` that these files use. In the wire format a map is a list of its
# entries, and a oneof field is a field like any other.
_MESSAGES = {
    "Floats": (("value", 1, "REPEATED", "FLOAT"),),
    "Ints": (("value", 1, "REPEATED", "INT64"),),
    "Feature": (("floats", 2, "OPTIONAL", "Floats"), ("ints", 3, "OPTIONAL", "Ints")),
    "Entry": (("key", 1, "OPTIONAL", "STRING"), ("value", 2, "OPTIONAL", "Feature")),
    "Features": (("feature", 1, "REPEATED", "Entry"),),
    "Example": (("features", 1, "OPTIONAL", "Features"),),
}


@functools.cache
def _example() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="stored.proto", syntax="proto3")
    for message, fields in _MESSAGES.items():
        described = file.message_type.add(name=message)
        for name, number, label, kind in fields:
            field = described.field.add(name=name, number=number, label=f"LABEL_{label}")
            if kind in _MESSAGES:
                field.type, field.type_name = field.TYPE_MESSAGE, f".{kind}"
            else:
                field.type = field.Type.Value(f"TYPE_{kind}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("Example"))


def stored_rows(files: Iterable[str | os.PathLike[str]]) -> Iterator[dict[str, np.ndarray]]:
    """The rows of MaxText's files, in order.

    Args:
        files: Paths on this machine, such as `sorted(folder.glob("teacher_top_k_*.array_record"))`.

    Yields:
        `inputs` with `targets` or segments, int32 `[positions]`; `top_k_logits`, float32, and
        `top_k_indices`, int32, `[positions, k]`.

    Raises:
        ValueError: A truncated or damaged file, or one of another kind; names it.
    """
    for file in files:
        reader = ArrayRecordReader(os.fspath(file), "readahead_buffer_size:0,max_parallelism:0")
        if not reader.ok():
            size = os.path.getsize(file)
            raise ValueError(f"{file}: expected a whole array_record file, got {size} bytes of one")
        for number in range(reader.num_records()):
            try:
                yield _row(reader.read([number])[0])
            except (DecodeError, KeyError, RuntimeError, ValueError):
                raise ValueError(
                    f"{file}: expected stored top logits, got something else at {number}"
                ) from None


def _row(record: bytes) -> dict[str, np.ndarray]:
    values = {e.key: e.value for e in _example().FromString(record).features.feature}
    positions = len(values["inputs"].ints.value)
    # The only number beyond 32 bits.
    values.pop("sequence_hash", None)
    columns: dict[str, np.ndarray] = {
        n: np.array(v.ints.value, np.int32) for n, v in values.items()
    }
    columns[_LOGITS] = np.array(values[_LOGITS].floats.value, np.float32)
    for name in (_LOGITS, _IDS):
        columns[name] = columns[name].reshape(positions, -1)
    if not 0 < columns[_IDS].size == columns[_LOGITS].size:
        raise ValueError("other ids than logits")
    return columns


def cache_stored_top_k(
    files: Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    *,
    model: str,
    tokenizer: str,
    vocab_size: int,
    data: str = "",
) -> TeacherCache:
    """A cache of MaxText's rows, by number, without the `rest`.

    Args:
        files: As in `stored_rows`.
        directory: Folder of the cache; existing parts are not written again.
        model: The user's name for the teacher.
        tokenizer: Fingerprint of its tokenizer.
        data: Fingerprint of the packed rows, if any; otherwise a digest of the files.

    Raises:
        ValueError: No rows, an id outside the vocabulary, or another cache in the folder.
    """
    rows = stored_rows(files)
    part = list(itertools.islice(rows, _PART))
    if not part:
        raise ValueError(f"files: expected rows, got none in {len(files)} files")
    positions, k = part[0][_IDS].shape
    identity = TeacherIdentity(
        model=model,
        tokenizer=tokenizer,
        data=data or digest(*map(epath.Path, files)),
        vocab_size=vocab_size,
        positions=positions,
        k=k,
        dtype="float32",
        rest=False,
    )
    cache = TeacherCache(directory, identity)
    written, start = cache.row_numbers, 0
    while part:
        values, ids = (np.stack([row[name] for row in part]) for name in (_LOGITS, _IDS))
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"{_IDS}: expected ids in 0..{vocab_size - 1}, got {ids.max()}")
        numbers = np.arange(start, start + len(part))
        # Skips what a killed run already wrote.
        if not np.isin(numbers, written).all():
            cache.add(numbers, {"values": values, "indices": ids})
        start += len(part)
        part = list(itertools.islice(rows, _PART))
    return cache


def store_top_k(
    cache: TeacherCache,
    rows: Sequence[int] | np.ndarray,
    columns: Mapping[str, Any],
    directory: str | os.PathLike[str],
) -> list[epath.Path]:
    """Write rows of a cache as MaxText reads them (`offline_data_dir`), without the rest.

    Args:
        rows: `[rows]` numbers of its rows, in this order.
        columns: `inputs`, `[rows, positions]`, and MaxText's other columns: `inputs_position`,
            `inputs_segmentation`, `targets`, `targets_segmentation`.

    Raises:
        ValueError: A column of another shape.
    """
    shape = (len(rows), cache.identity.positions)
    arrays = {name: np.asarray(array, np.int32) for name, array in columns.items()}
    for name in ("inputs", *arrays):
        if (got := arrays[name].shape if name in arrays else None) != shape:
            raise ValueError(f"columns[{name!r}]: expected {shape}, got {got}")

    def records() -> Iterator[bytes]:
        for location, row in enumerate(rows):
            features = {name: array[location] for name, array in arrays.items()}
            # MaxText's own is Python's hash, which differs between processes.
            hashed = hashlib.blake2b(features["inputs"].tobytes(), digest_size=8).digest()
            features["sequence_hash"] = np.frombuffer(hashed, np.int64)
            message = cache.read([row])
            yield _record(features | {_LOGITS: message["values"], _IDS: message["indices"]})

    folder = epath.Path(directory)
    shards = write_shards(folder, records(), _PART, "teacher_top_k_part_{:05d}_host_000")
    return [folder / shard["file"] for shard in shards]


def _record(features: Mapping[str, np.ndarray]) -> bytes:
    example = _example()()
    for name, array in features.items():
        value = example.features.feature.add(key=name).value
        numbers = value.floats if array.dtype.kind == "f" else value.ints
        numbers.value.extend(array.ravel().tolist())
    return example.SerializeToString()

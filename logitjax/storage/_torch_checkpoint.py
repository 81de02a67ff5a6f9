"""Reading torch checkpoints, also legacy ones, without torch and without running their code."""

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from logitjax.storage import _guard as guard
from logitjax.storage._pickles import ALLOWED, Attributes, Machine, StandIn, plain
from logitjax.storage._safetensors import SafetensorsSource

_STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}  # fmt: skip
# From torch.serialization.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# Tensors that share a storage are copied out of it, up to this factor of the storages.
_SHARED = 4


class _Script(Attributes):
    """Stands in for the modules of a TorchScript archive, whose classes are code in it."""


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclasses.dataclass(eq=False)
class _Storage:
    """Numbers that a tensor views; in a legacy file they come after the tensors."""

    dtype: np.dtype
    count: int
    values: np.ndarray | None = None


class _Tensor:
    """A view of a storage, converted to an array once the storage is read."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *unused: Any):
        # requires_grad, hooks, metadata.
        del unused
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        self.storage = storage
        self.offset = guard.whole(offset, "a tensor's offset")
        self.size = guard.shape_of(size, "a tensor's size")
        self.stride = guard.shape_of(stride, "a tensor's strides")

    @property
    def key(self) -> tuple[Any, ...]:
        return id(self.storage), self.offset, self.size, self.stride

    def array(self) -> np.ndarray:
        values = self.storage.values
        if values is None:
            raise ValueError("a tensor whose numbers are not in the file")
        # numpy does not check strided views: one beyond the storage would read foreign memory.
        ends = [(n - 1) * s for n, s in zip(self.size, self.stride)]
        wrong = len(self.size) != len(self.stride)
        empty = 0 in self.size
        if wrong or (not empty and self.offset + sum(ends) >= len(values)):
            raise ValueError(
                f"a tensor of shape {self.size} and strides {self.stride} reaches beyond its "
                f"storage of {len(values)} numbers"
            )
        if empty:
            guard.whole(math.prod(n for n in self.size if n), "an empty tensor's size")
            return np.zeros(self.size, values.dtype)
        if math.prod(self.size) > len(values):
            raise ValueError(
                f"a tensor of shape {self.size} repeats its storage of {len(values)} numbers"
            )
        strides = tuple(s * values.itemsize for s in self.stride)
        return np.lib.stride_tricks.as_strided(values[self.offset :], self.size, strides)


_ALLOWED: Mapping[tuple[str, str], Any] = {
    **ALLOWED,
    ("torch._utils", "_rebuild_tensor_v2"): StandIn(_Tensor),
    ("torch._utils", "_rebuild_tensor"): StandIn(_Tensor),
    ("torch._utils", "_rebuild_parameter"): StandIn(lambda tensor, *unused: tensor),
    ("torch", "Size"): StandIn(lambda values=(): tuple(values)),
    ("argparse", "Namespace"): StandIn(lambda: Attributes()),
    # TorchScript annotates lists with their element type.
    **{
        ("torch.jit._pickle", f"build_{kind}list"): StandIn(lambda values=(): list(values))
        for kind in ("int", "double", "bool", "tensor")
    },
    **{("torch", name): _StorageType(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
}
_MODULE = StandIn(lambda: _Script())


def _named(module: str, name: str) -> Any:
    return _MODULE if module.partition(".")[0] == "__torch__" else _ALLOWED.get((module, name))


def _new_storage(pid: Any, storages: dict[str, _Storage]) -> _Storage:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise ValueError("an unknown kind of reference")
    kind, key, count = pid[1], str(pid[2])[:80], guard.whole(pid[4], "a storage's size")
    if not isinstance(kind, _StorageType):
        raise ValueError("a storage of unknown type")
    # Tensors that share a storage refer to it by the same key.
    if key not in storages:
        storages[key] = _Storage(kind.dtype, count)
    return storages[key]


def _read_zip(file: Any) -> Any:
    archive = guard.open_zip(file)
    members = {member.filename: member for member in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive without one data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = "<"
    if f"{root}byteorder" in members:
        guard.whole(members[f"{root}byteorder"].file_size, f"{root}byteorder", most=16)
        order = {b"little": "<", b"big": ">"}.get(archive.read(f"{root}byteorder"), "")
        if not order:
            raise ValueError("it names an unknown order of bytes")
    entries: dict[str, _Storage] = {}

    def storage(pid: Any) -> _Storage:
        storage = _new_storage(pid, entries)
        if storage.values is None:
            name = f"{root}data/{pid[2]}"
            if name not in members:
                raise ValueError(f"{name} is missing from it")
            if members[name].file_size != storage.count * storage.dtype.itemsize:
                raise ValueError(f"{name} does not hold {storage.count} numbers")
            values = guard.member_array(archive, members[name], storage.dtype)
            # Extension types such as bfloat16 have no byte order of their own.
            storage.values = values if order == "<" else values.byteswap(inplace=True)
        return storage

    guard.whole(members[pickles[0]].file_size, pickles[0], most=guard.LIMITS.pickle_bytes)
    data = archive.read(pickles[0])
    return Machine(guard.Reader(io.BytesIO(data)), _named, storage).load()


def _read_legacy(file: guard.Reader) -> Any:
    entries: dict[str, _Storage] = {}

    def load() -> Any:
        return Machine(file, _named, lambda pid: _new_storage(pid, entries)).load()

    if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
        raise ValueError("it is neither a zip archive nor a torch checkpoint of the older form")
    machine = load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it does not say that it was written on a little-endian machine")
    result = load()
    keys = load()
    if not isinstance(keys, list):
        raise ValueError("it does not list its storages")
    for key in keys:
        if not isinstance(key, str) or key not in entries:
            raise ValueError(f"it holds an unknown storage {str(key)[:40]!r}")
        storage, field = entries[key], f"storage {key!r}"
        if storage.values is not None:
            raise ValueError(f"{field} occurs twice")
        if int.from_bytes(file.read(8, field), "little") != storage.count:
            raise ValueError(f"{field} is truncated")
        storage.values = file.array(storage.dtype, storage.count, field)
    if file.left:
        raise ValueError("it continues after its last storage")
    return result


def _arrays(content: Any) -> Any:
    """Tensors as arrays, one object for a tensor that occurs twice."""
    arrays: dict[Any, np.ndarray] = {}
    storages: dict[int, int] = {}
    copied = 0

    def leaf(value: Any) -> Any:
        nonlocal copied
        if not isinstance(value, _Tensor):
            return value
        if value.key not in arrays:
            view = value.array()
            # The first tensor that fills its storage uses that memory; others are copies.
            first = view.size == value.storage.count and id(value.storage) not in storages
            storages[id(value.storage)] = value.storage.count * view.itemsize
            if not first:
                copied += view.nbytes
                most = guard.LIMITS.free_expansion + _SHARED * sum(storages.values())
                if copied > most:
                    raise ValueError(f"tensors repeat their storages more than {most} bytes long")
            arrays[value.key] = view if first else np.array(view)
        return arrays[value.key]

    return plain(content, leaf)


def read_torch_checkpoint(path: epath.PathLike) -> Any:
    """Read a ``.pth`` file: numpy arrays, plain Python values and the types in `_ALLOWED`.

    The older form has no checksums: a corrupted number or name is returned as it is.
    """
    with guard.opened(path, "a torch checkpoint") as file:
        # Zip archives start with this.
        zipped = file.read(2) == b"PK"
        file.seek(0)
        return _arrays(_read_zip(file) if zipped else _read_legacy(guard.Reader(file)))


def _flat(module: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in module.items():
        if isinstance(value, _Script):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """Read the named arrays of a ``.safetensors`` or torch checkpoint file.

    They may be under ``state_dict``, ``model``, ``net`` or ``params``; data-parallel training's
    prefix ``module.`` is removed. The code of a TorchScript archive is not read.

    Raises:
        ValueError: the file is damaged, refused, or holds no named arrays.
    """
    if str(path).endswith(".safetensors"):
        source = SafetensorsSource(path)
        checkpoint: Any = {name: source.read(name) for name in source.names()}
    else:
        checkpoint = read_torch_checkpoint(path)
    if isinstance(checkpoint, _Script):
        checkpoint = dict(_flat(checkpoint))
    for key in ("state_dict", "model", "net", "params"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds no dictionary of weights")
    arrays = {str(k): v for k, v in checkpoint.items() if isinstance(v, np.ndarray)}
    if not arrays:
        raise ValueError(f"{path} holds no weights")
    return {name.removeprefix("module."): value for name, value in arrays.items()}

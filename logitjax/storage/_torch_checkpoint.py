"""Reading torch checkpoints without torch, and without running what is inside.

A ``.pth`` file is a pickle, and a pickle is a program: it may name any function of any module and
call it. The reader here knows the few names a checkpoint of tensors needs, stands in for each of
them itself, and refuses every other. Both forms are read: the zip archive that torch writes since
1.6, and the bare sequence of pickles from before, in which the older distillation checkpoints lie.
"""

import collections
import io
import math
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from logitjax.storage._require import require

_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# What pickle and zipfile raise over bytes that nobody meant.
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    RuntimeError,  # zipfile's, over a file that seems to be encrypted
    zlib.error,
)


class _Attributes(dict):
    """Stands in for plain objects that carry options, such as ``argparse.Namespace``."""

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {})


class _Script(dict):
    """Stands in for the modules of a TorchScript archive, whose classes are code in it."""

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {})


class _Storage:
    """Numbers a tensor looks into; those of a legacy file arrive after the tensors do."""

    def __init__(self, dtype: Any, count: int):
        self.dtype, self.count = np.dtype(dtype), count
        self.values: np.ndarray | None = None


class _Tensor:
    """A view of a storage, made an array once the storage is there."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *unused: Any):
        del unused  # requires_grad, hooks, metadata
        if not isinstance(storage, _Storage):
            raise pickle.UnpicklingError("a tensor without a storage")
        self.storage, self.offset = storage, int(offset)
        self.size = tuple(int(n) for n in size)
        self.stride = tuple(int(n) for n in stride)

    def array(self) -> np.ndarray:
        values = self.storage.values
        if values is None:
            raise ValueError("a tensor whose numbers are not in the file")
        ends = [(n - 1) * s for n, s in zip(self.size, self.stride)]
        wrong = len(self.size) != len(self.stride) or min((*self.size, *self.stride, 0)) < 0
        # Strided views are not checked by numpy: one beyond the storage would read foreign memory.
        empty = 0 in self.size
        if wrong or self.offset < 0 or (not empty and self.offset + sum(ends) >= len(values)):
            raise ValueError(
                f"a tensor of shape {self.size} and strides {self.stride} reaches beyond its "
                f"storage of {len(values)} numbers"
            )
        if empty:
            return np.zeros(self.size, values.dtype)
        if math.prod(self.size) > len(values):
            raise ValueError(
                f"a tensor of shape {self.size} repeats its storage of {len(values)} numbers"
            )
        strides = tuple(s * values.itemsize for s in self.stride)
        view = np.lib.stride_tricks.as_strided(values[self.offset :], self.size, strides)
        return np.array(view)


def _parameter(tensor: Any, *unused: Any) -> Any:
    return tensor


def _size(values: Any = ()) -> tuple[Any, ...]:
    return tuple(values)


def _bytes(text: Any, encoding: Any = "latin1") -> bytes:
    """Protocol 2 writes bytes as a call of ``codecs.encode``."""
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode("latin1")


class _Dtype:
    """Stands in for ``numpy.dtype``, whose own state could describe anything."""

    def __init__(self, name: Any, *unused: Any):
        self.dtype = np.dtype(str(name))
        if self.dtype.kind not in "biufc":
            raise pickle.UnpicklingError(f"a numpy type that is not plain numbers ({name})")

    def __setstate__(self, state: Any) -> None:
        # The state of numpy's plain types: a version, the order of bytes, and nothing of interest.
        if not isinstance(state, tuple) or state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("a numpy type with a state that is not a plain number's")
        self.dtype = self.dtype.newbyteorder(state[1])


def _list(values: Any = ()) -> list[Any]:
    """TorchScript says of lists what they hold."""
    return list(values)


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar that is not a plain number")
    return np.frombuffer(data, dtype.dtype, count=1)[0]


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch._utils", "_rebuild_tensor"): _Tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): _size,
    ("argparse", "Namespace"): _Attributes,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _bytes,
    **{("torch.jit._pickle", f"build_{kind}list"): _list for kind in ("int", "double", "bool")},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, storage: Callable[[tuple[Any, ...]], _Storage]):
        super().__init__(file, encoding="utf-8")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Script
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("an unknown kind of reference")
        return self._storage(pid)


def _load(file: Any, storage: Callable[[tuple[Any, ...]], _Storage]) -> Any:
    """One pickle, looked through first: lengths and places that it names are allocated at once."""
    begin = file.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if "PUT" in opcode.name and int(argument or 0) > count:
            raise pickle.UnpicklingError(f"place {argument} of {count}")
    file.seek(begin)
    return _Unpickler(file, storage).load()


def _new_storage(pid: tuple[Any, ...], known: dict[str, _Storage]) -> _Storage:
    dtype, key, count = pid[1], str(pid[2]), int(pid[4])
    if dtype not in _STORAGES.values():
        raise pickle.UnpicklingError("a storage of unknown type")
    if key not in known:
        known[key] = _Storage(dtype, count)
    return known[key]


def _read_zip(file: Any) -> Any:
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("it is a zip archive without one data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    order = "<"
    if f"{root}byteorder" in archive.namelist():
        orders = {b"little": "<", b"big": ">"}
        order = orders.get(archive.read(f"{root}byteorder"), "")
        if not order:
            raise ValueError("it names an unknown order of bytes")
    known: dict[str, _Storage] = {}

    def storage(pid: tuple[Any, ...]) -> _Storage:
        found = _new_storage(pid, known)
        if found.values is None:
            name = f"{root}data/{pid[2]}"
            if name not in archive.namelist():
                raise ValueError(f"{name} is missing from it")
            if archive.getinfo(name).file_size != found.count * found.dtype.itemsize:
                raise ValueError(f"{name} does not hold {found.count} numbers")
            values = np.frombuffer(archive.read(name), np.uint8).view(found.dtype)
            # Extension types such as bfloat16 know no byte order of their own.
            found.values = values if order == "<" else values.byteswap()
        return found

    return _load(io.BytesIO(archive.read(pickles[0])), storage)


def _read_legacy(file: Any) -> Any:
    known: dict[str, _Storage] = {}

    def load() -> Any:
        return _load(file, lambda pid: _new_storage(pid, known))

    if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
        raise ValueError("it is neither a zip archive nor a torch checkpoint of the older form")
    machine = load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("it does not say that it was written on a little-endian machine")
    result = load()
    for key in load():
        if str(key) not in known:
            raise ValueError(f"it holds an unknown storage {key!r}")
        storage = known[str(key)]
        count = int.from_bytes(file.read(8), "little")
        data = file.read(storage.count * storage.dtype.itemsize)
        if count != storage.count or len(data) != storage.count * storage.dtype.itemsize:
            raise ValueError(f"storage {key!r} is truncated")
        storage.values = np.frombuffer(data, np.uint8).view(storage.dtype)
    if file.read(1):
        raise ValueError("it goes on after its last storage")
    return result


def _arrays(value: Any) -> Any:
    if isinstance(value, _Tensor):
        return value.array()
    if isinstance(value, _Script):
        return _Script({key: _arrays(item) for key, item in value.items()})
    if isinstance(value, Mapping):
        return {key: _arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_arrays(item) for item in value)
    return value


def read_torch_checkpoint(path: epath.PathLike) -> Any:
    """What a ``.pth`` file holds, with tensors as numpy arrays.

    Allowed are tensors, parameters, ordered dictionaries, plain Python values, numpy scalars, and
    the attributes of an ``argparse.Namespace`` (which come back as a dictionary). Anything else in
    the pickle is refused before it is called. A zip archive has checksums, so that damage is an
    error; the older form has none, and a number or a name that was changed comes back changed.

    Args:
      path: a file that ``torch.save`` wrote, of any version.

    Returns:
      The object, usually a dictionary.

    Raises:
      ValueError: the file asks for something outside the allow-list, or is damaged.
    """
    path = epath.Path(path)
    with path.open("rb") as opened:
        # The legacy reader takes pickles one after another, and pickle reads ahead otherwise.
        file = io.BytesIO(opened.read())
    try:
        content = _read_zip(file) if file.getvalue()[:2] == b"PK" else _read_legacy(file)
        return _arrays(content)
    except DAMAGE as error:
        raise ValueError(f"{path} cannot be read as a torch checkpoint: {error}") from None
    except (pickle.UnpicklingError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is refused as a torch checkpoint: {error}") from None


def _flat(module: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in module.items():
        if isinstance(value, _Script):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_state_dict(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The named arrays of a ``.safetensors`` or torch checkpoint file.

    The dictionary may lie under ``state_dict``, ``model``, ``net`` or ``params``; a ``module.``
    prefix, which data-parallel training adds, is taken off. Of a TorchScript archive the weights
    are read and the code is not.

    Args:
      path: the file.

    Returns:
      Arrays by name.

    Raises:
      ValueError: the file is damaged, refused, or holds no named arrays.
    """
    if str(path).endswith(".safetensors"):
        found: Any = require("safetensors.numpy", extra="models").load(
            epath.Path(path).read_bytes()
        )
    else:
        found = read_torch_checkpoint(path)
    if isinstance(found, _Script):
        found = dict(_flat(found))
    for key in ("state_dict", "model", "net", "params"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no dictionary of weights")
    arrays = {str(k): v for k, v in found.items() if isinstance(v, np.ndarray)}
    if not arrays:
        raise ValueError(f"{path} holds no weights")
    return {name.removeprefix("module."): value for name, value in arrays.items()}

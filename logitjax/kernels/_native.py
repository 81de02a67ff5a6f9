import ctypes
import functools
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax import lax

from logitjax.storage import digest, write_atomic

_SOURCE = pathlib.Path(__file__).with_name("kernels.cc")
# For the building machine: the library is never copied to another, see `_library`.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-DNDEBUG", "-shared", "-fPIC", "-pthread")
_TARGETS = ("lookup_sums", "row_products", "code_products", "largest_ids")


def build() -> pathlib.Path:
    """Compile the kernels for this machine if necessary; return the library's path."""
    library = _library()
    if _whole(library):
        return library
    named = os.environ.get("CXX")
    items = [shutil.which(name) for name in ("c++", "g++", "clang++")]
    compiler = shlex.split(named) if named else [path for path in items if path][:1]
    if not compiler:
        raise RuntimeError("no C++ compiler: install g++ or clang++, or name one in CXX")
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:
        # Another process may be building too: the library appears atomically.
        output = pathlib.Path(directory) / library.name
        flags = [*_FLAGS, *_extra_flags(), f"-I{jax.ffi.include_dir()}"]
        command = [*compiler, *flags, str(_SOURCE), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not output.exists():
            raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-4000:]}")
        checksum = digest(output)
        output.replace(library)
        # Last, because a library without its checksum is built again.
        write_atomic(_checksum_of(library), checksum)
    return library


def in_use() -> bool:
    """Whether programs traced now use the kernels when they run on a CPU."""
    wish = os.environ.get("LOGITJAX_NATIVE", "")
    if wish == "0" or (not wish and jax.device_count() != 1):
        return False
    if wish and not _loaded():
        raise RuntimeError("LOGITJAX_NATIVE is set: build the kernels, python -m logitjax.kernels")
    return _loaded()


def on_cpu(native: Callable[..., Any], otherwise: Callable[..., Any], *args: jax.Array) -> Any:
    """Call ``native(*args)`` on a CPU if the kernels are `in_use`, else ``otherwise(*args)``."""
    if not in_use():
        return otherwise(*args)
    # Chosen at lowering.
    return lax.platform_dependent(*args, cpu=native, default=otherwise)


def lookup_sums(tables: jax.Array, blocks: jax.Array) -> jax.Array:
    """Sums of look-ups `sum_g tables[n, g, code_g(v)]`, ``[n, 32 * count]`` int32.

    ``tables`` are uint8 ``[n, 2 * pairs, 16]``, ``blocks`` uint8 ``[count, pairs, 32]``, as
    `vq.ProductCodes` lays codes out.
    """
    result = jax.ShapeDtypeStruct((tables.shape[0], 32 * blocks.shape[0]), jnp.int32)
    return _call("lookup_sums", result)(tables, blocks)


def row_products(vectors: jax.Array, rows: jax.Array, ids: jax.Array) -> jax.Array:
    """Products ``[n, m]`` of vectors ``[n, d]`` with rows chosen for each, which are not copied.

    The rows are those of ``rows`` ``[v, d]``, float32 or bfloat16, at ``ids`` ``[n, m]``, int32; an
    id outside them is clipped. ValueError if there are no rows.
    """
    if not rows.shape[0] and ids.size:
        raise ValueError(f"rows: expected at least one row, got shape {rows.shape}")
    return _call("row_products", jax.ShapeDtypeStruct(ids.shape, jnp.float32))(vectors, rows, ids)


def code_products(
    vectors: jax.Array, values: jax.Array, scales: jax.Array, offsets: jax.Array | None = None
) -> jax.Array:
    """Products ``[n, o]`` of float32 vectors ``[n, d]`` with the rows of `ops.Codes`.

    ``values`` ``[o, d]`` are int8, int4 or uint4; ``scales`` and ``offsets`` ``[o, g]``, of one
    type, one for each ``d / g`` values, which is even if they have four bits.
    """
    offsets = scales[:, :0] if offsets is None else offsets
    result = jax.ShapeDtypeStruct((vectors.shape[0], values.shape[0]), jnp.float32)
    return _call("code_products", result)(vectors, values, scales, offsets)


def largest_ids(values: jax.Array, k: int) -> jax.Array:
    """Indices ``[n, k]``, int32, of the k largest of ``[n, v]`` float32, in `lax.top_k`'s order.

    Of equal entries the lowest index comes first. 0.0 is larger than -0.0. A nan is larger than all
    numbers, or smaller than all if its sign is set.
    """
    result = jax.ShapeDtypeStruct((values.shape[0], k), jnp.int32)
    return _call("largest_ids", result)(values)


def _call(name: str, result: Any) -> Callable[..., Any]:
    if not _loaded():
        raise RuntimeError("the kernels are not built: python -m logitjax.kernels")
    return jax.ffi.ffi_call(f"logitjax_{name}", result, vmap_method="sequential")


@functools.cache
def _loaded() -> bool:
    """Load the library that `build` made, once per process."""
    try:
        library = _library()
        if not library.exists():
            return False
        # The loader would map a truncated file and crash at the missing parts.
        if not _whole(library):
            raise OSError(f"{library} differs from its checksum: python -m logitjax.kernels")
        symbols = ctypes.CDLL(str(library))
        targets = [getattr(symbols, f"logitjax_{name}") for name in _TARGETS]
    # No home directory, another C library, another library.
    except (OSError, RuntimeError, AttributeError) as error:
        logging.warning("kernels for CPUs cannot be loaded, so XLA does their work: %s", error)
        return False
    for name, target in zip(_TARGETS, targets, strict=True):
        capsule = jax.ffi.pycapsule(target)
        jax.ffi.register_ffi_target(f"logitjax_{name}", capsule, platform="cpu")
    return True


def _whole(library: pathlib.Path) -> bool:
    """Whether a library exists and matches its checksum."""
    try:
        return digest(library) == _checksum_of(library).read_text()
    except FileNotFoundError:
        return False


def _checksum_of(library: pathlib.Path) -> pathlib.Path:
    return library.with_suffix(".sha256")


def _extra_flags() -> list[str]:
    return shlex.split(os.environ.get("CXXFLAGS", ""))


@functools.cache
def _library() -> pathlib.Path:
    """The library's path, which depends on source, flags, version of jax and processor."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    flags = [line for line in text.splitlines() if line.startswith(("flags", "Features"))][:1]
    compiled = (_SOURCE.read_text(), _FLAGS, _extra_flags())
    parts = (*compiled, jax.__version__, platform.machine(), flags)
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "logitjax" / f"kernels-{digest(*parts, length=16)}.so"

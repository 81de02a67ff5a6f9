"""Export of decoders: a directory that transformers, vLLM and `load_model` read."""

import json
import operator
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from logitjax.models._decoder import Decoder
from logitjax.models._hf_config import config_to_hf
from logitjax.models._tokenizer import Tokenizer
from logitjax.models._weight_map import TensorSpec, hf_tensors, interleaved
from logitjax.ops import Codes
from logitjax.storage import require, write_atomic

# Shards being written, and those of a replaced model.
_PART = ".model-part-"
_SHARDS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def checkpoint_tensors(model: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Name and values of every tensor of the Hugging Face checkpoint, one at a time."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    places: list[tuple[dict, int | None]] = []
    for i, spec in enumerate(model.config.segments):
        layers = params["segments"][i]["layers"]
        period = len(spec.pattern)
        for n in range(spec.num_layers):
            stacked = model.layout == "stacked"
            places.append((layers[n % period], n // period) if stacked else (layers[n], None))

    for tensor in hf_tensors(model.config):
        yield tensor.name, _values(tensor, params, places, model.param_dtype)


def _values(tensor: TensorSpec, params: dict, places: list, dtype: Any) -> np.ndarray:
    tree, row = (params, None) if tensor.layer is None else places[tensor.layer]
    parts = []
    for path in tensor.leaves:
        leaf: Any = tree
        for key in path:
            leaf = leaf[key]
        for index in (row, tensor.expert):
            if index is not None:
                leaf = leaf[index] if isinstance(leaf, np.ndarray) else _sliced(leaf, index)
        leaf = leaf.dense().astype(dtype) if isinstance(leaf, Codes) else leaf
        if not isinstance(leaf, np.ndarray) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        values = np.asarray(leaf).T if tensor.transpose else np.asarray(leaf)
        parts.append(interleaved(values, tensor) if tensor.rope_heads else values)
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=tensor.axis)
    return np.ascontiguousarray(joined)


# One program for all rows.
_sliced = jax.jit(operator.getitem)


def save_pretrained(
    model: Decoder,
    tokenizer: Tokenizer | None,
    directory: epath.PathLike,
    *,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a model as a Hugging Face directory; loading it again gives the same bits.

    It contains safetensors shards (with an index if there are several), config.json,
    generation_config.json, and tokenizer.json with its tokenizer_config.json. Tensors keep the
    model's parameter dtype. With several processes all must call; process 0 writes.

    Args:
        model: a decoder with a full or tied head.
        tokenizer: also written, unless None.
        directory: folder, created if it does not exist.

    Raises:
        ValueError: for a setting that the family's format cannot express, or a head of another
            kind.
    """
    directory = epath.Path(directory)
    _check_head(model)
    config = config_to_hf(model.config, dtype=model.param_dtype.name)
    writer = jax.process_index() == 0
    if writer:
        directory.mkdir(parents=True, exist_ok=True)
    # The number of shards, which is part of their names, is only known at the end.
    shards: list[list[str]] = []
    shard: dict[str, np.ndarray] = {}
    size = total = 0
    sizes = {}

    def flush() -> None:
        if writer:
            _write_shard(directory / f"{_PART}{len(shards)}", shard)
        shards.append(list(shard))
        shard.clear()

    for name, values in checkpoint_tensors(model):
        if shard and size + values.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = values
        sizes[name] = values.nbytes
        size += values.nbytes
        total += values.nbytes
    flush()
    if not writer:
        return
    # The previous files are replaced now that the new ones are complete. Without a config.json,
    # which is written last, there is no model, so two models are never mixed.
    (directory / "config.json").unlink(missing_ok=True)
    for old in directory.iterdir():
        stopped = old.name.startswith(_PART) and int(old.name.removeprefix(_PART)) >= len(shards)
        if stopped or _SHARDS.fullmatch(old.name):
            old.unlink()
    count = len(shards)
    weight_map = {}
    for i, names in enumerate(shards):
        final = (
            f"model-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
        )
        (directory / f"{_PART}{i}").rename(directory / final)
        weight_map |= dict.fromkeys(names, final)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(directory / "model.safetensors.index.json", index)
    tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation = {k: v for k, v in tokens.items() if v is not None}
    _write_json(directory / "generation_config.json", generation)
    if tokenizer is not None:
        _write_tokenizer(tokenizer, directory)
    _write_json(directory / "config.json", config)


def _check_head(model: Decoder) -> None:
    from logitjax.heads import LinearHead, TiedHead

    expected = TiedHead if model.config.tie_embeddings else LinearHead
    if not isinstance(model.head, expected) or getattr(model.head, "bias", None) is not None:
        raise ValueError(
            f"model: a {type(model.head).__name__} cannot be written in the Hugging Face format, "
            f"expected a {expected.__name__} without bias"
        )


def _write_shard(path: epath.Path, shard: dict[str, np.ndarray]) -> None:
    safetensors = require("safetensors.numpy", extra="models")
    metadata = {"format": "pt"}
    if "://" in str(path):
        path.write_bytes(safetensors.save(shard, metadata))
    else:
        safetensors.save_file(shard, str(path), metadata)


def _write_json(path: epath.Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write_tokenizer(tokenizer: Tokenizer, directory: epath.Path) -> None:
    write_atomic(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.extra}
    settings.setdefault("clean_up_tokenization_spaces", False)
    for name in ("bos", "eos", "pad"):
        id = getattr(tokenizer, f"{name}_id")
        text = None if id is None else tokenizer.token(id)
        settings[f"{name}_token"] = tokenizer.special_tokens.get(f"{name}_token", text)
    # A file of its own, which wins over tokenizer_config.json, may be left from a model before.
    others = directory.glob("additional_chat_templates/*.jinja")
    for old in (directory / "chat_template.jinja", *others):
        if old.exists():
            old.unlink()
    template = tokenizer.chat_template
    settings.pop("chat_template", None)
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        settings["chat_template"] = template
    _write_json(directory / "tokenizer_config.json", settings)

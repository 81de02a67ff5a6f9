"""Adapters in PEFT's format, which transformers loads on its own base model."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from logitjax.models._config import DecoderConfig
from logitjax.models._lora import Lora
from logitjax.storage import guard, read_json, require, write_atomic
from logitjax.storage.weights import SafetensorsSource

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Settings of PEFT that change the effect of an adapter and are not supported.
_UNKNOWN = ("alora_invocation_tokens", "alpha_pattern", "layer_replication", "rank_pattern")


def save_peft(lora: Lora, config: DecoderConfig, directory: epath.PathLike, base: str) -> None:
    modules, layers = _modules(config), _listed(lora, config)
    tensors: dict[str, np.ndarray] = {}
    for i, layer in enumerate(layers):
        for name, adapter in layer.items():
            for side in "ab":
                values = np.asarray(jax.device_get(adapter[side]), np.float32)
                tensors[_tensor(modules[name], i, side.upper())] = np.ascontiguousarray(values.T)
    first = next(iter(layers[0].values()))
    rank = int(np.shape(first["a"])[-1])
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": lora.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted(modules[name].rpartition(".")[2] for name in layers[0]),
        "layers_to_transform": list(range(len(layers))),
        "layers_pattern": modules["query"].partition(".*")[0].rpartition(".")[2],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    written = require("safetensors.numpy", extra="models").save(tensors, {"format": "pt"})
    # Written last: without it there is no adapter, so two adapters are never mixed.
    (directory / _CONFIG).unlink(missing_ok=True)
    write_atomic(directory / _WEIGHTS, lambda file: file.write(written))
    write_atomic(directory / _CONFIG, json.dumps(settings, indent=2) + "\n")


def load_peft(directory: epath.PathLike, config: DecoderConfig) -> Lora:
    directory = epath.Path(directory)
    for name in (_CONFIG, _WEIGHTS):
        if not (directory / name).exists():
            raise FileNotFoundError(f"adapter: no such file: {directory / name}")
    settings = read_json(directory / _CONFIG, form=dict)
    kind, start = settings.get("peft_type"), settings.get("init_lora_weights")
    # PiSSA, OLoRA, CorDA and LoftQ change the weights below as well.
    moved = isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal")
    if kind != "LORA" or settings.get("use_dora") or moved:
        kind = start if moved else kind
        raise ValueError(f"adapter: expected plain LORA in {directory}, got {kind!r}")
    for name in _UNKNOWN:
        if settings.get(name):
            raise ValueError(
                f"adapter: {directory / _CONFIG}: expected no {name}, got "
                f"{guard.short(settings[name])}"
            )
    field = f"adapter: {directory / _CONFIG}: "
    rank = guard.whole(settings.get("r"), f"{field}r", least=1, most=guard.LIMITS.width)
    alpha = settings.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError(f"{field}lora_alpha: expected a number, got {alpha!r}")
    source = SafetensorsSource(directory / _WEIGHTS)
    tensors = {name: source.read(name) for name in source.names()}
    like = jax.eval_shape(lambda: Lora.init(config, rank, key=jax.random.key(0), layout="listed"))
    modules = _modules(config)
    segments, i = [], 0
    for segment in like.layers:
        members = []
        for layer in segment:
            members.append(_layer(tensors, i, layer, modules, directory))
            i += 1
        segments.append(tuple(members))
    if tensors:
        raise ValueError(
            f"adapter: {directory} has {len(tensors)} tensors that a model of {i} layers has no "
            f"place for, such as {min(tensors)}"
        )
    # Rank-stabilised LoRA (arXiv 2312.03732) divides by the square root of the rank.
    scale = float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank)
    return Lora(layers=tuple(segments), scale=scale)


def _modules(config: DecoderConfig) -> dict[str, str]:
    """The checkpoint module of each adapter target, with `*` for the layer."""
    if config.fused_maps:
        raise ValueError(
            f"lora: PEFT has no format for adapters of the family {config.family!r}, whose maps "
            "of queries, keys and values are fused"
        )
    return {path.rpartition(".")[2]: name for path, name in config.traits.weights.items()}


def _tensor(module: str, layer: int, letter: str) -> str:
    return f"base_model.model.{module.replace('*', str(layer))}.lora_{letter}.weight"


def _layer(
    tensors: dict[str, np.ndarray],
    i: int,
    like: Any,
    modules: Mapping[str, str],
    directory: epath.Path,
) -> dict:
    """The adapters of one layer, removed from the tensors."""
    layer = {}
    for name, shapes in like.items():
        names = {side: _tensor(modules[name], i, side.upper()) for side in "ab"}
        if names["a"] not in tensors:
            continue
        if names["b"] not in tensors:
            raise ValueError(f"adapter: {directory / _WEIGHTS}: no tensor {names['b']}")
        pair = {side: tensors.pop(tensor).T for side, tensor in names.items()}
        for side, values in pair.items():
            if values.shape != shapes[side].shape:
                raise ValueError(
                    f"adapter: {directory} has {name} of layer {i} with {side} of shape "
                    f"{values.shape}, this model expects {shapes[side].shape}"
                )
        layer[name] = {side: jnp.asarray(values, jnp.float32) for side, values in pair.items()}
    return layer


def _listed(lora: Lora, config: DecoderConfig) -> list[dict[str, Any]]:
    # A leading axis of layers.
    if jax.tree.leaves(lora)[0].ndim == 3:
        lora = lora.with_layout(config, "listed")
    return [layer for segment in lora.layers for layer in segment]

"""Exact conversions between stacked and listed layers, and cutting a student from layers."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.models._cache import Cache
from logitjax.models._config import DecoderConfig, SegmentSpec
from logitjax.models._decoder import Decoder
from logitjax.models._lora import Lora


def _stack(layers: Sequence[Any], spec: SegmentSpec) -> list[Any]:
    period = len(spec.pattern)
    return [jax.tree.map(lambda *x: jnp.stack(x), *layers[j::period]) for j in range(period)]


def _list(stacked: Sequence[Any], spec: SegmentSpec) -> list[Any]:
    return [
        jax.tree.map(lambda x, r=r: x[r], stacked[j])
        for r in range(spec.repeats)
        for j in range(len(spec.pattern))
    ]


def _convert(members: Sequence[Any], spec: SegmentSpec, layout: str) -> list[Any]:
    period = len(spec.pattern)
    expected = spec.num_layers if layout == "stacked" else period
    if len(members) != expected:
        raise ValueError(
            f"segment has {len(members)} members, expected {expected} to make {layout}"
        )
    return _stack(members, spec) if layout == "stacked" else _list(members, spec)


def with_layout(model: Decoder, layout: str) -> Decoder:
    """The same model with its layers ``'stacked'`` (for training) or ``'listed'`` (for decoding).

    Values are copied unchanged, so converting there and back is exact. The model handed in stays
    as it is; what is not a layer is shared with it.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = with_layout(Decoder(config, rngs=nnx.Rngs(0)), "listed")
    >>> len(model.segments[0].layers)
    2
    """
    if layout not in ("stacked", "listed"):
        raise ValueError(f"layout must be 'stacked' or 'listed', got {layout!r}")
    if layout == model.layout:
        return model
    out = nnx.merge(*nnx.split(model))
    for segment in out.segments:
        states = [nnx.to_pure_dict(nnx.state(layer)) for layer in segment.layers]
        graphdef = nnx.graphdef(segment.layers[0])
        converted = _convert(states, segment.spec, layout)
        segment.layers = nnx.List([nnx.merge(graphdef, state) for state in converted])
    out.layout = layout
    return out


def params_with_layout(params: dict, config: DecoderConfig, layout: str) -> dict:
    """`with_layout` for a pure dict of parameters (or gradients) as `from_nnx` gives."""
    segments = {}
    for i, spec in enumerate(config.segments):
        layers = params["segments"][i]["layers"]
        members = [layers[j] for j in range(len(layers))]
        converted = _convert(members, spec, layout)
        segments[i] = {**params["segments"][i], "layers": dict(enumerate(converted))}
    return {**params, "segments": segments}


def cache_with_layout(cache: Cache, config: DecoderConfig, layout: str) -> Cache:
    """The same cache for a model of the other layout."""
    keys, values = (
        tuple(tuple(_convert(m, spec, layout)) for m, spec in zip(side, config.segments))
        for side in (cache.keys, cache.values)
    )
    return dataclasses.replace(cache, keys=keys, values=values)


def lora_with_layout(lora: Lora, config: DecoderConfig, layout: str) -> Lora:
    """The same adapters for a model of the other layout."""
    layers = (tuple(_convert(m, spec, layout)) for m, spec in zip(lora.layers, config.segments))
    return dataclasses.replace(lora, layers=tuple(layers))


def keep_layers(model: Decoder, indices: Sequence[int]) -> Decoder:
    """A smaller model made of copies of the embedding, the chosen layers, norm and head.

    Every array is copied, so training or donating the new model leaves the old one alone.

    Args:
      model: the model to cut from.
      indices: layers to keep, in the order they shall run.

    Returns:
      A decoder of ``len(indices)`` layers in the same layout.

    Raises:
      ValueError: for no indices or one out of range.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=4,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> keep_layers(Decoder(config, rngs=nnx.Rngs(0)), [0, 3]).config.num_layers
    2
    """
    config = model.config
    wrong = [i for i in indices if not 0 <= i < config.num_layers]
    if wrong or not len(indices):
        raise ValueError(
            f"indices must name layers 0 to {config.num_layers - 1}, got {list(indices)}"
        )
    windows = tuple(config.layer_windows[i] for i in indices) if config.windows else ()
    small = dataclasses.replace(
        config, num_layers=len(indices), windows=windows, segment_boundaries=()
    )
    members = []
    for segment in model.segments:
        states = [nnx.to_pure_dict(nnx.state(layer)) for layer in segment.layers]
        listed = states if model.layout == "listed" else _list(states, segment.spec)
        members += listed
    graphdef = nnx.graphdef(model.segments[0].layers[0])
    chosen = [members[i] for i in indices]

    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(state)
    rest = {k: v for k, v in state.items() if k != "segments"}
    out = nnx.merge(graph, {**jax.tree.map(jnp.copy, rest), "segments": state["segments"]})
    segments, start = [], 0
    for spec in small.segments:
        part = chosen[start : start + spec.num_layers]
        start += spec.num_layers
        part = _stack(part, spec) if model.layout == "stacked" else jax.tree.map(jnp.copy, part)
        segment = nnx.merge(*nnx.split(model.segments[0]))
        segment.spec = spec
        segment.layers = nnx.List([nnx.merge(graphdef, s) for s in part])
        segments.append(segment)
    out.config = small
    out.segments = nnx.List(segments)
    _set_config(out, small)
    return out


def _set_config(model: Decoder, config: DecoderConfig) -> None:
    for segment in model.segments:
        for layer in segment.layers:
            layer.attention.config = config

"""Models made of a model: of the other layout, or of some of its layers."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.models._config import DecoderConfig
from logitjax.models._decoder import Decoder
from logitjax.models._stacking import convert, list_layers, stack_layers, twin


def with_layout(model: Decoder, layout: str) -> Decoder:
    """The same model with its layers `'stacked'` (for training) or `'listed'` (for decoding).

    Values are copied unchanged, so converting there and back is exact. The given model is
    unchanged; what is not a layer is shared with it.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = nnx.jit(lambda: with_layout(Decoder(config, rngs=nnx.Rngs(0)), "listed"))()
    >>> len(model.segments[0].layers)
    2
    """
    if layout not in ("stacked", "listed"):
        raise ValueError(f"layout: expected 'stacked' or 'listed', got {layout!r}")
    if layout == model.layout:
        return model
    out = nnx.merge(*nnx.split(model))
    for segment in out.segments:
        states = [nnx.to_pure_dict(nnx.state(layer)) for layer in segment.layers]
        graphdef = nnx.graphdef(segment.layers[0])
        converted = convert(states, segment.spec, layout)
        segment.layers = nnx.List([nnx.merge(graphdef, state) for state in converted])
    out.layout = layout
    return out


def keep_layers(model: Decoder, indices: Sequence[int]) -> Decoder:
    """A smaller model made of copies of the embedding, the chosen layers, norm and head.

    Every array is copied, so training or donating the new model does not affect the old one.

    Args:
        model: the model to cut from.
        indices: layers to keep, in the order in which they run.

    Returns:
        A decoder of `len(indices)` layers in the same layout.

    Raises:
        ValueError: for no indices or one out of range.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=4,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    >>> keep_layers(model, [0, 3]).config.num_layers
    2
    """
    config = model.config
    wrong = [i for i in indices if not 0 <= i < config.num_layers]
    if wrong or not len(indices):
        raise ValueError(
            f"indices: expected layers of 0 to {config.num_layers - 1}, got {list(indices)}"
        )
    windows = tuple(config.layer_windows[i] for i in indices) if config.windows else ()
    small = dataclasses.replace(
        config, num_layers=len(indices), windows=windows, segment_boundaries=()
    )
    members = []
    for segment in model.segments:
        states = [nnx.to_pure_dict(nnx.state(layer)) for layer in segment.layers]
        listed = states if model.layout == "listed" else list_layers(states, segment.spec)
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
        part = (
            stack_layers(part, spec) if model.layout == "stacked" else jax.tree.map(jnp.copy, part)
        )
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


def first_layers(model: Decoder, count: int) -> Decoder:
    """The model of the first layers: embedding, these layers, final norm and head.

    Nothing is copied: its parameters are the arrays of the given model, so it must not be trained
    or donated as a whole. `keep_layers` makes copies.

    Args:
        model: the model to cut.
        count: layers to keep. Stacked layers can only be cut where a segment ends
            (`DecoderConfig.segment_boundaries`), listed ones anywhere.

    Returns:
        A decoder in the same layout.

    Raises:
        ValueError: for a count out of range, or inside a stacked segment.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))()
    >>> small = first_layers(model, 2)
    >>> small.config.num_layers, small.embedding[...] is model.embedding[...]
    (2, True)
    """
    config = model.config
    if not 1 <= count <= config.num_layers:
        raise ValueError(f"count: expected a number between 1 and {config.num_layers}, got {count}")
    small = dataclasses.replace(
        config,
        num_layers=count,
        windows=config.windows[:count],
        segment_boundaries=tuple(b for b in config.segment_boundaries if b < count),
    )
    out = twin(model)
    if model.layout == "stacked":
        specs = small.segments
        if config.segments[: len(specs)] != specs:
            raise ValueError(
                f"count: stacked layers are split at segment_boundaries only, and {count} is none "
                "of them; make the model with segment_boundaries, or use with_layout(model, "
                "'listed')"
            )
        members = [list(segment.layers) for segment in out.segments][: len(specs)]
    else:
        layers = iter([layer for segment in out.segments for layer in segment.layers])
        members = [[next(layers) for _ in range(spec.num_layers)] for spec in small.segments]
    segments = []
    for spec, part in zip(small.segments, members, strict=True):
        segment = twin(out.segments[0])
        segment.spec, segment.layers = spec, nnx.List(part)
        for layer in part:
            layer.attention.config = small
        segments.append(segment)
    out.config, out.segments = small, nnx.List(segments)
    return out

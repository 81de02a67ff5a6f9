"""Models derived from a model: in the other layout, or with some of its layers."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.models._config import DecoderConfig, SegmentSpec
from logitjax.models._decoder import Decoder
from logitjax.models._stacking import convert, list_layers, stack_layers, twin


def with_layout(model: Decoder, layout: str) -> Decoder:
    """Return the model with its layers `'stacked'` (for training) or `'listed'` (for decoding).

    Values are copied unchanged, so converting there and back is exact. The given model is not
    changed; everything except the layers is shared with it.

    >>> from logitjax.models import load_model
    >>> len(with_layout(load_model("tiny"), "listed").segments[0].layers)
    2
    """
    if layout not in ("stacked", "listed"):
        raise ValueError(f"layout: expected 'stacked' or 'listed', got {layout!r}")
    if layout == model.layout:
        return model
    # Separate modules: assigning their layers does not change the given model.
    out = nnx.merge(*nnx.split(model))
    for segment in out.segments:
        states = [nnx.to_pure_dict(nnx.state(layer)) for layer in segment.layers]
        graphdef = nnx.graphdef(segment.layers[0])
        converted = convert(states, segment.spec, layout)
        segment.layers = nnx.List([nnx.merge(graphdef, state) for state in converted])
    out.layout = layout
    return out


def keep_layers(model: Decoder, indices: Sequence[int]) -> Decoder:
    """A smaller model of copies of embedding, chosen layers, norm and head, in the same layout.

    Every array is copied, so training or donating the new model does not affect the old one.

    Args:
        indices: layers to keep, in the order in which they run.

    Raises:
        ValueError: for no indices or one out of range.

    >>> from logitjax.models import load_model
    >>> keep_layers(load_model("tiny"), [1]).config.num_layers
    1
    """
    config = model.config
    wrong = [i for i in indices if not 0 <= i < config.num_layers]
    if wrong or not len(indices):
        raise ValueError(
            f"indices: expected layers of 0 to {config.num_layers - 1}, got {list(indices)}"
        )
    windows = tuple(config.layer_windows[i] for i in indices) if config.windows else ()
    unrotated = tuple(n for n, i in enumerate(indices) if i in config.unrotated)
    small = dataclasses.replace(
        config,
        num_layers=len(indices),
        windows=windows,
        unrotated=unrotated,
        # Boundaries of layers that may be gone.
        segment_boundaries=(),
    )
    listed = []
    for segment in model.segments:
        states = [nnx.to_pure_dict(nnx.state(layer)) for layer in segment.layers]
        listed += states if model.layout == "listed" else list_layers(states, segment.spec)
    graphdef = nnx.graphdef(model.segments[0].layers[0])
    chosen = [listed[i] for i in indices]

    def members(spec: SegmentSpec) -> list[Any]:
        part = [chosen.pop(0) for _ in range(spec.num_layers)]
        # Stacking copies.
        states = stack_layers(part, spec) if model.layout == "stacked" else copied(part)
        return [nnx.merge(graphdef, state) for state in states]

    copied = functools.partial(jax.tree.map, jnp.copy)
    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(state)
    rest = copied({k: v for k, v in state.items() if k != "segments"})
    out = nnx.merge(graph, {**rest, "segments": state["segments"]})
    return _with_members(out, small, map(members, small.segments))


def first_layers(model: Decoder, count: int) -> Decoder:
    """The model of the first layers in the same layout: embedding, these, final norm and head.

    Nothing is copied: its parameters are the arrays of the given model, so it must not be trained
    or donated as a whole. `keep_layers` makes copies.

    Args:
        count: number of layers to keep. Stacked layers can only be cut at the end of a segment
            (`DecoderConfig.segment_boundaries`), listed ones anywhere.

    Raises:
        ValueError: for a count out of range, or inside a stacked segment.

    >>> from logitjax.models import load_model
    >>> model = with_layout(load_model("tiny"), "listed")
    >>> small = first_layers(model, 1)
    >>> small.config.num_layers, small.embedding[...] is model.embedding[...]
    (1, True)
    """
    config = model.config
    if not 1 <= count <= config.num_layers:
        raise ValueError(f"count: expected a number between 1 and {config.num_layers}, got {count}")
    small = dataclasses.replace(
        config,
        num_layers=count,
        windows=config.windows[:count],
        unrotated=tuple(i for i in config.unrotated if i < count),
        segment_boundaries=tuple(b for b in config.segment_boundaries if b < count),
    )
    out = twin(model)
    if model.layout == "stacked":
        if config.segments[: len(small.segments)] != small.segments:
            raise ValueError(
                f"count: stacked layers can be split only at segment_boundaries, got {count}; make "
                "the model with segment_boundaries, or use with_layout(model, 'listed')"
            )
        return _with_members(out, small, [list(segment.layers) for segment in out.segments])
    layers = iter([layer for segment in out.segments for layer in segment.layers])
    counts = [spec.num_layers for spec in small.segments]
    return _with_members(out, small, [list(itertools.islice(layers, n)) for n in counts])


def _with_members(model: Decoder, config: DecoderConfig, members: Iterable[list[Any]]) -> Decoder:
    """The model itself, with the members of each segment of another configuration."""
    segments = []
    for spec, part in zip(config.segments, members, strict=False):
        segment = twin(model.segments[0])
        segment.spec, segment.layers = spec, nnx.List(part)
        for layer in part:
            layer.attention.config = config
        segments.append(segment)
    model.config, model.segments = config, nnx.List(segments)
    return model

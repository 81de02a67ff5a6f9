"""A model's first layers with adapters of their own: a small model that owns no other weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from logitjax.models._attention import make_context
from logitjax.models._cache import Cache, init_cache, kind_name
from logitjax.models._config import DecoderConfig
from logitjax.models._decoder import Decoder
from logitjax.models._layout import lora_with_layout
from logitjax.models._lora import TARGETS, Lora, init_lora, scaled_layers
from logitjax.ops import Array


def first_layers(model: Decoder, count: int) -> Decoder:
    """The model that ends after so many layers: embedding, layers, final norm and head.

    Nothing is copied: its parameters are the very arrays of the model handed in, so it must not be
    trained or donated as a whole. `keep_layers` makes copies.

    Args:
      model: the model to cut.
      count: layers to keep. Stacked layers can only be cut where a segment ends
        (``DecoderConfig.segment_boundaries``), listed ones anywhere.

    Returns:
      A decoder in the same layout.

    Raises:
      ValueError: for a count out of range, or inside a stacked segment.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    >>> small = first_layers(model, 2)
    >>> small.config.num_layers, small.embedding[...] is model.embedding[...]
    (2, True)
    """
    config = model.config
    if not 1 <= count <= config.num_layers:
        raise ValueError(f"count must be between 1 and {config.num_layers}, got {count}")
    small = dataclasses.replace(
        config,
        num_layers=count,
        windows=config.windows[:count],
        segment_boundaries=tuple(b for b in config.segment_boundaries if b < count),
    )
    out = _twin(model)
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
        segment = _twin(out.segments[0])
        segment.spec, segment.layers = spec, nnx.List(part)
        for layer in part:
            layer.attention.config = small
        segments.append(segment)
    out.config, out.segments = small, nnx.List(segments)
    return out


def _twin(module: Any) -> Any:
    """Another module of the same arrays; assigning to one leaves the other as it is."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, nnx.to_pure_dict(state))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Assistant:
    """A model's first layers, and the adapters that make something else of them.

    Attributes:
      base: from `first_layers`; its arrays are the large model's.
      lora: in the layout of ``base``. All that is trained.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    >>> assistant = init_assistant(model, 2, rank=4, key=jax.random.key(0))
    >>> assistant.logits(assistant.hidden_states(jnp.array([[1, 2, 3]]))[0]).shape
    (1, 3, 8)

    References:
      Ji et al., Reversing the forget-retain objectives, 2024 (arXiv 2406.08607), section 2.5.
    """

    base: Decoder
    lora: Lora

    @property
    def layers(self) -> int:
        return self.base.config.num_layers

    def hidden_states(
        self, tokens: Int[Array, "batch time"], **options: Any
    ) -> tuple[Float[jax.Array, "batch time hidden"], Cache | None]:
        """As `Decoder.hidden_states`, with the adapters."""
        return self.base.hidden_states(tokens, lora=self.lora, **options)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[jax.Array, "*batch vocab"]:
        """As `Decoder.logits`."""
        return self.base.logits(hidden)


def init_assistant(
    model: Decoder,
    layers: int,
    *,
    rank: int = 32,
    alpha: float | None = None,
    key: Array,
    targets: Sequence[str] = TARGETS,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Assistant:
    """The first layers of a model, with fresh adapters that change nothing yet.

    Args:
      model: the large model.
      layers: how many of its layers, 8 of 32 in the paper.
      rank: of the adapters; 32 in the paper, 16 in its code.
      alpha: scale times rank, as in `init_lora`; 32 in both, so a scale of 1 or of 2.
      key: PRNG key.
      targets: linear maps to adapt.
      dtype: of the adapters.

    Returns:
      An `Assistant`.

    Raises:
      ValueError: as `first_layers` and `init_lora`.
    """
    base = first_layers(model, layers)
    lora = init_lora(
        base.config,
        rank,
        key=key,
        alpha=alpha,
        targets=targets,
        dtype=dtype,
        layout=base.layout,
    )
    return Assistant(base=base, lora=lora)


def merge_lora(model: Decoder, lora: Lora) -> Decoder:
    """A model of its own whose kernels are ``kernel + a @ b * scale``.

    The adapted kernels are new arrays, all others are shared with the model handed in.

    Args:
      model: the decoder under the adapters.
      lora: in its layout.

    Returns:
      A decoder that needs no adapters.

    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = Decoder(config, rngs=nnx.Rngs(0))
    >>> merged = merge_lora(model, init_lora(config, 2, key=jax.random.key(0)))
    >>> bool((merged(jnp.array([[1, 2]])) == model(jnp.array([[1, 2]]))).all())
    True
    """
    out = _twin(model)
    for segment, members in zip(out.segments, lora.layers, strict=True):
        for layer, member in zip(segment.layers, members, strict=True):
            for name, adapter in member.items():
                owner = layer.mlp if hasattr(layer.mlp, name) else layer.attention
                kernel = getattr(owner, name).kernel
                update = adapter["a"].astype(jnp.float32) @ adapter["b"].astype(jnp.float32)
                kernel[...] = (kernel[...] + update * lora.scale).astype(kernel[...].dtype)
    return out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairCache:
    """What a model and its assistant remember; axis 0 of every leaf is the row.

    ``shared`` holds one (keys, values) pair a layer that both run, ``[rows, 2, heads, slots, dim]``
    with the large model first, ``rest`` one a layer that only the large model has, without the 2.
    ``positions`` and ``length`` are as in `Cache`, the same for both.
    """

    shared: Any
    rest: Any
    positions: Any
    length: Any


def init_pair_cache(
    config: DecoderConfig,
    layers: int,
    batch: int,
    max_length: int,
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    ring_slack: int = 0,
) -> PairCache:
    """An empty `PairCache`, for `paired_hidden_states`; the arguments are those of `init_cache`."""
    cache = init_cache(config, batch, max_length, dtype, ring_slack=ring_slack)
    keys = [k for segment in cache.keys for k in segment]
    pairs = [(k, jnp.zeros_like(k)) for k in keys]

    def doubled(leaf: jax.Array) -> jax.Array:
        return jnp.zeros((leaf.shape[0], 2, *leaf.shape[1:]), leaf.dtype)

    return PairCache(
        shared=jax.tree.map(doubled, tuple(pairs[:layers])),
        rest=tuple(pairs[layers:]),
        positions=cache.positions,
        length=cache.length,
    )


def paired_hidden_states(
    model: Decoder,
    lora: Lora,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    cache: PairCache,
) -> tuple[Float[jax.Array, "batch time hidden"], Float[jax.Array, "batch time hidden"], PairCache]:
    """Hidden states of a model and of its assistant, every weight read once.

    The layers that both have run two rows a prompt, the model's and the assistant's, and the
    adapters add to the second only; the layers above run the model's rows alone.

    Args:
      model: the large model, its layers listed.
      lora: the assistant's adapters, for as many layers as it has.
      tokens: ids that both read.
      positions: of each, -1 for padding.
      cache: from `init_pair_cache`.

    Returns:
      The model's hidden states and the assistant's, normed, and the cache after these tokens.

    Raises:
      ValueError: for a stacked model.
    """
    if model.layout != "listed":
        raise ValueError("model: expected listed layers, use with_layout(model, 'listed')")
    config, (batch, time) = model.config, tokens.shape
    layers = [layer for segment in model.segments for layer in segment.layers]
    adapters = [member for segment in scaled_layers(lora) for member in segment]
    shared = len(adapters)
    positions = jnp.asarray(positions)
    twice = jnp.repeat(positions, 2, axis=0)
    held_twice = {name: jnp.repeat(held, 2, axis=0) for name, held in cache.positions.items()}
    contexts, doubled, held = {}, {}, {}
    second = jnp.tile(jnp.array([False, True]), batch)
    for window in dict.fromkeys(config.layer_windows):
        for into, places, before, rows in (
            (contexts, positions, cache.positions, None),
            (doubled, twice, held_twice, second),
        ):
            into[window], now = make_context(
                config,
                window,
                places,
                segment_ids=None,
                padded=True,
                cache=Cache(keys=(), values=(), positions=before, length=cache.length),
                implementation=model.attention,
                lora_rows=rows,
            )
            if rows is None:
                held[kind_name(window)] = now
    x = jnp.repeat(model.embed(tokens, positions), 2, axis=0)
    windows = config.layer_windows
    pairs: list[Any] = []
    for layer, window, adapter, pair in zip(layers, windows, adapters, cache.shared):
        flat = tuple(leaf.reshape(2 * batch, *leaf.shape[2:]) for leaf in pair)
        x, flat = layer(x, doubled[window], flat, adapter)
        pairs.append(tuple(leaf.reshape(batch, 2, *leaf.shape[1:]) for leaf in flat))
    both = x.reshape(batch, 2, time, -1)
    x, rest = both[:, 0], []
    for layer, window, pair in zip(layers[shared:], windows[shared:], cache.rest, strict=True):
        x, pair = layer(x, contexts[window], pair, None)
        rest.append(pair)
    cache = PairCache(
        shared=tuple(pairs),
        rest=tuple(rest),
        positions=held,
        length=jnp.maximum(cache.length, positions.max(axis=1) + 1),
    )
    return model.final_norm(x), model.final_norm(both[:, 1]), cache


def listed_lora(assistant: Assistant) -> Lora:
    """The adapters for listed layers, whatever the layout of the base."""
    return (
        lora_with_layout(assistant.lora, assistant.base.config, "listed")
        if (assistant.base.layout == "stacked")
        else assistant.lora
    )

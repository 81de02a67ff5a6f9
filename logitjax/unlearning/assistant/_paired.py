"""A model and its assistant as one thing that is stepped."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from logitjax.decoding import CachedModel
from logitjax.models import (
    Cache,
    Decoder,
    DecoderConfig,
    Lora,
    with_layout,
)
from logitjax.ops import Array, Static
from logitjax.unlearning.assistant._assistant import Assistant, added


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
) -> PairCache:
    """An empty `PairCache`, for `paired_hidden_states`; the arguments are those of `Cache.init`."""
    cache = Cache.init(config, batch, max_length, dtype)
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
    *,
    relative: bool = False,
) -> tuple[Float[jax.Array, "batch time hidden"], Float[jax.Array, "batch time hidden"], PairCache]:
    """Hidden states of a model and of its assistant, every weight read once.

    The layers that both have run two rows a prompt, the model's and the assistant's, and the
    adapters add to the second only; the layers above run the model's rows alone.
    """
    shared = sum(len(segment) for segment in lora.layers)
    (batch, time), positions = tokens.shape, jnp.asarray(positions)

    def doubled(leaf: jax.Array) -> jax.Array:
        return jnp.repeat(leaf, 2, axis=0)

    def span(pairs: Any, positions: Any, length: jax.Array) -> Cache:
        keys, values = (tuple(pair[i] for pair in pairs) for i in (0, 1))
        return Cache(keys=(keys,), values=(values,), positions=positions, length=length)

    def pairs_of(cache: Cache) -> Any:
        return tuple(zip(cache.keys[0], cache.values[0], strict=True))

    flat = jax.tree.map(lambda leaf: leaf.reshape(2 * batch, *leaf.shape[2:]), cache.shared)
    x, below = model.run_layers(
        doubled(model.embed(tokens, positions)),
        doubled(positions),
        range(shared),
        span(flat, jax.tree.map(doubled, cache.positions), doubled(cache.length)),
        lora=lora,
        lora_rows=jnp.tile(jnp.array([False, True]), batch),
    )
    both = x.reshape(batch, 2, time, -1)
    x, above = model.run_layers(
        both[:, 0],
        positions,
        range(shared, model.config.num_layers),
        span(cache.rest, cache.positions, cache.length),
    )
    cache = PairCache(
        shared=jax.tree.map(lambda leaf: leaf.reshape(batch, 2, *leaf.shape[1:]), pairs_of(below)),
        rest=pairs_of(above),
        positions=above.positions,
        length=above.length,
    )
    known = model.final_norm(both[:, 1])
    if relative:
        known = added(known, model.final_norm(both[:, 0]))
    return model.final_norm(x), known, cache


@dataclasses.dataclass(frozen=True)
class _PairApply:
    graphdef: Static
    relative: bool

    def __call__(self, params: Any, tokens: Any, positions: Any, cache: Any, *, last_only=False):
        model = nnx.merge(self.graphdef.value, params["model"])
        *hidden, cache = paired_hidden_states(
            model, params["lora"], tokens, positions, cache, relative=self.relative
        )
        both = jnp.stack(hidden)
        return model.logits(both[:, :, -1:] if last_only else both), cache


@dataclasses.dataclass(frozen=True)
class _PairCaches:
    config: DecoderConfig
    layers: int
    dtype: Any

    def __call__(self, rows: int, max_length: int) -> PairCache:
        return init_pair_cache(self.config, self.layers, rows, max_length, self.dtype)


def paired_model(target: Decoder, assistant: Assistant) -> CachedModel:
    """A model and the assistant made of its first layers, stepped in one pass.

    Both read the same prompt. Their common layers run both as rows of one batch, and one product
    with the head gives the logits of both, so a step reads each weight once. In arithmetic it costs
    about ``(M + K) / M`` forward passes of the model; in memory traffic, only the adapters and K
    layers of cache more. The assistant is the only expert::

        Ensemble(paired_model(target, assistant), fuse=fusion.LogitDifference())

    Args:
        target: the large model. A stacked one is converted to listed layers, which copies them.
        assistant: from `Assistant.init` of this model, with trained adapters. Only
            its adapters are read: the weights below them are the target's.

    Returns:
        A `CachedModel` with one expert.

    Raises:
        ValueError: the assistant is not made of a model like ``target``.

    >>> import jax
    >>> from logitjax import decoding, fusion
    >>> from logitjax.models import DecoderConfig
    >>> from logitjax.unlearning import Assistant
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> target = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))()
    >>> assistant = Assistant.init(target, 1, rank=2, key=jax.random.key(0))
    >>> both = decoding.Ensemble(paired_model(target, assistant), fuse=fusion.LogitDifference())
    >>> decoding.generate(both, [[1, 2, 3]], max_new_tokens=2).tokens.shape
    (1, 2)
    """
    small, config = assistant.base.config, target.config
    like = dataclasses.replace(
        config,
        num_layers=small.num_layers,
        windows=config.windows[: small.num_layers],
        segment_boundaries=small.segment_boundaries,
    )
    if small.num_layers > config.num_layers or small != like:
        raise ValueError(
            "assistant: expected the first layers of a model like target, got one of "
            f"{small.num_layers} layers of width {small.hidden_size} and vocabulary "
            f"{small.vocab_size}"
        )
    graphdef, state = nnx.split(with_layout(target, "listed"))
    lora = assistant.lora
    if assistant.base.layout == "stacked":
        lora = lora.with_layout(small, "listed")
    return CachedModel(
        apply=_PairApply(Static(graphdef), assistant.relative),
        params={"model": nnx.to_pure_dict(state), "lora": lora},
        init_cache=_PairCaches(config, small.num_layers, target.dtype),
        vocab_size=config.vocab_size,
        experts=1,
        takes_last_only=True,
        max_length=config.max_length,
    )

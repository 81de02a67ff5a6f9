"""A model's first layers with adapters of their own, alone and stepped beside the model."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from logitjax.decoding import CachedModel
from logitjax.models import Cache, Decoder, DecoderConfig, Lora, first_layers, with_layout
from logitjax.ops import Array, Static


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Assistant:
    """An assistant: a model's first layers with adapters that know what to forget.

    Attributes:
        base: from `first_layers`; its arrays are the large model's.
        lora: adapters in the layout of ``base``, the only trained parameters.
        relative: whether its logits are what the adapters add to the base's, zero before training.
            The paper's assistant (False) starts with the logits of the first layers, which it has
            to unlearn first; a few dozen steps do not make it uniform on other text.

    >>> from flax import nnx
    >>> from logitjax.models import DecoderConfig
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> @nnx.jit
    ... def logits(tokens):
    ...     model = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    ...     assistant = Assistant.init(model, 2, rank=4, key=jax.random.key(0))
    ...     return assistant.logits(assistant.hidden_states(tokens)[0])
    >>> logits(jnp.array([[1, 2, 3]])).shape
    (1, 3, 8)

    References:
        Ji et al., Reversing the forget-retain objectives, 2024 (arXiv 2406.08607), section 2.5.
    """

    base: Decoder
    lora: Lora
    relative: bool = False

    @classmethod
    def init(
        cls,
        model: Decoder,
        layers: int,
        *,
        rank: int = 32,
        alpha: float | None = None,
        key: Array,
        relative: bool = False,
    ) -> "Assistant":
        """The first layers of a model, with fresh adapters that change nothing yet.

        Args:
            layers: number of its layers, 8 of 32 in the paper.
            rank: rank of the adapters; 32 in the paper, 16 in its code.
            alpha: scale times rank, as in `Lora.init`; 32 in both, so a scale of 1 or of 2.
        """
        base = first_layers(model, layers)
        lora = Lora.init(base.config, rank, key=key, alpha=alpha, layout=base.layout)
        return cls(base=base, lora=lora, relative=relative)

    @property
    def layers(self) -> int:
        return self.base.config.num_layers

    def hidden_states(
        self, tokens: Int[Array, "batch time"], **options: Any
    ) -> tuple[Float[jax.Array, "batch time hidden"], Cache | None]:
        """As `Decoder.hidden_states`, with the adapters; a relative assistant takes no cache."""
        if not self.relative:
            return self.base.hidden_states(tokens, lora=self.lora, **options)
        return relative_states(self.base, self.lora, tokens), None

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[jax.Array, "*batch vocab"]:
        """As `Decoder.logits`."""
        return self.base.logits(hidden)

    def beside(self, target: Decoder) -> CachedModel:
        """The target and this assistant of its first layers, stepped in one pass.

        Both read the same prompt. Their common layers run both as rows of one batch, and one
        product with the head gives the logits of both, so a step reads each weight once. In
        arithmetic it costs about ``(M + K) / M`` forward passes of the model; in memory traffic,
        only the adapters and K layers of cache more. The assistant is the only expert::

            Ensemble(assistant.beside(target), fuse=fusion.LogitDifference())

        Only the assistant's adapters are read: the weights below them are the target's. A stacked
        target is converted to listed layers, which copies them.

        Raises:
            ValueError: the assistant is not made of a model like ``target``.

        >>> from flax import nnx
        >>> from logitjax import decoding, fusion
        >>> from logitjax.models import DecoderConfig
        >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3,
        ...                        num_heads=2, num_kv_heads=1, head_dim=4)
        >>> target = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))()
        >>> assistant = Assistant.init(target, 1, rank=2, key=jax.random.key(0))
        >>> both = decoding.Ensemble(assistant.beside(target), fuse=fusion.LogitDifference())
        >>> decoding.generate(both, [[1, 2, 3]], max_new_tokens=2).tokens.shape
        (1, 2)
        """
        # Its layers have to be the target's own, since both run in one pass.
        small, config = self.base.config, target.config
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
        # Stacked layers cannot be run in two spans.
        graphdef, state = nnx.split(with_layout(target, "listed"))
        lora = self.lora
        if self.base.layout == "stacked":
            lora = lora.with_layout(small, "listed")
        return CachedModel(
            apply=_PairApply(Static(graphdef), self.relative),
            params={"model": nnx.to_pure_dict(state), "lora": lora},
            init_cache=_PairCaches(config, small.num_layers, target.dtype),
            vocab_size=config.vocab_size,
            experts=1,
            takes_last_only=True,
            max_length=config.max_length,
        )


def relative_states(
    base: Decoder, lora: Lora, tokens: Int[Array, "batch time"], segments: Any = None
) -> Float[jax.Array, "batch time hidden"]:
    """Return the adapters' part of normed hidden states, and by the linear head of logits."""
    # Only the adapters' pass has a gradient.
    before = jax.lax.stop_gradient(base.hidden_states(tokens, segment_ids=segments)[0])
    return added(base.hidden_states(tokens, lora=lora, segment_ids=segments)[0], before)


def added(hidden: jax.Array, before: jax.Array) -> jax.Array:
    """The difference, of two near numbers in float32."""
    return (hidden.astype(jnp.float32) - before.astype(jnp.float32)).astype(hidden.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _PairCache:
    """Caches of a model and its assistant; axis 0 of every leaf is the row."""

    # (keys, values) a common layer, `[rows, 2, heads, slots, dim]`, the model first.
    shared: Any
    rest: Any  # has no 2
    positions: Any
    length: Any


def _hidden_states(
    model: Decoder,
    lora: Lora,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    cache: _PairCache,
    *,
    relative: bool = False,
) -> tuple[
    Float[jax.Array, "batch time hidden"], Float[jax.Array, "batch time hidden"], _PairCache
]:
    """Normed hidden states of a model and of its assistant, and the cache after these tokens."""
    shared = sum(len(segment) for segment in lora.layers)
    (batch, time), positions = tokens.shape, jnp.asarray(positions)

    def doubled(leaf: jax.Array) -> jax.Array:
        # Model and assistant take turns.
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
        # Adapters on every second row.
        lora_rows=jnp.tile(jnp.array([False, True]), batch),
    )
    both = x.reshape(batch, 2, time, -1)  # [batch, model or assistant, time, hidden]
    x, above = model.run_layers(
        both[:, 0],
        positions,
        range(shared, model.config.num_layers),
        span(cache.rest, cache.positions, cache.length),
    )
    cache = _PairCache(
        shared=jax.tree.map(lambda leaf: leaf.reshape(batch, 2, *leaf.shape[1:]), pairs_of(below)),
        # The target's layers above.
        rest=pairs_of(above),
        positions=above.positions,
        length=above.length,
    )
    existing = model.final_norm(both[:, 1])
    if relative:
        existing = added(existing, model.final_norm(both[:, 0]))
    return model.final_norm(x), existing, cache


@dataclasses.dataclass(frozen=True)
class _PairApply:
    graphdef: Static
    relative: bool

    def __call__(self, params: Any, tokens: Any, positions: Any, cache: Any, *, last_only=False):
        model = nnx.merge(self.graphdef.value, params["model"])
        *hidden, cache = _hidden_states(
            model, params["lora"], tokens, positions, cache, relative=self.relative
        )
        both = jnp.stack(hidden)  # [model or assistant, batch, time, hidden]
        return model.logits(both[:, :, -1:] if last_only else both), cache


@dataclasses.dataclass(frozen=True)
class _PairCaches:
    config: DecoderConfig
    layers: int
    dtype: Any

    def __call__(self, rows: int, max_length: int) -> _PairCache:
        cache = Cache.init(self.config, rows, max_length, self.dtype)
        keys = [k for segment in cache.keys for k in segment]
        # Values have the keys' shape.
        pairs = [(k, jnp.zeros_like(k)) for k in keys]

        def doubled(leaf: jax.Array) -> jax.Array:
            return jnp.zeros((leaf.shape[0], 2, *leaf.shape[1:]), leaf.dtype)

        return _PairCache(
            shared=jax.tree.map(doubled, tuple(pairs[: self.layers])),
            rest=tuple(pairs[self.layers :]),
            positions=cache.positions,
            length=cache.length,
        )

"""A model that can be stepped: a function with a cache, its parameters, and an empty cache."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax.models import Cache, Decoder, DecoderConfig, with_layout
from logitjax.ops import Static


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CachedModel:
    """A model as decoding uses it: a function, its parameters and its cache.

    ``apply(params, tokens, positions, cache) -> (logits, cache)`` with int32 ``tokens`` and
    ``positions`` ``[rows, time]`` and float ``logits [rows, time, vocab]``. Its contract:

    - a token of position p >= 0 is stored at p and attends to stored positions up to p, not to
      later ones; passing p again replaces the stored token (drafts can be taken back);
    - position -1 is padding: neither stored nor attended to, and its logits are ignored;
    - ``rows`` is axis 0 of every leaf of the cache, and rows do not mix.

    Attributes:
        apply: the function; hashable, equal for models that can be stacked.
        params: a pytree of arrays.
        init_cache: ``(rows, max_length) -> cache``, an empty one. May be a frozen dataclass: drafts
            set its field `ring_slack` to their length. Its method ``slot_axes(cache)``, the axis of
            each leaf where slot p holds position p (-1: none), lets prompts share prefixes.
        vocab_size: last axis of the logits.
        experts: number of experts whose logits the same pass returns, for models with shared first
            layers. ``apply`` then returns ``[1 + experts + bases, rows, time, vocab]``: the large
            model's logits, then the experts', then the bases'.
        takes_last_only: ``apply`` understands ``last_only=True``: logits of the last token only.
        max_length: maximum number of tokens that the model was made for; None: unknown.
    """

    apply: Callable[..., Any]
    params: Any
    init_cache: Callable[[int, int], Any]
    vocab_size: int
    experts: int = 0
    bases: int = 0
    takes_last_only: bool = False
    max_length: int | None = None

    @classmethod
    def of(cls, model: Any) -> "CachedModel":
        """Make a `CachedModel` of any decoding model.

        Args:
            model: a `logitjax.models.Decoder` (a stacked one is converted to listed layers, which
                decode faster); a triple ``(apply_fn, params, cache)`` whose function keeps the
                contract of `CachedModel` and whose cache is empty, with as many rows as are decoded
                together; a pair ``(apply_fn, params)`` without a cache, ``apply_fn(params, tokens
                [rows, time]) -> logits``, where logits depend on no later tokens: every step reads
                all of the text; or a `CachedModel`, which is returned as it is.

        Raises:
            TypeError: for anything else.
            ValueError: for a triple whose cache has no leaf, or leaves that differ in rows.
        """
        if isinstance(model, cls):
            return model
        if isinstance(model, Decoder):
            return _of_decoder(model)
        if isinstance(model, tuple) and len(model) in (2, 3) and callable(model[0]):
            return _of_triple(*model) if len(model) == 3 else _of_pair(*model)
        raise TypeError(
            "model: expected a Decoder, a CachedModel, (apply_fn, params) or "
            f"(apply_fn, params, cache), got {type(model).__name__}"
        )

    @property
    def outputs(self) -> int:
        return 1 + self.experts + self.bases


@dataclasses.dataclass(frozen=True)
class _DecoderApply:
    # Hashable and equal for models of one architecture, which can then be stacked.
    graphdef: Static
    # Whether the head finds the best token without all logits.
    screens: bool = False
    # Layers whose inputs the cache stores, for a draft head.
    layers: tuple[int, ...] = ()

    def model(self, params: Any) -> Decoder:
        return nnx.merge(self.graphdef.value, params)

    def __call__(self, params: Any, tokens: Any, positions: Any, cache: Any, *, last_only=False):
        model = self.model(params)
        if self.layers:
            entering, given = [], dict(positions=positions, cache=cache[0])
            hidden, stored = model.hidden_states(tokens, **given, entering=entering)
            new = jnp.concatenate([entering[i] for i in self.layers], axis=-1)
            # Padding goes beyond the last slot, which the scatter drops.
            slots = jnp.where(positions < 0, cache[1].shape[1], positions)
            rows = jnp.arange(len(tokens))[:, None]
            cache = stored, cache[1].at[rows, slots].set(new.astype(cache[1].dtype), mode="drop")
        else:
            hidden, cache = model.hidden_states(tokens, positions=positions, cache=cache)
        return model.logits(hidden[:, -1:] if last_only else hidden), cache


@dataclasses.dataclass(frozen=True)
class _DecoderCache:
    """Makes empty caches of a decoder; if drafts may be taken back, a plan raises the slack."""

    config: DecoderConfig
    dtype: Any
    ring_slack: int = 0
    # Numbers per position beside keys and values.
    features: int = 0

    def __call__(self, rows: int, max_length: int) -> Any:
        kinds: Any = dict(layout="listed", ring_slack=self.ring_slack)
        cache = Cache.init(self.config, rows, max_length, self.dtype, **kinds)
        if not self.features:
            return cache
        return cache, jnp.zeros((rows, max_length, self.features), self.dtype)

    def slot_axes(self, cache: Any) -> list[int]:
        if self.features:
            return [*dataclasses.replace(self, features=0).slot_axes(cache[0]), 1]
        # Keys and values are [rows, heads, slots, dim], positions [rows, slots].
        vectors, positions = jax.tree.leaves((cache.keys, cache.values)), cache.positions
        return [2] * len(vectors) + [1] * len(positions) + [-1]


@dataclasses.dataclass(frozen=True, eq=False)
class _GivenCache:
    """The empty cache of a triple; jitted programs must not consume the original."""

    cache: Any
    rows: int

    def __call__(self, rows: int, max_length: int) -> Any:
        if rows == self.rows:
            return jax.tree.map(jnp.array, self.cache)
        # A prompt is read for one slot of several.
        if rows == 1:
            return jax.tree.map(lambda leaf: jnp.array(leaf[:1]), self.cache)
        raise ValueError(f"model: expected a cache of {rows} rows, got {self.rows}")


def _of_decoder(model: Decoder) -> CachedModel:
    graphdef, state = nnx.split(with_layout(model, "listed"))
    return CachedModel(
        apply=_DecoderApply(Static(graphdef), getattr(model.head, "screens", False)),
        params=nnx.to_pure_dict(state),
        init_cache=_DecoderCache(model.config, model.dtype),
        vocab_size=model.config.vocab_size,
        takes_last_only=True,
        max_length=model.config.max_length,
    )


def _of_triple(apply_fn: Callable[..., Any], params: Any, cache: Any) -> CachedModel:
    rows = {leaf.shape[:1] for leaf in jax.tree.leaves(cache)}
    if len(rows) != 1 or rows == {()}:
        raise ValueError(f"model: expected rows on axis 0 of every leaf of the cache, got {rows}")
    count = next(iter(rows))[0]
    ids = jax.ShapeDtypeStruct((count, 1), jnp.int32)
    # Nothing is computed: this only determines the size of the vocabulary.
    logits, _ = jax.eval_shape(apply_fn, params, ids, ids, cache)
    return CachedModel(
        apply=apply_fn,
        params=params,
        init_cache=_GivenCache(cache, count),
        vocab_size=logits.shape[-1],
    )


@dataclasses.dataclass(frozen=True)
class _WholeTexts:
    """Stores the tokens read so far, and reads all of them again."""

    apply_fn: Callable[..., Any]

    def __call__(self, params: Any, tokens: Any, positions: Any, texts: Any) -> Any:
        rows = jnp.arange(len(tokens))[:, None]
        # Padding, at -1, would come last.
        places = jnp.where(positions < 0, texts.shape[1], positions)
        texts = texts.at[rows, places].set(tokens, mode="drop")
        logits = self.apply_fn(params, texts)
        return jnp.take_along_axis(logits, jnp.maximum(positions, 0)[..., None], axis=1), texts


def _no_texts(rows: int, max_length: int) -> jax.Array:
    return jnp.zeros((rows, max_length), jnp.int32)


def _of_pair(apply_fn: Callable[..., Any], params: Any) -> CachedModel:
    logits = jax.eval_shape(apply_fn, params, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    size = logits.shape[-1]
    return CachedModel(
        apply=_WholeTexts(apply_fn), params=params, init_cache=_no_texts, vocab_size=size
    )

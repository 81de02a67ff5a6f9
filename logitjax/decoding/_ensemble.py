"""Several models that step together, and the function that fuses their distributions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.decoding._cached_model import CachedModel
from logitjax.models import Decoder
from logitjax.ops import Array, Static


def as_wide(logits: jax.Array, size: int) -> jax.Array:
    """float32 logits of a vocabulary of this size: cut, or with -inf at the missing ids."""
    # In bf16, differences of models would vanish.
    logits = logits.astype(jnp.float32)[..., :size]
    pad = [(0, 0)] * (logits.ndim - 1) + [(0, size - logits.shape[-1])]
    return jnp.pad(logits, pad, constant_values=-jnp.inf)


@dataclasses.dataclass(frozen=True)
class Group:
    """Streams (by index) stepped by one call of ``apply``, vmapped if there are several."""

    apply: Callable[..., Any]
    init_cache: Callable[[int, int], Any]
    streams: tuple[int, ...]
    outputs: int
    takes_last_only: bool

    @property
    def batch_axis(self) -> int:
        # After the axis of streams, if there is one.
        return len(self.streams) > 1

    def empty(self, rows: int, max_length: int) -> Any:
        cache = self.init_cache(rows, max_length)
        if len(self.streams) == 1:
            return cache
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (len(self.streams), *leaf.shape)), cache
        )

    def forward(self, params: Any, tokens: Any, positions: Any, cache: Any, last_only: bool):
        """Logits of each stream and output in order, each ``[rows, time, vocab]``."""

        def call(*args: Any) -> Any:
            if self.takes_last_only:
                return self.apply(*args, last_only=last_only)
            logits, cache = self.apply(*args)
            return (logits[..., -1:, :] if last_only else logits), cache

        index = np.array(self.streams)
        if len(index) == 1:
            logits, cache = call(params, tokens[index[0]], positions[index[0]], cache)
            return list(logits) if self.outputs > 1 else [logits], cache
        logits, cache = jax.vmap(call)(params, tokens[index], positions[index], cache)
        if self.outputs > 1:
            # [streams, outputs, ...] to one axis.
            logits = logits.reshape(-1, *logits.shape[2:])
        return list(logits), cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static part of an `Ensemble`: which function is called on which stream, and fusion."""

    groups: tuple[Group, ...]
    streams: int
    vocab_sizes: tuple[int, ...]
    experts: int
    bases: int
    fuse: Static | None

    @property
    def token_map(self) -> Any:
        return None if self.fuse is None else getattr(self.fuse.value, "token_map", None)

    @property
    def screens(self) -> bool:
        """Whether there is one decoder, whose head finds the best token without all logits."""
        alone = self.streams == 1 and self.fuse is None
        return alone and getattr(self.groups[0].apply, "screens", False)

    def read(self, tokens: Array) -> list[Array]:
        """Tokens of the large model as each stream reads them."""
        if self.token_map is None:
            return [tokens] * self.streams
        small = self.token_map.to_small(tokens)
        return [tokens, *[small] * (self.streams - 1)]

    @property
    def vocab_size(self) -> int:
        return self.vocab_sizes[0]

    @property
    def outputs(self) -> int:
        return 1 + self.experts + self.bases

    def next_logits(self, rows: int) -> list[jax.ShapeDtypeStruct]:
        """Shapes of the output of `forward` for one position of ``rows`` rows."""
        sizes = [self.vocab_size] * self.outputs
        if self.token_map is not None:
            sizes = list(self.vocab_sizes)
        return [jax.ShapeDtypeStruct((rows, size), jnp.float32) for size in sizes]

    def slot_axes(self, cache: Sequence[Any]) -> list[int] | None:
        """The axis of each cache leaf where slot p holds position p (-1: none); None if unknown."""
        items: list[int] = []
        for group, stored in zip(self.groups, cache, strict=True):
            axes = getattr(group.init_cache, "slot_axes", None)
            if axes is None:
                return None
            items += [axis + group.batch_axis * (axis >= 0) for axis in axes(stored)]  # -1 stays
        return items

    def init_cache(self, rows: int, max_length: int) -> tuple:
        return tuple(group.empty(rows, max_length) for group in self.groups)

    def forward(
        self,
        params: Sequence[Any],
        tokens: Array,
        positions: Array,
        cache: Sequence[Any],
        *,
        last_only: bool = False,
    ) -> tuple[list[jax.Array], tuple]:
        """``[streams, rows, time]`` to float32 logits ``[rows, time, vocab]`` by stream; caches."""
        tokens, positions = jnp.asarray(tokens), jnp.asarray(positions)
        entries: dict[tuple[int, int], jax.Array] = {}
        caches = []
        for group, weights, stored in zip(self.groups, params, cache, strict=True):
            logits, stored = group.forward(weights, tokens, positions, stored, last_only)
            caches.append(stored)
            keys = [(s, o) for s in group.streams for o in range(group.outputs)]
            entries |= dict(zip(keys, logits, strict=True))
        # By stream, then by output: groups need not be in the order of the streams.
        return [self._fit(entries[key]) for key in sorted(entries)], tuple(caches)

    def at_large(self, logits: jax.Array) -> jax.Array:
        """float32 logits of a small model at the large one's token ids."""
        logits = self._fit(logits)
        return logits if self.token_map is None else self.token_map.to_large(logits)

    def with_ring_slack(self, slack: int) -> "Plan":
        """The same plan with caches from which this many tokens can be taken back."""

        def widened(init_cache: Any) -> Any:
            if not hasattr(init_cache, "ring_slack"):
                return init_cache
            return dataclasses.replace(init_cache, ring_slack=max(slack, init_cache.ring_slack))

        groups = [
            dataclasses.replace(group, init_cache=widened(group.init_cache))
            for group in self.groups
        ]
        return dataclasses.replace(self, groups=tuple(groups))

    def _fit(self, logits: jax.Array) -> jax.Array:
        # Vocabularies of one tokenizer differ in padding rows at the end.
        size = logits.shape[-1] if self.token_map is not None else self.vocab_size
        return as_wide(logits, size)

    def combine(self, logits: Sequence[jax.Array]) -> tuple[jax.Array, Any]:
        """The distribution to decode from, and the fusion's info."""
        if self.fuse is None:
            return logits[0], {}
        experts, bases = list(logits[1 : 1 + self.experts]), list(logits[1 + self.experts :])
        # Strategies take arrays, even without experts or bases.
        empty = jnp.zeros((0, *logits[0].shape), logits[0].dtype)
        vocab_where = None
        if min(self.vocab_sizes) < self.vocab_size and self.token_map is None:
            # Ids that some model lacks cannot be fused.
            vocab_where = np.arange(self.vocab_size) < min(self.vocab_sizes)
        return self.fuse.value(
            logits[0],
            jnp.stack(experts) if experts else empty,
            jnp.stack(bases) if bases else empty,
            vocab_where=vocab_where,
        )


def _kind(model: CachedModel) -> Any:
    # Also the types: stacked leaves become one array.
    shapes = jax.tree.map(lambda leaf: (leaf.shape, jnp.dtype(leaf.dtype)), model.params)
    return model.apply, model.init_cache, jax.tree.structure(model.params), str(shapes)


class Ensemble:
    """A large model with experts and bases, stepped together and fused token by token.

    Each model has its own prompt, positions and cache; the generated tokens are common to all.

    Args:
        large: the model whose distribution is changed: a `Decoder`, a triple or a `CachedModel`.
        experts: models tuned towards something.
        bases: models that the experts were tuned from: one for all, or one for each expert.
        fuse: ``fuse(large, experts, bases, vocab_where=None) -> (fused, info)`` with logits
            ``[*batch, vocab]``, experts and bases along a new leading axis (of length 1 for a base
            that serves all, 0 for none); any strategy of `logitjax.fusion`. ``info`` is a pytree of
            arrays. With a ``token_map`` small models read mapped tokens; logits come unmapped.
        stack: run small models of one architecture as one vmapped call, on a stacked copy.

    Raises:
        ValueError: several models without ``fuse``, or bases neither one nor one for each expert.

    >>> from logitjax.models import load_model
    >>> models = [load_model(f"tiny:{seed}") for seed in range(3)]
    >>> def proxy(large, experts, bases, vocab_where=None):
    ...     return large + experts[0] - bases[0], {}
    >>> both = Ensemble(models[0], experts=models[1:2], bases=models[2:], fuse=proxy)
    >>> both.plan.streams, [group.streams for group in both.plan.groups]
    (3, [(0,), (1, 2)])
    """

    def __init__(
        self,
        large: Any,
        *,
        experts: Sequence[Any] = (),
        bases: Sequence[Any] = (),
        fuse: Callable[..., Any] | None = None,
        stack: bool = True,
    ):
        members = [CachedModel.of(m) for m in (large, *experts, *bases)]
        several = len(members) > 1 or members[0].outputs > 1
        if several and fuse is None:
            raise ValueError("fuse: several models need a function that fuses their logits")
        if len(bases) not in (0, 1, max(1, len(experts))):
            raise ValueError(f"bases: expected one or {len(experts)} of them, got {len(bases)}")
        inner = [m for m in members if m.outputs > 1]
        if inner and len(members) > 1:
            raise ValueError("large: expected a model without its own experts beside others")
        kinds: dict[Any, list[int]] = {}
        for i, member in enumerate(members):
            # The large model keeps its own call: stacking copies the most for the least gain.
            shared = stack and i > 0
            kinds.setdefault(_kind(member) if shared else i, []).append(i)
        groups, params = [], []
        for streams in kinds.values():
            first = members[streams[0]]
            groups.append(
                Group(
                    apply=first.apply,
                    init_cache=first.init_cache,
                    streams=tuple(streams),
                    outputs=first.outputs,
                    takes_last_only=first.takes_last_only,
                )
            )
            trees = [members[i].params for i in streams]
            one = len(trees) == 1
            params.append(trees[0] if one else jax.tree.map(lambda *x: jnp.stack(x), *trees))
        self.plan = Plan(
            groups=tuple(groups),
            streams=len(members),
            vocab_sizes=tuple(m.vocab_size for m in members),
            experts=inner[0].experts if inner else len(experts),
            bases=inner[0].bases if inner else len(bases),
            fuse=None if fuse is None else Static(fuse),
        )
        self.params: tuple = tuple(params)
        lengths = [m.max_length for m in members if m.max_length is not None]
        self.max_length: int | None = min(lengths, default=None)  # the shortest

    @property
    def decoder(self) -> Decoder:
        """The only model, with listed layers.

        Raises:
            ValueError: There are several models, or the model is not a decoder.
        """
        apply = self.plan.groups[0].apply
        if self.plan.streams > 1 or not hasattr(apply, "model"):
            raise ValueError("model: expected one decoder alone, got several or another function")
        return apply.model(self.params[0])

"""A model and its assistant as one thing that is stepped."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from logitjax.decoding._cached_model import CachedModel, DecoderCache, Static
from logitjax.models import Decoder, with_layout
from logitjax.unlearning._assistant import (
    Assistant,
    PairCache,
    init_pair_cache,
    listed_lora,
    paired_hidden_states,
)


@dataclasses.dataclass(frozen=True)
class _PairApply:
    graphdef: Static

    def __call__(self, params: Any, tokens: Any, positions: Any, cache: Any, *, last_only=False):
        model = nnx.merge(self.graphdef.value, params["model"])
        *hidden, cache = paired_hidden_states(model, params["lora"], tokens, positions, cache)
        both = jnp.stack(hidden)
        return model.logits(both[:, :, -1:] if last_only else both), cache


@dataclasses.dataclass(frozen=True)
class _PairCaches(DecoderCache):
    layers: int

    def __call__(self, rows: int, max_length: int) -> PairCache:  # type: ignore[override]
        return init_pair_cache(
            self.config, self.layers, rows, max_length, self.dtype, ring_slack=self.ring_slack
        )


def paired_model(target: Decoder, assistant: Assistant, *, ring_slack: int = 0) -> CachedModel:
    """A model and the assistant made of its first layers, stepped in one pass.

    Both read the same prompt. The layers that they have in common run both as rows of one batch
    and one product with the head gives the logits of both, so that a step reads each weight once:
    it costs about ``(M + K) / M`` forward passes of the model in arithmetic, and no more memory
    traffic than the adapters and K layers of cache. The assistant is the one expert::

        Ensemble(paired_model(target, assistant), fuse=fusion.LogitDifference())

    Args:
      target: the large model. A stacked one is converted to listed layers, which copies them.
      assistant: from `init_assistant` of this model, with trained adapters. Only
        its adapters are read: the weights below them are the target's.
      ring_slack: see `cached_model`.

    Returns:
      A `CachedModel` with one expert.

    Raises:
      ValueError: the assistant is not made of a model like ``target``.

    >>> import jax
    >>> from logitjax import decoding, fusion
    >>> from logitjax.models import DecoderConfig
    >>> from logitjax.unlearning import init_assistant
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> target = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    >>> assistant = init_assistant(target, 1, rank=2, key=jax.random.key(0))
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
    return CachedModel(
        apply=_PairApply(Static(graphdef)),
        params={"model": nnx.to_pure_dict(state), "lora": listed_lora(assistant)},
        init_cache=_PairCaches(config, target.dtype, ring_slack, small.num_layers),
        vocab_size=config.vocab_size,
        experts=1,
        takes_last_only=True,
        max_length=config.max_length,
    )

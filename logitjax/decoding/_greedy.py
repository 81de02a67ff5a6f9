"""Greedy decoding, the shortest way to an answer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from logitjax.decoding._generate import generate
from logitjax.decoding._step import DecodeOptions
from logitjax.ops import Array


def greedy_generate(
    model: Any,
    prompt_tokens: Int[Array, "batch time"] | Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
) -> Int[jax.Array, "batch new"]:
    """The most likely next token, again and again; `generate` without its options.

    Prompts of different lengths go in as a list of lists. A stacked model is converted on every
    call: hand in a listed one to decode often.

    Args:
      model: the decoder, or anything else `generate` takes.
      prompt_tokens: ids, one prompt or several.
      max_new_tokens: how many to add.
      eos_id: rows stop after this token; what follows is filled with it. Without it nothing stops.

    Returns:
      int32 ``[batch, max_new_tokens]``, the new tokens only.

    Raises:
      ValueError: for an empty prompt or ``max_new_tokens`` below 1.

    >>> from flax import nnx
    >>> from logitjax.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    >>> greedy_generate(model, [1, 2, 3], max_new_tokens=4).shape
    (1, 4)
    """
    out = generate(
        model,
        prompt_tokens,
        max_new_tokens=max_new_tokens,
        stop_ids=() if eos_id is None else (eos_id,),
        options=DecodeOptions(pad_id=0 if eos_id is None else eos_id),
    )
    return jnp.asarray(out.tokens)

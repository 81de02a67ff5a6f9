"""Greedy decoding of one model with its cache, in one compiled loop."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from logitjax.models import Decoder, with_layout
from logitjax.ops import Array


@functools.partial(jax.jit, static_argnames=("graphdef", "max_new_tokens"))
def _generate(graphdef, state, tokens, lengths, eos_id, *, max_new_tokens: int):
    model = nnx.merge(graphdef, state)
    batch, time = tokens.shape
    cache = model.init_cache(batch, time + max_new_tokens)
    index = jnp.arange(time, dtype=jnp.int32)
    positions = jnp.where(index < lengths[:, None], index, -1)
    hidden, cache = model.hidden_states(tokens, positions=positions, cache=cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    first = model.logits(last)[:, 0].argmax(axis=-1).astype(jnp.int32)
    out = jnp.full((batch, max_new_tokens), eos_id, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        step, _, done, _, _ = carry
        return (step < max_new_tokens) & ~done.all()

    def advance(carry):
        step, token, done, cache, out = carry
        hidden, cache = model.hidden_states(token[:, None], cache=cache)
        token = model.logits(hidden)[:, 0].argmax(axis=-1).astype(jnp.int32)
        token = jnp.where(done, eos_id, token)
        return step + 1, token, done | (token == eos_id), cache, out.at[:, step].set(token)

    carry = (jnp.int32(1), first, first == eos_id, cache, out)
    return jax.lax.while_loop(unfinished, advance, carry)[-1]


def greedy_generate(
    model: Decoder,
    prompt_tokens: Int[Array, "batch time"] | Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_id: int | None = None,
) -> Int[jax.Array, "batch new"]:
    """The most likely next token, again and again.

    Prompts of different lengths go in as a list of lists; they are padded on the right and each
    row continues where its own prompt ends. A stacked model is converted on every call: hand in a
    listed one to decode often.

    Args:
      model: the decoder.
      prompt_tokens: ids, one prompt or several.
      max_new_tokens: how many to add.
      eos_id: rows stop after this token; what follows is filled with it. Without it nothing stops.

    Returns:
      int32 ``[batch, max_new_tokens]``, the new tokens only.

    Raises:
      ValueError: for an empty prompt or ``max_new_tokens`` below 1.

    >>> from logitjax.models import DecoderConfig
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    >>> greedy_generate(model, [1, 2, 3], max_new_tokens=4).shape
    (1, 4)
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if isinstance(prompt_tokens, jax.Array | np.ndarray):
        rows = [np.asarray(row) for row in prompt_tokens]
    elif len(prompt_tokens) and np.ndim(prompt_tokens[0]) == 0:
        rows = [np.asarray(prompt_tokens)]
    else:
        rows = [np.asarray(row) for row in prompt_tokens]
    lengths = np.array([len(row) for row in rows], np.int32)
    if not len(rows) or not lengths.all():
        raise ValueError(f"prompt_tokens must hold at least one token a row, got lengths {lengths}")
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for row, target in zip(rows, tokens, strict=True):
        target[: len(row)] = row
    graphdef, state = nnx.split(with_layout(model, "listed"))
    stop = np.int32(-1 if eos_id is None else eos_id)
    return _generate(
        graphdef,
        nnx.to_pure_dict(state),
        tokens,
        lengths,
        stop,
        max_new_tokens=max_new_tokens,
    )

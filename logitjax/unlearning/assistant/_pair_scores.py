"""Programs that score tokens under a model, or under a model minus its assistant."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax import ops
from logitjax.unlearning.assistant._assistant import Assistant

_LEAST_VARIANCE = 1e-6


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def token_scores(
    graphdef: Any,
    static: Any,
    what: str,
    state: Any,
    assistant_state: Any,
    alphas: Any,
    tokens: Any,
    at: Any,
    states: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Score each token under a model minus its assistant; also whether it is the most likely."""
    # Parts of the assistant; base is None without one.
    base, fuse, relative = static
    model = nnx.merge(graphdef, state)
    sides = [states_at(graphdef, state, tokens, at) if states is None else states]
    assistant = None
    if base is not None:
        weights, lora = assistant_state
        assistant = Assistant(base=nnx.merge(base, weights), lora=lora, relative=relative)
        sides.append(_picked(assistant.hidden_states(tokens)[0], at))
    labels = jnp.asarray(tokens)[:, 1:]

    def one(block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        at, *hidden = block
        logits, shift = model.logits(hidden[0]), None
        if assistant is not None:
            fused, _ = fuse(logits, assistant.logits(hidden[1])[None], None)
            # Linear in alpha: one fusion for all.
            shift = fused - logits
        expected = labels.ravel().at[at].get(mode="clip")

        def weighed(alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = logits if shift is None else logits + alpha * shift
            log_z = ops.logsumexp(z)
            nll = log_z - jnp.take_along_axis(z, expected[:, None], axis=-1)[:, 0]
            greedy = z.argmax(axis=-1) == expected
            if what == "nll":
                return nll, greedy
            log_p = z - log_z[:, None]
            p = jnp.exp(log_p)
            mean = jnp.where(p > 0, p * log_p, 0.0).sum(-1)  # 0 log 0 is 0
            off = jnp.where(p > 0, p * jnp.square(log_p - mean[:, None]), 0.0).sum(-1)
            return (mean + nll) / jnp.sqrt(jnp.maximum(off, _LEAST_VARIANCE)), greedy

        # Not vmap: logits of one alpha at a time.
        return jax.lax.map(weighed, alphas)

    def back(values: jax.Array) -> jax.Array:
        values = jnp.moveaxis(values, 1, 0).reshape(len(alphas), -1)
        rows = jnp.zeros((len(alphas), labels.size), values.dtype)
        # Padding is dropped.
        rows = rows.at[:, at.ravel()].set(values, mode="drop")
        return jnp.pad(rows.reshape(-1, *labels.shape), ((0, 0), (0, 0), (1, 0)))

    nll, greedy = map(back, jax.lax.map(one, (at, *sides)))
    return nll, greedy


@functools.partial(jax.jit, static_argnums=0)
def states_at(graphdef: Any, state: Any, tokens: Any, at: Any) -> jax.Array:
    """A model's normed states at positions that need the head, `[blocks, block, hidden]`."""
    return _picked(nnx.merge(graphdef, state).hidden_states(tokens)[0], at)


def _picked(hidden: jax.Array, at: Any) -> jax.Array:
    # The last predicts nothing.
    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    # Padding lies past the end.
    return flat.at[jnp.asarray(at)].get(mode="clip")

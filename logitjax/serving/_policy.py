"""What leaves the server: the engine's options, and what becomes of log-probabilities."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.decoding import DecodeOptions
from logitjax.leakage import LogitPolicy


def decode_options(
    policy: LogitPolicy, *, seed: int, top_logprobs: int, end_ids: Sequence[int]
) -> DecodeOptions:
    """Options of an engine that keeps to a policy."""
    return DecodeOptions(
        logprobs=top_logprobs > 0,
        top_logprobs=top_logprobs,
        logprobs_of="model" if policy.bias == "sampling" else "adjusted",
        repetition=True,
        max_logit_bias=0 if policy.bias == "none" else policy.max_biased,
        max_stop_ids=max(8, len(end_ids)),
        processors=(_processor(policy, seed),) if _disturbs(policy) else (),
    )


def _disturbs(policy: LogitPolicy) -> bool:
    return bool(policy.noise or policy.soft_cap)


def reported(policy: LogitPolicy, values: np.ndarray) -> np.ndarray:
    """What a policy makes of log-probabilities that are about to leave."""
    values = np.maximum(values, -1e30 if policy.floor is None else policy.floor)
    return values if policy.decimals is None else np.round(values.astype(float), policy.decimals)


def prompt_extra(tokens: Sequence[int], policy: LogitPolicy) -> Any:
    """What the engine keeps beside a request: the prompt's number, where noise depends on it."""
    return np.uint32(policy.prompt_number(tokens)) if _disturbs(policy) else None


def idle_extra(policy: LogitPolicy) -> Any:
    """The same of a slot that nobody has asked yet."""
    return np.uint32(0) if _disturbs(policy) else None


def _processor(policy: LogitPolicy, seed: int) -> Any:
    def process(logits: jax.Array, state: Any) -> jax.Array:
        api = jax.random.key(seed)
        # The same prompt, and the same place in its answer, the same noise.
        keys = jax.vmap(lambda n, at: jax.random.fold_in(jax.random.fold_in(api, n), at))(
            jnp.asarray(state.extra), state.count
        )
        return policy.disturb(logits, keys, api_key=api)

    return process

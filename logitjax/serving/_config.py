"""What a server takes and reports, and the scheduler that keeps to it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import leakage
from logitjax.decoding import DecodeOptions, Ensemble
from logitjax.serving._scheduler import Scheduler
from logitjax.serving._schema import ServerLimits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How a server treats requests.

    Attributes:
        model: Name of the model in the API.
        policy: What is reported of its log-probabilities, and whether a logit bias is taken.
        policy_seed: Seed of the policy's noise.
        top_logprobs: Number of log-probabilities reported per token; 0 for none.
        slots: Number of requests decoded together.
        max_waiting: Number of requests that may wait for a slot.
        max_length: Most tokens of a request, prompt included.
        max_tokens: Most new tokens of a request.
        max_body_bytes: Most bytes of a request.
        api_key: Key that clients have to show; None lets anybody ask.

    Raises:
        ValueError: The policy's parts contradict each other.
    """

    model: str
    policy: leakage.LogitPolicy
    policy_seed: int = 0
    top_logprobs: int = 5
    slots: int = 8
    max_waiting: int = 64
    max_length: int = 1024
    max_tokens: int = 256
    max_body_bytes: int = 1 << 20
    api_key: str | None = None

    def __post_init__(self) -> None:
        if self.policy.bias != "none" and self.policy.soft_cap:
            raise ValueError("soft_cap: with it bias must be none, it would cap the bias too")
        if self.policy.bias == "sampling" and self.policy.noise:
            raise ValueError("noise: with it bias must be none or reported")

    @property
    def limits(self) -> ServerLimits:
        """What one request may ask for."""
        return ServerLimits(
            max_tokens=self.max_tokens,
            max_logprobs=self.top_logprobs,
            max_logit_bias=self.policy.max_biased,
            bias_limit=self.policy.bias_limit,
            max_body_bytes=self.max_body_bytes,
            logit_bias=self.policy.bias != "none",
        )


def make_scheduler(model: Ensemble, end_ids: Sequence[int], config: ServerConfig) -> Scheduler:
    """The scheduler whose engine keeps to a policy."""
    policy = config.policy
    options = DecodeOptions(
        logprobs=config.top_logprobs > 0,
        top_logprobs=config.top_logprobs,
        logprobs_of="model" if policy.bias == "sampling" else "adjusted",
        repetition=True,
        max_logit_bias=0 if policy.bias == "none" else policy.max_biased,
        max_stop_ids=max(8, len(end_ids)),
        processors=(_processor(policy, config.policy_seed),) if _disturbs(policy) else (),
    )
    return Scheduler(
        model,
        slots=config.slots,
        max_length=config.max_length,
        options=options,
        max_waiting=config.max_waiting,
        report=lambda values: reported(policy, values),
        extra=np.uint32(0) if _disturbs(policy) else None,
    )


def _disturbs(policy: leakage.LogitPolicy) -> bool:
    return bool(policy.noise or policy.soft_cap)


def reported(policy: leakage.LogitPolicy, values: np.ndarray) -> np.ndarray:
    """What a policy makes of log-probabilities that are about to leave."""
    values = np.maximum(values, -1e30 if policy.floor is None else policy.floor)
    return values if policy.decimals is None else np.round(values.astype(float), policy.decimals)


def prompt_extra(tokens: Sequence[int], policy: leakage.LogitPolicy) -> Any:
    """What the engine keeps beside a request: the prompt's number, where noise depends on it."""
    return np.uint32(policy.prompt_number(tokens)) if _disturbs(policy) else None


def _processor(policy: leakage.LogitPolicy, seed: int) -> Any:
    def process(logits: jax.Array, state: Any) -> jax.Array:
        api = jax.random.key(seed)
        # The same prompt, and the same place in its answer, the same noise.
        keys = jax.vmap(lambda n, at: jax.random.fold_in(jax.random.fold_in(api, n), at))(
            jnp.asarray(state.extra), state.count
        )
        return policy.disturb(logits, keys, api_key=api)

    return process

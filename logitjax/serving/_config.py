"""What a server takes and reports."""

import dataclasses

from logitjax import leakage
from logitjax.serving._keys import Key
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
        keys: Whom it answers, and what each may spend.

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
    keys: tuple[Key, ...] = (Key(),)

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

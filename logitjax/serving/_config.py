"""Configuration and limits of a server."""

import dataclasses
import math

from logitjax import leakage
from logitjax.ops import checks
from logitjax.serving._errors import ApiError
from logitjax.serving._keys import Key
from logitjax.serving._policy import CHOICES, Disclosure
from logitjax.storage import option


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """A server's limits, and the policy of what it reports.

    Attributes:
        model: Name of the model in the API.
        policy: Which log-probabilities are reported, and whether a logit bias is accepted.
        choices: How requests may choose tokens. `free`: by every field, which gives the logits away
            even if their values are hidden. `plain`: by temperature, top_k, top_p and min_p on
            coarse joint grids, with an independent key for each draw, so that observing a token of
            probability p takes about 1/p answers. `metered`: the same, with budgets in nats.
        schemas: Whether `plain` and `metered` allow schemas, which can force unlikely tokens.
        context_nats: Maximum nats that `metered` reveals about one context, to all keys together.
        policy_seed: Seed of the policy's noise and of sampling; None for a new one at each start.
        slots: Number of requests decoded together.
        max_waiting: Number of requests that may wait for a slot.
        max_length: Maximum number of tokens of a request, prompt included.
        max_tokens: Maximum number of new tokens of a request.
        max_body_bytes: Maximum number of bytes of a request.
        body_seconds: Maximum number of seconds for the body of a request to arrive.
        prefill_chunk: Maximum number of prompt tokens read between two decoding steps.
        prefill_rows: Number of prompts read at once.
        prefix_cache_mb: Memory in MB for shared prefixes of prompts; 0 turns sharing off.
        audit_log: File that records what each key received; None for none.
        keys: Keys of clients, with the budget of each.
        hidden_states: Also serve hidden states and the head at `/v1/hidden_states`, for students of
            this model. This reveals everything that the policy withholds.
        allow_origins: Origins whose pages may send requests from a browser; `*` for all.

    Raises:
        ValueError: A server cannot keep this policy.
    """

    model: str
    policy: leakage.LogitPolicy
    choices: str = option("free", choices=CHOICES)
    schemas: bool = False
    context_nats: float = 200.0
    policy_seed: int | None = None
    slots: int = 8
    max_waiting: int = 64
    max_length: int = 1024
    max_tokens: int = 256
    max_body_bytes: int = 1 << 20
    body_seconds: float = 30.0
    prefill_chunk: int = 128
    prefill_rows: int = 4
    prefix_cache_mb: int = 0
    audit_log: str | None = None
    keys: tuple[Key, ...] = (Key(),)
    hidden_states: bool = False
    allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("slots", "max_tokens", "max_body_bytes", "prefill_chunk", "prefill_rows"):
            checks.between(getattr(self, name), 1, 2**31 - 1, name)
        for name in ("max_waiting", "prefix_cache_mb"):
            checks.between(getattr(self, name), 0, 2**31 - 1, name)
        checks.positive(self.context_nats, "context_nats")
        # Reports the parts of the policy that a server cannot keep.
        if not Disclosure(self.policy, choices=self.choices).free and self.hidden_states:
            raise ValueError(f"hidden_states: expected False with choices={self.choices}, got True")
        if any(key.nats is not None for key in self.keys) and self.choices != "metered":
            raise ValueError(f"keys: expected no nats with choices={self.choices}, got some")

    @property
    def nats(self) -> float:
        """Maximum number of nats revealed about a context."""
        return self.context_nats if self.choices == "metered" else math.inf

    @property
    def notice(self) -> str:
        """One line about how much the answers of this server reveal."""
        if self.choices == "free":
            warning = "answers reveal the logits, whichever of their values are hidden"
            return f"choices=free: {warning} (docs/leakage.md)"
        notice = "choices=plain: a token of probability p is revealed by about 1/p answers"
        if self.choices == "plain":
            return notice
        kept = f"kept in {self.audit_log}" if self.audit_log else "of this run: a restart forgets"
        return f"choices=metered: at most {self.context_nats:g} nats of a context, {kept}"


def check_model(config: ServerConfig, name: str | None) -> None:
    """Whether a request names the served model; no name means it too."""
    if name not in (None, "", config.model):
        wrong = f"the model is {config.model!r}, not {name[:60]!r}"
        raise ApiError(404, wrong, param="model", code="model_not_found")

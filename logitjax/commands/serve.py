"""Serve a model, or several fused ones, over OpenAI's API.

    logitjax serve --model=smollm2 --port=8000
    logitjax serve --model=DIR --expert=runs/expert --base=runs/base --fusion=dynamic
    logitjax serve --model=DIR --assistant=runs/forgotten/assistant --alpha=0.4
    logitjax serve --model=smollm2 --api_key=secret --top_logprobs=5 --bias=sampling --decimals=2

It prints one line with its address, and answers `/v1/completions`, `/v1/chat/completions`,
`/v1/models`, `/health`, `/ready` (once everything is compiled), `/metrics` (for Prometheus) and
`/openapi.json`. Any OpenAI client works with `base_url=http://127.0.0.1:8000/v1`. It listens on
loopback unless `--host` says otherwise.

Requests share the slots of one decoding engine and come and go independently. If too many wait,
others get 429 with `Retry-After`. Prompts are read in pieces while other requests decode, and a
common beginning of prompts is read once. After SIGTERM running answers may go on for `--drain`
seconds.

The flags of the policy set what reported log-probabilities give away: `--top_logprobs`,
`--sampled`, `--bias` (none, sampling, reported), `--decimals`, `--noise`, `--floor`, `--soft_cap`.
A chosen token's own value is reported if it is among the top ones, or with `--sampled`. See
docs/leakage.md for what each flag is worth, and `logitjax audit` to measure it.
"""

import dataclasses
import signal
from typing import Literal

from absl import logging

from logitjax import leakage
from logitjax.commands.cli import field
from logitjax.commands.line_up import load_line_up, longest

# Most tokens of a request, where neither flags nor models say less.
_USUAL_LENGTH = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The models, the server's limits, and the policy of what is reported."""

    model: str = field("smollm2", "Model that is served alone or steered.")
    expert: tuple[str, ...] = field((), "Tuned small model.")
    base: tuple[str, ...] = field(
        (), "Model that the experts were tuned from: one, or one for each."
    )
    fusion: str | None = field(None, "Strategy that fuses their logits: NAME or NAME:key=value,...")
    assistant: str | None = field(
        None,
        "Folder of an assistant by `logitjax unlearn`. The model forgets what the assistant knows.",
    )
    alpha: float | None = field(
        None, "Weight of the assistant. By default the one that was written with it."
    )
    served_name: str | None = field(
        None, "Name of the model in the API. By default that of --model."
    )
    dtype: Literal["float32", "bfloat16"] = field("float32", "Type of weights and computation.")
    host: str = field("127.0.0.1", "Address to listen on.")
    port: int = field(8000, "Port to listen on. 0 takes a free one.", minimum=0)
    api_key: str | None = field(
        None, "Key that clients have to send. Without keys anybody may ask."
    )
    api_keys: str | None = field(
        None, "File of keys, one JSON object a line: name, secret, and what the key may spend."
    )
    allow_origin: tuple[str, ...] = field(
        (), "Origin whose pages may ask from a browser. * allows all."
    )
    slots: int = field(8, "Number of requests decoded together.", minimum=1)
    max_waiting: int = field(64, "Number of requests that may wait for a slot.", minimum=0)
    max_length: int | None = field(
        None,
        "Largest number of tokens of a request, prompt included. By default 1024, or fewer if the "
        "models read no more.",
        minimum=2,
    )
    max_tokens: int = field(256, "Largest number of new tokens of a request.", minimum=1)
    max_body_bytes: int = field(1 << 20, "Largest number of bytes of a request.", minimum=1)
    max_connections: int = field(512, "Largest number of connections at once.", minimum=1)
    idle_timeout: float = field(15.0, "Seconds that a connection may wait for a request.")
    body_timeout: float = field(30.0, "Seconds that the body of a request may take to arrive.")
    request_timeout: float = field(600.0, "Seconds that a client may take to read an answer.")
    drain: float = field(30.0, "Seconds that answers may go on after SIGTERM.")
    prefill_chunk: int = field(
        128, "Number of prompt tokens read between decoding steps.", minimum=1
    )
    prefill_rows: int = field(4, "Number of prompts read at once.", minimum=1)
    prefix_cache_mb: int = field(
        256, "Memory in MB for common beginnings of prompts. 0 reads every prompt whole.", minimum=0
    )
    audit_log: str | None = field(
        None,
        "File that records what was given to whom. After a restart keys' budgets go on from it.",
    )
    top_logprobs: int = field(5, "Number of log-probabilities reported for each token.", minimum=0)
    bias: Literal["none", "sampling", "reported"] = field(
        "none", "Whether a logit bias is accepted, and what it moves."
    )
    decimals: int | None = field(None, "Decimals of reported log-probabilities.")
    noise: float = field(0.0, "Noise on the logits in nats. The same prompt gets the same noise.")
    floor: float | None = field(None, "Lowest log-probability that is reported.")
    soft_cap: float | None = field(None, "Soft cap of the logits in nats.")
    sampled: bool = field(False, "Report a chosen token's own log-probability, whatever its rank.")
    policy_seed: int | None = field(
        None, "Seed of the noise and of draws. By default a new one at every start."
    )


def run(config: Config) -> None:
    """Loads the models, then answers until it is stopped."""
    from logitjax import serving  # needs the extra `serve`

    policy = leakage.LogitPolicy(
        returns="logprobs" if config.top_logprobs or config.sampled else "token",
        top_k=config.top_logprobs or (0 if config.sampled else None),
        sampled=config.sampled,
        bias=config.bias,
        decimals=config.decimals,
        noise=config.noise,
        floor=config.floor,
        soft_cap=config.soft_cap,
    )
    if config.api_key is not None and config.api_keys is not None:
        raise ValueError("api_key, api_keys: expected one of them, got both")
    keys = (serving.Key(secret=config.api_key),)
    if config.api_keys is not None:
        keys = serving.read_keys(config.api_keys)
    # Before models are loaded: it says which settings contradict each other.
    server = serving.ServerConfig(
        model=config.served_name or config.model,
        policy=policy,
        policy_seed=config.policy_seed,
        slots=config.slots,
        max_waiting=config.max_waiting,
        max_length=_max_length(config),
        max_tokens=config.max_tokens,
        max_body_bytes=config.max_body_bytes,
        body_seconds=config.body_timeout,
        prefill_chunk=config.prefill_chunk,
        prefill_rows=config.prefill_rows,
        prefix_cache_bytes=config.prefix_cache_mb << 20,
        audit_log=config.audit_log,
        keys=keys,
        allow_origins=config.allow_origin,
    )
    if config.audit_log is not None:
        # Nor may it turn out after the models are loaded that nothing can be written.
        open(config.audit_log, "a").close()
    ensemble, tokenizer, ends = load_line_up(config)
    logging.set_verbosity(logging.INFO)
    app = serving.build_app(ensemble, tokenizer, ends, server)
    listening = serving.Listening(
        host=config.host,
        port=config.port,
        connections=config.max_connections,
        idle_seconds=config.idle_timeout,
        request_seconds=config.request_timeout,
        drain_seconds=config.drain,
    )
    try:
        serving.run_server(app, listening)
    except KeyboardInterrupt:
        # As at SIGTERM: a thread that still compiles must not be part of Python's own end.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


def _max_length(config: Config) -> int:
    """Most tokens of a request.

    Raises:
        ValueError: More are asked for than one of the models can read.
    """
    most = longest(config.model, *config.expert, *config.base)
    if config.max_length is None:
        return min(_USUAL_LENGTH, most)
    if config.max_length > most:
        raise ValueError(
            f"max_length: expected at most {most}, which the models can read, got "
            f"{config.max_length}"
        )
    return config.max_length

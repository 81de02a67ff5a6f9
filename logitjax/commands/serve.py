"""Serve a model, or several fused ones, over OpenAI's API.

    logitjax serve --model=smollm2 --port=8000
    logitjax serve --model=DIR --expert=runs/expert --base=runs/base --fusion=dynamic
    logitjax serve --model=DIR --assistant=runs/forgotten/assistant --alpha=0.4
    logitjax serve --model=DIR --head=runs/head
    logitjax serve --model=smollm2 --api_key=secret --top_logprobs=5 --bias=sampling --decimals=2

It prints one line with its address, and answers `/v1/completions`, `/v1/chat/completions`,
`/v1/models`, `/health`, `/ready` (once everything is compiled), `/metrics` (for Prometheus) and
`/openapi.json`. Any OpenAI client works with `base_url=http://127.0.0.1:8000/v1`. It listens on
loopback unless `--host` says otherwise.

Requests share the slots of one decoding engine and start and end independently. If too many wait,
others get 429 with `Retry-After`. Prompts are read in chunks while other requests decode, and
shared prefixes are read once. After SIGTERM, running answers may continue for `--drain_seconds`.

The flags of the policy limit what log-probabilities reveal: `--top_logprobs`, `--sampled`, `--bias`
(none, sampling, reported), `--decimals`, `--noise`, `--floor`. A chosen token's own value is
reported if it is among the top ones, or with `--sampled`. The choice of tokens reveals the same
logits, unless `--choices` is `plain` or `metered`. docs/leakage.md describes the effect of each
flag, and `logitjax audit` measures it.
"""

import dataclasses

from absl import logging

from logitjax import leakage, serving
from logitjax.commands.cli import field, nested
from logitjax.commands.line_up import LineUp

# Maximum number of tokens of a request, if neither flags nor models set fewer.
_USUAL_LENGTH = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The models, the server's limits, and the policy of its reports."""

    line_up: LineUp = nested(LineUp())
    served_name: str | None = field(
        None, "Name of the model in the API. By default the last part of --model."
    )
    server: serving.ServerConfig = nested(
        serving.ServerConfig(model="", policy=leakage.LogitPolicy(top_k=5), prefix_cache_mb=256),
        without=["model", "max_length", "keys"],
        rename={"top_k": "top_logprobs"},
    )
    listening: serving.Listening = nested(serving.Listening())
    api_key: str | None = field(
        None, "Key that clients have to send. Without keys anyone may send requests.", secret=True
    )
    api_keys: str | None = field(
        None, "File of keys, one JSON object per line: name, secret, and the budget of the key."
    )
    max_length: int | None = field(
        None,
        "Maximum number of tokens of a request, prompt included. By default 1024, or fewer if the "
        "models cannot read more.",
        minimum=2,
    )


def run(config: Config) -> None:
    """Load the models, then answer requests until stopped."""
    if config.api_key is not None and config.api_keys is not None:
        raise ValueError("api_key, api_keys: expected one of them, got both")
    # Without --api_key its secret is None: no key is required.
    keys = (serving.Key(secret=config.api_key),)
    if config.api_keys is not None:
        keys = serving.Key.read(config.api_keys)
    config.line_up.check()
    drafter, choices = config.line_up.draft, config.server.choices
    if drafter not in (None, "prompt") and choices != "free":
        # A model's drafts are accepted by random draws, which have no keys.
        raise ValueError(f"draft: expected prompt with --choices={choices}, got {drafter}")
    server = dataclasses.replace(
        config.server,
        # The folder's name only, not its path on this machine.
        model=config.served_name or config.line_up.model.rstrip("/").rpartition("/")[2],
        max_length=_max_length(config),
        keys=keys,
    )
    if server.audit_log is not None:
        # An unwritable folder must be detected before the models are loaded.
        open(server.audit_log, "a").close()
    ensemble, tokenizer, ends = config.line_up.load()
    logging.set_verbosity(logging.INFO)
    logging.warning("%s", server.notice)
    drafts = config.line_up.drafts(tokenizer)
    app = serving.build_app(ensemble, tokenizer, ends, server, drafts=drafts)
    config.listening.serve(app)


def _max_length(config: Config) -> int:
    """Maximum number of tokens of a request; ValueError if it exceeds what the models can read."""
    most = config.line_up.longest
    if config.max_length is None:
        return min(_USUAL_LENGTH, most)
    if config.max_length > most:
        raise ValueError(
            f"max_length: expected at most {most}, the length that the models can read, got "
            f"{config.max_length}"
        )
    return config.max_length

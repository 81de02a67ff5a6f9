"""Serve a model, or several fused ones, over OpenAI's completion API.

    python -m logitjax.commands.serve --large=smollm2 --port=8000
    python -m logitjax.commands.serve --expert=runs/expert --base=runs/base --fusion=dynamic
    python -m logitjax.commands.serve --large=smollm2 --api_key=secret --top_logprobs=5 \\
        --bias=sampling --decimals=2

``/v1/completions``, ``/v1/chat/completions``, ``/v1/models``, ``/health``, ``/openapi.json``; any
OpenAI client works with ``base_url=http://127.0.0.1:8000/v1``. Requests share the slots of one
decoding engine and come and go independently; where too many wait, others get 429 with
``Retry-After``. It listens on loopback unless told otherwise.

What reported log-probabilities give away is set by the flags of the policy: ``--top_logprobs``,
``--bias`` (none, sampling, reported), ``--decimals``, ``--noise``, ``--floor``, ``--soft_cap``; see
docs/leakage.md for what each is worth.
"""

import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging

from logitjax import leakage
from logitjax.commands import speaker
from logitjax.decoding import DecodeOptions
from logitjax.serving._schema import ServerLimits

_LARGE = flags.DEFINE_string("large", "smollm2", "Model that is served, or steered.")
_EXPERT = flags.DEFINE_multi_string("expert", [], "Tuned small model; repeatable.")
_BASE = flags.DEFINE_multi_string("base", [], "What the experts were tuned from: one, or one each.")
_FUSION = flags.DEFINE_string("fusion", None, "How their logits become one: NAME[:key=value,...].")
_NAME = flags.DEFINE_string("served_name", None, "The model's name in the API; --large if none.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute type.")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on.")
_PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.", lower_bound=0)
_KEY = flags.DEFINE_string("api_key", None, "Clients have to show it; none: anybody may ask.")
_SLOTS = flags.DEFINE_integer("slots", 8, "Requests decoded together.", lower_bound=1)
_WAITING = flags.DEFINE_integer("max_waiting", 64, "Requests that may wait.", lower_bound=0)
_LENGTH = flags.DEFINE_integer("max_length", 1024, "Tokens, prompt included.", lower_bound=2)
_TOKENS = flags.DEFINE_integer("max_tokens", 256, "New tokens a request.", lower_bound=1)
_BODY = flags.DEFINE_integer("max_body_bytes", 1 << 20, "Size of a request.", lower_bound=1)
_TOP = flags.DEFINE_integer("top_logprobs", 5, "Log-probabilities a token.", lower_bound=0)
_BIAS = flags.DEFINE_enum(
    "bias", "sampling", leakage.BIAS, "Whether a logit bias is taken, and what it moves."
)
_DECIMALS = flags.DEFINE_integer("decimals", None, "Of reported log-probabilities.")
_NOISE = flags.DEFINE_float("noise", 0.0, "Of the logits, in nats, keyed by the prompt.")
_FLOOR = flags.DEFINE_float("floor", None, "Lowest reported log-probability.")
_CAP = flags.DEFINE_float("soft_cap", None, "Of the logits, in nats.")
_SEED = flags.DEFINE_integer("policy_seed", 0, "Of the noise.")


def policy_from_flags() -> leakage.LogitPolicy:
    policy = leakage.LogitPolicy(
        top_k=_TOP.value or 1,
        bias=_BIAS.value,
        decimals=_DECIMALS.value,
        noise=_NOISE.value,
        floor=_FLOOR.value,
        soft_cap=_CAP.value,
    )
    if policy.bias != "none" and policy.soft_cap:
        raise ValueError("soft_cap: with it bias must be none, it would cap the bias too")
    if policy.bias == "sampling" and policy.noise:
        raise ValueError("noise: with it bias must be none or reported")
    return policy


def build(policy: leakage.LogitPolicy) -> Any:
    """The application with its models loaded."""
    from logitjax.serving._app import Service, build_app
    from logitjax.serving._scheduler import Scheduler

    ensemble, tokenizer, ends = speaker.load_ensemble(
        _LARGE.value, _EXPERT.value, _BASE.value, _FUSION.value, dtype=_DTYPE.value
    )
    disturbs = bool(policy.noise or policy.soft_cap)
    limits = ServerLimits(
        max_tokens=_TOKENS.value,
        max_logprobs=_TOP.value,
        max_logit_bias=policy.max_biased,
        bias_limit=policy.bias_limit,
        max_body_bytes=_BODY.value,
        logit_bias=policy.bias != "none",
    )
    options = DecodeOptions(
        logprobs=_TOP.value > 0,
        top_logprobs=_TOP.value,
        logprobs_of="model" if policy.bias == "sampling" else "adjusted",
        repetition=True,
        max_logit_bias=0 if policy.bias == "none" else policy.max_biased,
        max_stop_ids=max(8, len(ends)),
        processors=(_processor(policy),) if disturbs else (),
    )
    scheduler = Scheduler(
        ensemble,
        slots=_SLOTS.value,
        max_length=_LENGTH.value,
        options=options,
        max_waiting=_WAITING.value,
        report=lambda values: report(policy, values),
        extra=np.uint32(0) if disturbs else None,
    )
    service = Service(
        scheduler=scheduler,
        tokenizer=tokenizer,
        model=_NAME.value or _LARGE.value,
        vocab_size=ensemble.plan.vocab_size,
        end_ids=ends,
        limits=limits,
        max_length=_LENGTH.value,
        api_key=_KEY.value,
        extra_of=_prompt_number if disturbs else None,
    )
    return build_app(service)


def report(policy: leakage.LogitPolicy, values: np.ndarray) -> np.ndarray:
    """What a policy makes of log-probabilities that are about to leave."""
    values = np.maximum(values, -1e30 if policy.floor is None else policy.floor)
    return values if policy.decimals is None else np.round(values.astype(float), policy.decimals)


def _prompt_number(tokens: Sequence[int]) -> np.uint32:
    return np.uint32(leakage.prompt_number(tokens))


def _processor(policy: leakage.LogitPolicy) -> Any:
    def process(logits: jax.Array, state: Any) -> jax.Array:
        api = jax.random.key(_SEED.value)
        # The same prompt, and the same place in its answer, the same noise.
        keys = jax.vmap(lambda n, at: jax.random.fold_in(jax.random.fold_in(api, n), at))(
            jnp.asarray(state.extra), state.count
        )
        return policy.disturb(logits, keys, api_key=api)

    return process


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
        import uvicorn

        application = build(policy_from_flags())
    except ImportError as error:
        print(f"error: {error}; pip install 'logitjax[serve]'", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    logging.set_verbosity(logging.INFO)
    uvicorn.run(
        application,
        host=_HOST.value,
        port=_PORT.value,
        log_level="warning",
        timeout_graceful_shutdown=10,
        timeout_keep_alive=30,
    )


if __name__ == "__main__":
    app.run(main)

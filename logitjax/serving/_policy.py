"""Release policy of a server: decoding options, log-probabilities, and the choice of tokens."""

import dataclasses
import hashlib
import json
import math
import secrets
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.decoding import DecodeOptions
from logitjax.leakage import Choice, LogitPolicy
from logitjax.serving._errors import BadRequestError

CHOICES = ("free", "plain", "metered")
# Maximum number of stop tokens of a request, besides those that end any answer.
MOST_STOP_IDS = 32
_TUNED = tuple(field.name for field in dataclasses.fields(Choice))
# The end of an answer is a function of its tokens. A seed is mixed in separately for each copy. All
# other fields are part of a draw's name, and are refused where choices are not free and on no grid.
_NEUTRAL = {"seed", "stop_token_ids", "ignore_eos", "structure_field"}
# Clients write grid values as decimals.
_CLOSE = 2e-3
_TWO, _LANES = np.uint32(2), np.array([1, 2], np.uint32)


class Disclosure:
    """Enforces a policy on every request.

    Values are those of the distribution that the model serves: before penalties and temperature,
    and before a bias unless the policy reports it. Unless the policy is `sampled`, a token's own
    value is reported only if it is among the `top_k` largest: all requests about one position see
    the same values. The `seed` seeds the policy's noise and is mixed with the seeds of requests.
    """

    def __init__(
        self,
        policy: LogitPolicy,
        seed: int | None = None,
        *,
        choices: str = "free",
        schemas: bool = False,
    ):
        if policy.returns == "logits" or (policy.returns == "logprobs" and policy.top_k is None):
            raise ValueError("policy: expected returns='logprobs' with a top_k, or 'token'")
        if policy.noise_per != "prompt":
            raise ValueError("noise_per: expected 'prompt', because fresh noise averages out")
        if choices not in CHOICES:
            raise ValueError(f"choices: expected one of {', '.join(CHOICES)}, got {choices!r}")
        if choices != "free" and policy.bias != "none":
            raise ValueError(f"bias: expected 'none' with choices={choices}, got {policy.bias!r}")
        self.policy = policy
        self.free = choices == "free"
        self._schemas = schemas
        # With a known seed, anybody could subtract the noise, of values or of sampling.
        self._secret = secrets.token_bytes(16) if seed is None else f"seed {seed}".encode()

    @property
    def top_k(self) -> int:
        """Number of values reported for a position; 0 if only a chosen token's own."""
        return 0 if self.policy.returns == "token" else self.policy.top_k or 0

    def options(self, end_ids: Sequence[int]) -> DecodeOptions:
        policy = self.policy
        return DecodeOptions(
            logprobs=policy.returns == "logprobs",
            top_logprobs=self.top_k,
            logprobs_of="biased" if policy.bias == "reported" else "model",
            repetition=True,
            masks=True,
            max_logit_bias=0 if policy.bias == "none" else policy.max_biased,
            max_stop_ids=len(end_ids) + MOST_STOP_IDS,
            served=self._served if policy.noise else None,
            remember=_follow if policy.noise or not self.free else None,
            draw_keys=None if self.free else _draw_keys,
        )

    def admit(self, fields: Any, vocab: int) -> Any:
        """The sampling fields of a request, on the grids; BadRequestError if one is refused."""
        if self.free:
            return fields
        requested = {name: getattr(fields, name) for name in _TUNED}
        requested["top_k"] = 0 if requested["top_k"] >= vocab else requested["top_k"]
        rounded = dataclasses.asdict(Choice(**requested).rounded())
        for name, value in requested.items():
            ignored = not fields.temperature and name in ("top_k", "top_p", "min_p")
            if not ignored and not math.isclose(value, rounded[name], rel_tol=_CLOSE):
                nearest = f"{rounded[name]:.5g}"
                raise BadRequestError(f"{name}: the nearest accepted value is {nearest}", name)
        for name, value in _moving(fields).items():
            if name not in _TUNED and not (self._schemas and name == "structure"):
                name = fields.structure_field if name == "structure" else name
                raise BadRequestError(f"this server accepts no {name}, got {value!r:.40}", name)
        # The lower the temperature, the more precisely a choice between two tokens compares them.
        if fields.structure and 0 < fields.temperature < 1:
            raise BadRequestError("temperature: the nearest accepted value is 1", "temperature")
        return dataclasses.replace(fields, **rounded)

    def extra(self, tokens: Sequence[int], fields: Any = None, seed: int = 0) -> dict[str, Any]:
        """Name the tokens so far, for the row's noise and, with the request, for its draws.

        The name depends on no logit: a name that changed at a threshold would reveal every logit.
        """
        # Keyed, so that nobody can search for two contexts with the same noise.
        names = {"context": b"context"} if self.policy.noise else {}
        if not self.free:
            # Greedy decoding needs no noise: requests that differ in the seed are the same.
            moving = _moving(fields) | {"seed": seed if fields and fields.temperature else 0}
            names["draw"] = b"draw" + json.dumps(moving, sort_keys=True).encode()
        extra = {n: np.frombuffer(self._digest(text, 8), np.uint32) for n, text in names.items()}
        for token in np.asarray(tokens, np.uint32) if extra else ():
            extra = {name: advance(words, token) for name, words in extra.items()}
        return extra

    def seed(self, seed: int) -> int:
        """The seed of a request's draws: reproducible, but impossible to guess."""
        # Knowing the noise of a draw reveals inequalities between logits with every token.
        return int.from_bytes(self._digest(b"draw" + seed.to_bytes(8, "little"), 4), "little")

    def report(self, values: np.ndarray) -> np.ndarray:
        floor, decimals = self.policy.floor, self.policy.decimals
        values = np.maximum(values, -1e30 if floor is None else floor)
        return values if decimals is None else np.round(values.astype(float), decimals)

    def tells(self, token: int, top_ids: Sequence[int]) -> bool:
        """Whether the value of a token is reported if it is not among the top ones."""
        return self.policy.sampled or token in top_ids

    def _digest(self, text: bytes, size: int) -> bytes:
        return hashlib.blake2b(text, key=self._secret, digest_size=size).digest()

    def _served(self, logits: jax.Array, extra: Any) -> jax.Array:
        low, high = np.frombuffer(self._digest(b"noise", 8), "<u4").tolist()
        api = jax.random.fold_in(jax.random.key(low), high)
        # The same context gets the same noise, whether its tokens were given or generated;
        # otherwise a context of n tokens could be queried in n ways and its noise averaged.
        first, second = jnp.moveaxis(jnp.asarray(extra["context"]), -1, 0)
        fold = jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(api, a), b))
        return self.policy.disturb(logits, fold(first, second))


def advance(words: Any, tokens: Any) -> Any:
    """Mix a token into hashes of two words `[..., 2]`, uint32, with murmur's finaliser."""
    word = words ^ ((tokens[..., None] * _TWO + _LANES) * np.uint32(0x9E3779B1))
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _follow(extra: Any, tokens: jax.Array, where: jax.Array) -> Any:
    def after(words: Any) -> jax.Array:
        return jnp.where(where[:, None], advance(words, tokens.astype(jnp.uint32)), words)

    return {name: after(jnp.asarray(words)) for name, words in extra.items()}


def _moving(fields: Any) -> dict[str, Any]:
    """Spell the fields that determine a choice uniquely: no order, and no field without effect."""
    if fields is None:
        return {}
    bias = tuple((token, amount) for token, amount in sorted(fields.logit_bias) if amount)
    unbiased = dataclasses.replace(fields, logit_bias=bias)
    entries = {field.name: field.default for field in dataclasses.fields(fields)}
    moved = {
        name: getattr(unbiased, name) for name, neutral in entries.items() if name not in _NEUTRAL
    }
    return {name: value for name, value in moved.items() if value != entries[name]}


def _draw_keys(extra: Any) -> jax.Array:
    low, high = jnp.moveaxis(jnp.asarray(extra["draw"]), -1, 0)
    return jax.vmap(lambda a, b: jax.random.fold_in(jax.random.key(a), b))(low, high)

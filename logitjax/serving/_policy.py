"""What leaves the server: the engine's options, and what becomes of log-probabilities."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.decoding import DecodeOptions
from logitjax.leakage import LogitPolicy

MOST_STOP_IDS = 32  # of a request, beside those that end any answer
_TWO, _LANES = np.uint32(2), np.array([1, 2], np.uint32)


class Disclosure:
    """Keeps to a policy, whatever is asked.

    Values are of the distribution that the model serves: before penalties and temperature, and
    before a bias unless the policy reports it. A token's own value is told only if it is among the
    ``top_k`` largest, so that all requests about one position see at most so many values; the
    policy's ``sampled`` lifts that.

    Args:
        policy: What is reported, and whether a logit bias is taken.
        seed: Seed of the policy's noise and of what seeds of requests are mixed with; None draws
            one.
    """

    def __init__(self, policy: LogitPolicy, seed: int | None = None):
        if policy.returns == "logits" or (policy.returns == "logprobs" and policy.top_k is None):
            raise ValueError("policy: expected returns='logprobs' with a top_k, or 'token'")
        if policy.noise_per != "prompt":
            raise ValueError("noise_per: expected 'prompt', fresh noise is averaged away")
        self.policy = policy
        # A seed that is known would let anybody subtract the noise, or sampling's own.
        self._secret = secrets.token_bytes(16) if seed is None else f"seed {seed}".encode()

    @property
    def top_k(self) -> int:
        """Number of values reported of a position; 0 for none but a chosen token's own."""
        return 0 if self.policy.returns == "token" else self.policy.top_k or 0

    def options(self, end_ids: Sequence[int]) -> DecodeOptions:
        """What the engine has to report and to add."""
        policy = self.policy
        served, remember = (self._served, _follow) if self._disturbs else (None, None)
        return DecodeOptions(
            logprobs=policy.returns == "logprobs",
            top_logprobs=self.top_k,
            logprobs_of="biased" if policy.bias == "reported" else "model",
            repetition=True,
            masks=True,
            max_logit_bias=0 if policy.bias == "none" else policy.max_biased,
            max_stop_ids=len(end_ids) + MOST_STOP_IDS,
            served=served,
            remember=remember,
        )

    def extra(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        """What the engine keeps beside a prompt: a name of all tokens so far, for the noise."""
        if not self._disturbs:
            return {}
        # Keyed, so that nobody can look for two contexts with the same noise.
        words = np.frombuffer(self._digest(b"context", 8), np.uint32)
        for token in np.asarray(tokens, np.uint32):
            words = _mixed(words, token)
        return {"context": words}

    def seed(self, asked: int) -> int:
        """The seed that a request's draws are made with: always the same, and not to be guessed.

        Who knows the noise of a draw reads inequalities between logits off every token.
        """
        return int.from_bytes(self._digest(b"draw" + asked.to_bytes(8, "little"), 4), "little")

    def report(self, values: np.ndarray) -> np.ndarray:
        """Log-probabilities as they leave."""
        floor, decimals = self.policy.floor, self.policy.decimals
        values = np.maximum(values, -1e30 if floor is None else floor)
        return values if decimals is None else np.round(values.astype(float), decimals)

    def tells(self, token: int, top_ids: Sequence[int]) -> bool:
        """Whether the value of a token that is not asked for by rank is told."""
        return self.policy.sampled or token in top_ids

    @property
    def _disturbs(self) -> bool:
        return bool(self.policy.noise or self.policy.soft_cap or self.policy.dummy_dims)

    def _digest(self, text: bytes, size: int) -> bytes:
        return hashlib.blake2b(text, key=self._secret, digest_size=size).digest()

    def _served(self, logits: jax.Array, extra: Any) -> jax.Array:
        low, high = np.frombuffer(self._digest(b"noise", 8), "<u4").tolist()
        api = jax.random.fold_in(jax.random.key(low), high)
        # The same context, the same noise, whether a token was given or generated: else a context
        # of n tokens could be asked for in n ways, and its noise averaged.
        first, second = jnp.moveaxis(jnp.asarray(extra["context"]), -1, 0)
        fold = jax.vmap(lambda a, b: jax.random.fold_in(jax.random.fold_in(api, a), b))
        return self.policy.disturb(logits, fold(first, second), api_key=api)


def _mixed(words: Any, tokens: Any) -> Any:
    """One token each into hashes of two words `[..., 2]`, uint32: murmur's finaliser a lane."""
    word = words ^ ((tokens[..., None] * _TWO + _LANES) * np.uint32(0x9E3779B1))
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _follow(extra: Any, tokens: jax.Array, where: jax.Array) -> Any:
    words = jnp.asarray(extra["context"])
    after = _mixed(words, tokens.astype(jnp.uint32))
    return extra | {"context": jnp.where(where[:, None], after, words)}

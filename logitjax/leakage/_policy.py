"""A frozen description of the parts of a next-token distribution that an API reveals."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key

from logitjax.ops import Array, Number, checks, top_k
from logitjax.storage import option

_CHOICES = {
    "returns": ("logits", "logprobs", "token"),
    "bias": ("none", "sampling", "reported"),
    "noise_per": ("prompt", "query"),
}
# Fields by the first part of a name, as functions of its other parts.
_NAMED: dict[str, Callable[..., dict[str, Any]]] = {
    "full": lambda: {},
    "round": lambda decimals: {"decimals": int(decimals)},
    "noise": lambda sigma: {"noise": float(sigma)},
    "floor": lambda floor: {"floor": float(floor)},
    "top": lambda k, bias="": {"top_k": int(k)} | _BIASED[bias],
    "draws": lambda: {"top_k": 0, "sampled": True},
    "sampling": lambda: {"top_k": 0, "sampled": True, "bias": "sampling"},
    "argmax": lambda: {"returns": "token", "bias": "sampling"},
}
_BIASED = {"": {}, "bias": {"bias": "reported", "decimals": 7}, "sampling": {"bias": "sampling"}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """An API's answer: values ``[*batch, k]`` and their tokens.

    The drawn token comes first if the policy reports its value, then the largest values. If it
    reports only tokens, there is no value and one token.
    """

    values: Array
    tokens: Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitPolicy:
    """The policy of a logit API: its reports, and the changes to logits before them.

    Kinds and defences of Carlini et al., Stealing part of a production language model, 2024,
    sections 4 to 8. ::

        z <- z + noise e         e of the prompt
        y = z + bias             if bias affects the reported values
        y <- log_softmax(y)      returns="logprobs"
        y <- max(y, floor), rounded to decimals, the top_k largest

    Attributes:
        returns: what an answer contains: ``logits``, ``logprobs``, or only the drawn ``token``.
        top_k: number of top values in an answer; None for all, 0 only with ``sampled``.
        sampled: whether an answer includes the drawn token's own value whatever its rank, as in
            completion APIs.
        bias: ``none``: queries with a bias are rejected. ``sampling``: a bias changes the drawn
            token, but not the reported values (commercial APIs changed to this in 2024).
            ``reported``: a bias changes both.
        max_biased: maximum number of tokens that a query may bias.
        bias_limit: largest bias, in nats.
        decimals: number of decimals of reported values.
        noise: standard deviation of Gaussian noise on the logits, in nats.
        noise_per: ``prompt``: the same prompt gets the same noise, so repeating a query reveals
            nothing more. ``query``: fresh noise, which can be averaged away.
        floor: lowest reported value.
    """

    returns: str = option("logprobs", choices=_CHOICES["returns"])
    top_k: int | None = None
    sampled: bool = False
    bias: str = option("none", choices=_CHOICES["bias"])
    max_biased: int = 300
    bias_limit: float = 100.0
    decimals: int | None = None
    noise: float = 0.0
    noise_per: str = option("prompt", choices=_CHOICES["noise_per"])
    floor: float | None = None

    def __post_init__(self) -> None:
        for name, existing in _CHOICES.items():
            if (value := getattr(self, name)) not in existing:
                raise ValueError(f"{name}: expected one of {', '.join(existing)}, got {value!r}")
        checks.positive(self.max_biased, "max_biased")
        checks.positive(self.bias_limit, "bias_limit")
        if self.top_k is not None and (self.top_k or not self.sampled):
            checks.positive(self.top_k, "top_k")
        if self.noise < 0:
            raise ValueError(f"noise: expected at least 0, got {self.noise}")

    @classmethod
    def parse(cls, name: str) -> "LogitPolicy":
        """The policy for a short name.

        Args:
            name: `full`, `round_D` (D decimals), `noise_S` (S nats), `floor_F`, `top_K` (K values
                and no bias), `top_K_bias` (with a bias that changes reported values),
                `top_K_sampling` (with one that does not), `draws` (the drawn token's own value, no
                bias), `sampling` (the same, and a bias changes the drawn token) or `argmax` (the
                token alone, and a bias changes it). Anything else raises ValueError.

        >>> LogitPolicy.parse("top_5").top_k
        5
        """
        kind, *rest = name.split("_")
        try:
            return cls(**_NAMED[kind](*rest))
        except (KeyError, TypeError):
            raise ValueError(
                "policy: expected full, round_D, noise_S, floor_F, top_K, top_K_bias, "
                f"top_K_sampling, draws, sampling or argmax, got {name!r}"
            ) from None
        except ValueError as error:
            raise ValueError(f"policy {name!r}: {error}") from None

    @property
    def step(self) -> float:
        """Half the distance between neighbouring values of an answer."""
        return 0.0 if self.decimals is None else 0.5 * 10.0**-self.decimals

    @property
    def harvests(self) -> bool:
        """Whether values come only from draws: the drawn token's own, without a bias."""
        notes = self.sampled and self.returns == "logprobs"
        return notes and self.top_k == 0 and self.bias == "none"

    def row_queries(self, vocab: int) -> int:
        """Queries for a row if a bias affects reported values: `1 + ceil((V - 1) / (K - 1))`.

        >>> LogitPolicy(top_k=5).row_queries(5000)
        1251
        """
        if self.top_k is None:
            return 1
        return vocab if self.top_k < 2 else 1 + math.ceil((vocab - 1) / (self.top_k - 1))

    def value_nats(self, vocab: int) -> float:
        """Maximum nats that one answer's values reveal: their tokens, and their rounding cells.

        A value without decimals, or without a floor to bound their number, is one of 2^32.

        >>> round(LogitPolicy(top_k=5, decimals=2, floor=-10.0).value_nats(1000), 1)
        69.1
        """
        if self.returns == "token":
            return 0.0
        cell = 32 * math.log(2)
        if self.decimals is not None and self.floor is not None:
            cell = min(cell, math.log1p(abs(self.floor) * 10.0**self.decimals))
        count = vocab if self.top_k is None else self.top_k
        return count * (math.log(vocab) + cell) + self.sampled * cell

    def noise_nats(self, deviation: float) -> float:
        """Maximum nats per token that any number of answers reveals about a row under this noise.

        For normal logits of standard deviation s, the argument, and noise that is the same each
        time for a context: `log(1 + s^2 / noise^2) / 2`.
        """
        return 0.5 * math.log1p((deviation / self.noise) ** 2) if self.noise else math.inf

    @staticmethod
    def prompt_number(prompt: Sequence[int] | Array) -> int:
        """32 bits that identify a prompt in every process, used as the key of its noise.

        >>> LogitPolicy.prompt_number([1, 2]) == LogitPolicy.prompt_number(np.array([1, 2]))
        True
        """
        digest = hashlib.sha256(np.asarray(prompt, np.int32).tobytes()).digest()
        return int.from_bytes(digest[:4], "little")

    def disturb(
        self, logits: Float[Array, "*batch vocab"], keys: Key[jax.Array, "*batch"]
    ) -> Float[jax.Array, "*batch vocab"]:
        """Logits with noise, before requests change them, float32; equal keys give equal noise."""
        logits = checks.as_float(logits, "logits")
        if not self.noise:
            return logits
        draw = jax.vmap(lambda key: jax.random.normal(key, logits.shape[-1:]))
        return logits + self.noise * draw(keys.reshape(-1)).reshape(logits.shape)

    def report(
        self,
        served: Float[Array, "*batch vocab"],
        *,
        bias_tokens: Int[Array, "*batch biased"] | None = None,
        bias_values: Float[Array, "*batch biased"] | None = None,
        temperature: Number = 1.0,
        key: Key[jax.Array, ""] | None = None,
    ) -> Answer:
        """The answer for logits from `disturb`: `top_k` values or all, one more with `sampled`.

        Args:
            bias_tokens: ``[*batch, biased]``; ValueError for a larger bias than allowed.
            bias_values: ``[*batch, biased]`` in nats.
            temperature: temperature of the drawn token; values are reported at 1.
            key: key of the draw; without a key the most likely token is taken, as at temperature 0.

        >>> policy = LogitPolicy(returns="logits", top_k=1, bias="reported", decimals=1)
        >>> @jax.jit
        ... def report(served, tokens, bias):
        ...     answer = policy.report(served, bias_tokens=tokens, bias_values=bias)
        ...     return answer.values, answer.tokens
        >>> print(*report(np.array([0.0, 1.26]), np.array([0]), np.array([5.0])))
        [5.] [0]
        """
        values = moved = checks.as_float(served, "served")
        if bias_tokens is not None:
            moved = self._biased(values, jnp.asarray(bias_tokens), bias_values)
            values = moved if self.bias == "reported" else values
        drawn = None
        if self.sampled or self.returns == "token":
            if key is not None:
                moved = moved / temperature + jax.random.gumbel(key, moved.shape)
            drawn = jnp.argmax(moved, axis=-1, keepdims=True).astype(jnp.int32)
        if drawn is not None and self.returns == "token":
            return Answer(values=jnp.zeros((*values.shape[:-1], 0)), tokens=drawn)
        if self.returns == "logprobs":
            values = jax.nn.log_softmax(values)
        if self.floor is not None:
            values = jnp.maximum(values, self.floor)
        if self.decimals is not None:
            # By an integer and back, as in a JSON answer with this many digits.
            values = jnp.round(values * 10.0**self.decimals) / 10.0**self.decimals
        if self.top_k is None or self.top_k >= values.shape[-1]:
            tokens = jnp.broadcast_to(jnp.arange(values.shape[-1]), values.shape)
            return Answer(values=values, tokens=tokens)
        parts = [] if drawn is None else [(jnp.take_along_axis(values, drawn, axis=-1), drawn)]
        parts += [top_k(values, self.top_k)] if self.top_k else []
        values, tokens = (jnp.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
        return Answer(values=values, tokens=tokens)

    def _biased(self, values: jax.Array, tokens: jax.Array, bias: Array | None) -> jax.Array:
        if self.bias == "none":
            raise ValueError("bias_tokens: expected none, got some: this API takes no logit bias")
        shape = None if bias is None else jnp.shape(bias)
        if bias is None or shape != tokens.shape:
            raise ValueError(f"bias_values: expected the shape {tokens.shape}, got {shape}")
        if (count := tokens.shape[-1]) > self.max_biased:
            raise ValueError(
                f"bias_tokens: expected at most {self.max_biased} a query, got {count}"
            )
        bias = jnp.clip(jnp.asarray(bias, jnp.float32), -self.bias_limit, self.bias_limit)
        flat, shape = values.reshape(-1, values.shape[-1]), (*values.shape[:-1], count)
        where, add = (jnp.broadcast_to(x, shape).reshape(len(flat), -1) for x in (tokens, bias))
        return flat.at[jnp.arange(len(flat))[:, None], where].add(add).reshape(values.shape)

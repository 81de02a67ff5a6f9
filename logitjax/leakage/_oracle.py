"""A model behind the rules of an API, in the same process, with a meter."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.leakage._policy import Answer, LogitPolicy
from logitjax.ops import Array, checks


@runtime_checkable
class Asked(Protocol):
    """The target of an audit: a `LogitOracle`, or a client of a server of your own."""

    policy: LogitPolicy

    def ask(self, prompts: Any, /, *, temperature: float = 0.0) -> Answer: ...

    def ask_biased(self, prompt: Any, bias_tokens: Any, bias_values: Any, /) -> Answer: ...


class BudgetExhaustedError(ValueError):
    """A query exceeded the budget and was not answered."""


class Meter:
    """Counts queries and values, and refuses those that exceed a budget."""

    def __init__(self, budget: int | None):
        self.budget, self.queries, self.values = budget, 0, 0

    def charge(self, count: int) -> None:
        if self.budget is not None and self.queries + count > self.budget:
            raise BudgetExhaustedError(
                f"{count} queries would exceed the budget: {self.queries} of {self.budget} are used"
            )
        self.queries += count

    def counted(self, parts: Sequence[Sequence[Any]]) -> Answer:
        """One of several answers, each with its values and tokens."""
        values, tokens = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        self.values += values.size
        return Answer(values=values, tokens=tokens)


class LogitOracle(Meter):
    """Answers queries about a model as an API with a given policy would, and counts them.

    It shows an operator what a planned API would reveal. The model runs in this process; nothing
    else is queried. Last-position logits are kept for each prompt, so many queries about one
    prompt, with different biases, cost one forward pass.

    Args:
        apply_fn: ``tokens [n, length] -> [n, vocab]``: logits of the position after the last.
        policy: the API's policy.
        budget: maximum number of queries, then BudgetExhaustedError; None for no limit.
        seed: seed of the API's noise and draws.
        batch_size: number of prompts in a forward pass.
        cache_size: number of prompts whose logits are kept.

    Attributes:
        queries: number of queries answered so far.
        values: number of values reported so far.
        prompts: number of prompts run through the model so far, the operator's cost.

    >>> table = np.arange(12.0).reshape(3, 4)
    >>> oracle = LogitOracle(lambda tokens: table[np.asarray(tokens)[:, -1]],
    ...                      LogitPolicy(returns="logits", top_k=2), budget=3)
    >>> oracle.ask([[0], [2]]).values
    array([[ 3.,  2.],
           [11., 10.]], dtype=float32)
    >>> oracle.queries, oracle.values
    (2, 4)
    """

    def __init__(
        self,
        apply_fn: Callable[[jax.Array], Array],
        policy: LogitPolicy,
        *,
        budget: int | None = None,
        seed: int = 0,
        batch_size: int = 16,
        cache_size: int = 256,
    ):
        checks.positive(batch_size, "batch_size")
        checks.positive(cache_size, "cache_size")
        super().__init__(budget)
        self.policy = policy
        self.prompts = 0
        self._apply = apply_fn
        self._api, self._noise, self._draws = jax.random.split(jax.random.key(seed), 3)
        self._batch_size, self._cache_size = batch_size, cache_size
        self._cache: dict[bytes, np.ndarray] = {}

    def ask(
        self, prompts: Sequence[Sequence[int] | Array] | Array, *, temperature: float = 0.0
    ) -> Answer:
        """Answer one query per prompt, without a bias: an `Answer` ``[n, k]`` on the host.

        Args:
            prompts: ``n`` sequences of token ids, of any lengths.
            temperature: temperature of the drawn token, which every query draws again.
        """
        self.charge(len(prompts))
        size = self._batch_size
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return self.counted([self._report(self._logits(p), p, temperature) for p in parts])

    def ask_biased(
        self,
        prompt: Sequence[int] | Array,
        bias_tokens: Array | Sequence[Sequence[int]],
        bias_values: Array | Sequence[Sequence[float]],
    ) -> Answer:
        """Answer many queries about one prompt, each with its own logit bias, at temperature 0.

        As `ask`, with ``[n, biased]`` tokens and nats; ValueError if the policy refuses them.
        """
        tokens = np.asarray(bias_tokens, np.int32)
        bias = np.broadcast_to(np.asarray(bias_values, np.float32), tokens.shape)
        if tokens.ndim != 2:
            raise ValueError(f"bias_tokens: expected [queries, biased], got {tokens.shape}")
        if self.policy.bias == "none":
            raise ValueError("bias_tokens: expected none, got some: this API takes no logit bias")
        self.charge(len(tokens))
        row = self._logits([prompt])
        # In batches, so that [queries, vocab] stays small.
        size = max(1, min(len(tokens), 2**23 // row.shape[-1]))
        answers = []
        for start in range(0, len(tokens), size):
            part, values = tokens[start : start + size], bias[start : start + size]
            short = size - len(part)
            # One compiled shape: the last batch is padded and cut again.
            if short:
                part = np.concatenate([part, np.repeat(part[-1:], short, 0)])
                values = np.concatenate([values, np.repeat(values[-1:], short, 0)])
            served = np.broadcast_to(row, (size, row.shape[-1]))
            result = self._report(served, [prompt] * size, 0.0, part, values)
            answers.append([array[: size - short] for array in result])
        return self.counted(answers)

    def _logits(self, prompts: Sequence[Any] | Array) -> np.ndarray:
        """Rows from the cache; missing ones are computed, prompts of one length together."""
        names = [np.asarray(prompt, np.int32).tobytes() for prompt in prompts]
        missing: dict[int, dict[bytes, Any]] = {}
        for name, prompt in zip(names, prompts, strict=True):
            if name not in self._cache:
                missing.setdefault(len(prompt), {})[name] = prompt
        fresh: dict[bytes, np.ndarray] = {}
        for group in missing.values():
            tokens = jnp.asarray(np.stack([np.asarray(p, np.int32) for p in group.values()]))
            rows = np.asarray(self._apply(tokens), np.float32)
            if rows.ndim != 2 or rows.shape[0] != len(group):
                want = f"[{len(group)}, vocab] for the last position"
                raise ValueError(f"apply_fn: expected {want}, got {rows.shape}")
            fresh |= dict(zip(group, rows, strict=True))
            self.prompts += len(group)
        logits = np.stack([fresh[n] if n in fresh else self._cache[n] for n in names])
        self._cache |= fresh
        while len(self._cache) > self._cache_size:
            self._cache.pop(next(iter(self._cache)))
        return logits

    def _report(
        self,
        rows: np.ndarray,
        prompts: Any,
        temperature: float,
        tokens: Any = None,
        bias: Any = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        draw = None
        if self.policy.noise and self.policy.noise_per == "query":
            self._noise, key = jax.random.split(self._noise)
            keys = jax.random.split(key, len(prompts))
        else:
            numbers = [LogitPolicy.prompt_number(prompt) for prompt in prompts]
            keys = _keys(self._api, np.asarray(numbers, np.uint32))
        if temperature > 0:
            self._draws, draw = jax.random.split(self._draws)
        answer = _answer(self.policy, rows, keys, tokens, bias, temperature, draw)
        return np.asarray(answer[0]), np.asarray(answer[1])


@jax.jit
def _keys(key: jax.Array, numbers: jax.Array) -> jax.Array:
    return jax.vmap(lambda n: jax.random.fold_in(key, n))(numbers)


@functools.partial(jax.jit, static_argnums=0)
def _answer(
    policy: LogitPolicy, rows: Any, keys: Any, tokens: Any, bias: Any, temperature: Any, draw: Any
) -> tuple[jax.Array, jax.Array]:
    biased = {"bias_tokens": tokens, "bias_values": bias}
    disturbed = policy.disturb(rows, keys)
    answer = policy.report(disturbed, **biased, temperature=temperature, key=draw)
    return jnp.asarray(answer.values), jnp.asarray(answer.tokens)

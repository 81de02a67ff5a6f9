"""An oracle over HTTP: the same audit of your own server on the loopback interface."""

import collections
import concurrent.futures
import functools
import http.client
import ipaddress
import json
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitjax.leakage._oracle import BudgetExhaustedError, Meter
from logitjax.leakage._policy import Answer, LogitPolicy

_AT_ONCE = 16  # requests


class HttpOracle(Meter):
    """Queries a completion server, one token at a time, and counts the queries.

    Args:
        address: `http://127.0.0.1:PORT`. Only loopback, else ValueError: you audit your own server.
        policy: The server's declared policy; `top_k` values are requested.
        budget: Maximum number of queries; None for no limit.
    """

    def __init__(
        self,
        address: str,
        policy: LogitPolicy,
        *,
        api_key: str | None = None,
        budget: int | None = None,
    ):
        host = urllib.parse.urlsplit(address).hostname or ""
        if host != "localhost" and not _is_loopback(host):
            raise ValueError(f"address: expected one of this machine, got {address}")
        super().__init__(budget)
        self.policy = policy
        self._host = urllib.parse.urlsplit(address).netloc
        key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._headers = {"Content-Type": "application/json"} | key
        self._pool = concurrent.futures.ThreadPoolExecutor(_AT_ONCE)
        self._local = threading.local()

    def ask(self, prompts: Sequence[Any] | np.ndarray, *, temperature: float = 0.0) -> Answer:
        """Send one query per prompt, without a bias."""
        return self._all([(prompt, None) for prompt in prompts], temperature)

    def ask_biased(self, prompt: Any, bias_tokens: Any, bias_values: Any) -> Answer:
        """Send many queries about one prompt, each with its own logit bias, at temperature 0."""
        tokens = np.asarray(bias_tokens)
        amounts = np.broadcast_to(np.asarray(bias_values, float), tokens.shape)
        biases: list[Any] = [collections.defaultdict(float) for _ in tokens]
        for added, row, sizes in zip(biases, tokens.tolist(), amounts.tolist(), strict=True):
            for token, size in zip(row, sizes, strict=True):
                added[str(token)] += size
        return self._all([(prompt, bias) for bias in biases], 0.0)

    def draws(self, prompt: Any, fields: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Tokens drawn after a prompt, `[n]`, for requests with each of these fields."""
        self.charge(len(fields))
        message = self._pool.map(lambda more: self._asked(prompt, {"logprobs": 0} | more), fields)
        return np.array([_token_id(one["tokens"][0]) for one in message])

    def read(self, prompts: Sequence[Any]) -> list[Answer]:
        """The `top_k` values at every position of prompts after the first, by one query each.

        Each answer is `[n - 1, top_k]`, best first. The server must support `echo`, as vLLM does; a
        server that refuses, or reports something else, raises ValueError.
        """
        self.charge(len(prompts))
        return [self.counted([one]) for one in self._pool.map(self._echoed, prompts)]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _all(
        self, queries: Sequence[tuple[Any, Mapping[str, float] | None]], temperature: float
    ) -> Answer:
        self.charge(len(queries))
        ask = functools.partial(self._one, temperature=temperature)
        result = list(self._pool.map(ask, *zip(*queries, strict=True)))
        # A value that the server withholds is None there and nan here.
        if len({len(row) for row in result}) > 1:
            raise ValueError(f"url: expected {self.policy.top_k} values in each answer, got fewer")
        values = np.array([[value for _, value in row] for row in result], np.float32)
        tokens = np.array([[token for token, _ in row] for row in result], np.int32)
        if self.policy.returns == "token":
            values = values[:, :0]
        return self.counted([(values, tokens)])

    def _echoed(self, prompt: Any) -> tuple[np.ndarray, np.ndarray]:
        tokens, k = np.asarray(prompt).tolist(), self.policy.top_k
        fields = {"max_tokens": 0, "echo": True, "temperature": 0, "logprobs": k}
        message = self._post(tokens, fields)["choices"][0]["logprobs"]["top_logprobs"][1:]
        # A prompt token that is not among the top ones is listed in addition.
        rows = [sorted(tops.items(), key=lambda pair: -pair[1])[:k] for tops in message]
        if len(rows) != len(tokens) - 1 or any(len(row) != k for row in rows):
            raise ValueError(f"url: expected {k} values at each of {len(tokens) - 1} positions")
        values = np.array([[value for _, value in row] for row in rows], np.float32)
        return values, np.array([[_token_id(name) for name, _ in row] for row in rows], np.int32)

    def _one(
        self, prompt: Any, bias: Mapping[str, float] | None, temperature: float
    ) -> list[tuple[int, float | None]]:
        only_token = self.policy.returns == "token"
        # Token ids are reported with the log-probabilities, even without any top ones.
        fields = {"temperature": temperature, "logprobs": 0 if only_token else self.policy.top_k}
        message = self._asked(prompt, fields | ({"logit_bias": bias} if bias else {}))
        drawn = _token_id(message["tokens"][0])
        if only_token:
            return [(drawn, None)]
        local = [(drawn, message["token_logprobs"][0])] if self.policy.sampled else []
        tops = message["top_logprobs"][0] if self.policy.top_k else {}
        items = [(_token_id(name), value) for name, value in tops.items()]
        # Other servers also list the drawn token if it is not among the top ones.
        return local + sorted(items, key=lambda pair: -pair[1])[: self.policy.top_k]

    def _asked(self, prompt: Any, fields: Mapping[str, Any]) -> Any:
        """Read the log-probabilities from an answer of one token."""
        answer = self._post(np.asarray(prompt).tolist(), {"max_tokens": 1, **fields})
        try:
            logprobs = answer["choices"][0]["logprobs"]
            _token_id(logprobs["tokens"][0])
            return logprobs
        except (LookupError, TypeError, AttributeError, ValueError):
            wrong = f"url: expected log-probabilities by token ids, got {str(answer)[:200]}"
            raise ValueError(wrong) from None

    def _post(self, prompt: list[int], fields: Mapping[str, Any]) -> Any:
        body = {"prompt": prompt, "return_tokens_as_token_ids": True, **fields}
        for _ in range(200):
            status, headers, text = self._send(json.dumps(body))
            if status == 200:
                return json.loads(text)
            # The budget is not renewed: waiting would take forever.
            if b"insufficient_quota" in text:
                raise BudgetExhaustedError(f"url: {text[:200]!r}")
            if status != 429:
                raise ValueError(f"url: the server answered {status}: {text[:200]!r}")
            time.sleep(float(headers.get("Retry-After", "1")))
        raise ConnectionError("url: the server stayed overloaded")

    def _send(self, body: str) -> tuple[int, Any, bytes]:
        for fresh in (False, True):
            connection = getattr(self._local, "connection", None)
            if connection is None or fresh:
                connection = http.client.HTTPConnection(self._host, timeout=120)
                self._local.connection = connection
            try:
                connection.request("POST", "/v1/completions", body, self._headers)
                answer = connection.getresponse()
                return answer.status, answer.headers, answer.read()
            except (http.client.HTTPException, ConnectionError):
                # An idle connection that the server closed is reopened once.
                if fresh:
                    raise
        raise AssertionError("not reached")


def _token_id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

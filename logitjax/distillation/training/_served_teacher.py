import http.client
import json
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from logitjax import losses, storage
from logitjax.distillation.training._teachers import Kept, Reader, packed_documents

# Seconds between attempts to reach an unavailable server: first and maximum pause.
_PAUSES = (1.0, 30.0)
# Seconds to wait for an answer.
_TIMEOUT = 600.0
_AWAY = (OSError, http.client.HTTPException)


class ServedTeacher:
    """A live teacher behind `logitjax serve --hidden_states`.

    A binary answer per batch has the bfloat16 hidden states of the positions that are learned. If
    the server becomes unavailable, the teacher waits; returning with other weights is an error.
    `rank` is the number of columns of a low-rank code in place of hidden states, 0 for none.
    """

    def __init__(self, url: str, *, tokenizer: str, rank: int = 0, api_key: str | None = None):
        self._url, self._rank = urllib.parse.urlsplit(url), rank
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._connection: http.client.HTTPConnection | None = None
        self._totals: dict[str, tuple[float, float]] = {}
        try:
            tensors, self.about = self._attempt("GET", None)
        except _AWAY as error:
            raise ValueError(f"{self}: no server answers ({error})") from None
        if self.about["tokenizer"] != tokenizer:
            raise ValueError(f"{self}: expected the tokenizer of the rows, got another")
        self.head = losses.Head(
            tensors["kernel"],
            tensors.get("bias"),
            vocab_axis=int(self.about["vocab_axis"]),
            soft_cap=float(self.about["soft_cap"]) if self.about["soft_cap"] else None,
        )

    def __str__(self) -> str:
        return f"teacher api:{self._url.geturl()}"

    def reader(self, kept: Kept) -> Reader:
        """Like `model_reader`; everything but the hidden states is computed here."""
        derived = jax.jit(kept.of_states)

        def read(columns: Mapping[str, Any], rows: np.ndarray) -> Mapping[str, Any]:
            states = self.hidden_states(columns)
            record = jax.device_get(derived(states, self.head, dict(columns), rows))
            return record | ({"hidden": states} if kept.hidden else {})

        return Reader(
            tokenizer=self.about["tokenizer"],
            vocab_size=self.head.vocab_size(),
            read=read,
            weights=self.about["weights"],
            head=self.head if kept.hidden else None,
            kept=(kept.k, kept.tail_samples),
            metrics=self.metrics,
        )

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Return bytes per position and relative error of the code, since the last call."""
        totals, self._totals = self._totals, {}
        return totals

    def hidden_states(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Return bfloat16 `[rows, length - 1, width]`, zeros where nothing is learned."""
        tokens, segments = np.asarray(columns["tokens"]), np.asarray(columns["segment_ids"])
        learnt = np.asarray(columns["loss_mask"])[:, 1:]
        out = np.zeros((*learnt.shape, self.head.kernel.shape[1 - self.head.axis]), jnp.bfloat16)
        documents = packed_documents(segments, np.argwhere(learnt))
        if not documents:
            return out
        # `learnt` is shifted by one: entry t is for token t + 1.
        starts = [1 + int(np.argmax(learnt[row, a:b])) for row, a, b in documents]
        texts = [tokens[row, a:b].tolist() for row, a, b in documents]
        body = {"documents": texts, "starts": starts, "rank": self._rank}
        tensors, about = self._ask(json.dumps(body))
        floats = [tensors[name] for name in ("hidden", "code", "basis") if name in tensors]
        states = floats[0]
        # A code is `[positions, rank]` and `[rank, width]`; bf16 products would lose its precision.
        if len(floats) > 1:
            states = (floats[0].astype(np.float32) @ floats[1].astype(np.float32)).astype(out.dtype)
        # The answer has the positions of all documents in sequence, without padding.
        location = 0
        for (row, a, b), start in zip(documents, starts, strict=True):
            size = b - a - start
            out[row, a + start - 1 : b - 1] = states[location : location + size]
            location += size
        size = float(sum(array.nbytes for array in floats))
        entries = {"bytes_a_position": (size, location), "rank_error": (float(about["error"]), 1)}
        for name, (total, count) in entries.items():
            before = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = before[0] + total, before[1] + count
        return out

    def _ask(self, body: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return the answer, waiting as long as the server is unavailable."""
        pause, begin = _PAUSES[0], None
        while True:
            try:
                answer = self._attempt("POST", body)
                if begin is None:
                    return answer
                # The server at this address may have other weights by now.
                about = self._attempt("GET", None)[1]
            except _AWAY as error:
                if begin is None:
                    begin = time.monotonic()
                    logging.warning("%s: does not answer (%s); the run waits for it", self, error)
                storage.progress.mark(f"waiting for {self}")
                time.sleep(pause)
                pause = min(2 * pause, _PAUSES[1])
                continue
            if about != self.about:
                raise ValueError(
                    f"{self}: expected the weights {self.about['weights']} from before the "
                    f"connection was lost, got {about['weights']}"
                )
            logging.warning("%s: answers again after %.0f s", self, time.monotonic() - begin)
            return answer

    def _attempt(
        self, method: str, body: str | None
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Try once to get an answer; an error of `_AWAY` if the server is unavailable."""
        fresh = self._connection is None
        if self._connection is None:
            secure = self._url.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            self._connection = kind(self._url.netloc, timeout=_TIMEOUT)
        try:
            path = f"{self._url.path.rstrip('/')}/v1/hidden_states"
            self._connection.request(method, path, body, self._headers)
            answer = self._connection.getresponse()
            content = answer.read()
        except _AWAY:
            self._connection = None
            if fresh:
                raise
            # Servers close idle connections.
            return self._attempt(method, body)
        # Busy, or a proxy without a server.
        if answer.status in (429, 502, 503, 504):
            raise ConnectionError(f"status {answer.status}")
        if answer.status != 200:
            raise ValueError(
                f"{self}: expected hidden states, as of `logitjax serve --hidden_states`, got "
                f"status {answer.status}: {content[:200]!r}"
            )
        # safetensors begins with the length of its JSON header, in 8 bytes.
        size = int.from_bytes(content[:8], "little")
        about = json.loads(content[8 : 8 + size])["__metadata__"]
        tensors = storage.require("safetensors.numpy", extra="models").load(content)
        # numpy has no bfloat16, so its bits are sent as uint16.
        bits = {n: x.view(jnp.bfloat16) for n, x in tensors.items() if x.dtype == np.uint16}
        return tensors | bits, about

"""A teacher for students in training: its head once, and its hidden states of their text."""

import asyncio
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from logitjax import models, storage
from logitjax.serving._admission import parse_json, read_body
from logitjax.serving._errors import BadRequestError
from logitjax.serving._keys import find_key
from logitjax.serving._service import Service

# Number of documents read at once.
_ROWS = 8
_LENGTHS = [64 << i for i in range(26)]


class _Reading(BaseModel, extra="forbid", strict=True):
    """Documents, the first token of each to predict, and the rank of a code."""

    documents: list[list[int]] = Field(min_length=1)
    starts: list[int]
    rank: int = Field(default=0, ge=0)


class HiddenStates:
    """The endpoint `/v1/hidden_states` of a decoder.

    GET returns the head, with fingerprints of tokenizer and weights. POST returns for each document
    the hidden states that predict its tokens from `starts` on, concatenated, in bfloat16; with a
    `rank`, their best approximation of that rank and its relative error. Both answers are in
    safetensors format, with the bits of bfloat16 as uint16.
    """

    def __init__(self, service: Service, model: models.Decoder):
        self._service, self._head = service, model.head_of().resolve(model.config.hidden_size)
        graphdef, self._params = nnx.split(model)
        # A few programs serve any batch: a fixed number of rows, and lengths that double.
        most = service.config.max_length
        self._lengths = [*itertools.takewhile(lambda n: n < most, _LENGTHS), most]

        def states(params: Any, tokens: Any, positions: Any) -> jax.Array:
            return nnx.merge(graphdef, params).hidden_states(tokens, positions=positions)[0]

        self._states = jax.jit(states)

    def compile(self) -> None:
        for length in self._lengths:
            self._read([[0] * length])
        # Slicing an array is a program too.
        assert self._weights

    @functools.cached_property
    def _weights(self) -> str:
        # A few numbers of each array distinguish trained weights.
        leaves = jax.tree.leaves(self._params)
        thin = [leaf.reshape(-1)[:: max(1, leaf.size // 64)] for leaf in leaves]
        return storage.digest(jax.device_get(thin), length=12)

    async def endpoint(self, http: HttpRequest) -> Response:
        service, loop = self._service, asyncio.get_running_loop()
        if http.method == "GET":
            find_key(service.config.keys, http.headers.get("authorization", ""))
            content = await loop.run_in_executor(service.readers, self._about)
            return Response(content, media_type="application/octet-stream")
        key, body = await read_body(service, http)
        reading = self._checked(parse_json(body))
        tokens, content = sum(map(len, reading.documents)), b""
        spent = service.accounts.reserve(key, queries=len(reading.documents), tokens=tokens)
        try:
            answer = functools.partial(self._answer, reading)
            content = await loop.run_in_executor(service.readers, answer)
        finally:
            record = {"prompt_tokens": tokens, "values": len(content) // 2, "rank": reading.rank}
            service.accounts.settle(spent, tokens=tokens, record=record)
        service.metrics.prompt_tokens.inc(tokens)
        return Response(content, media_type="application/octet-stream")

    def _checked(self, body: Any) -> _Reading:
        try:
            reading = _Reading.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            raise BadRequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        if len(reading.starts) != len(reading.documents):
            raise BadRequestError("starts: expected one per document")
        most, vocab_size = self._service.config.max_length, self._service.vocab_size
        for start, document in zip(reading.starts, reading.documents, strict=True):
            if not 1 <= start < len(document) <= most:
                want = f"at most {most} tokens, of which one after the first is wanted"
                got = f"{len(document)} from {start} on"
                raise BadRequestError(f"documents: expected {want}, got {got}")
            if min(document) < 0 or max(document) >= vocab_size:
                raise BadRequestError(f"documents: expected ids below {vocab_size}")
        return reading

    def _about(self) -> bytes:
        head = self._head
        about = {"tokenizer": self._service.tokenizer.fingerprint, "weights": self._weights}
        about |= {"vocab_axis": str(head.vocab_axis), "soft_cap": str(head.soft_cap or "")}
        return _encoded(about, kernel=head.kernel, bias=head.bias)

    def _read(self, documents: Sequence[Sequence[int]]) -> np.ndarray:
        """Hidden states of at most `_ROWS` documents."""
        length = next(n for n in self._lengths if n >= max(map(len, documents)))
        tokens = np.zeros((_ROWS, length), np.int32)
        positions = np.full_like(tokens, -1)
        for row, document in enumerate(documents):
            tokens[row, : len(document)] = document
            positions[row, : len(document)] = np.arange(len(document))
        return np.asarray(self._states(self._params, tokens, positions))

    def _answer(self, reading: _Reading) -> bytes:
        parts = []
        for start in range(0, len(reading.documents), _ROWS):
            some = reading.documents[start : start + _ROWS]
            spans = zip(self._read(some), reading.starts[start:], some, strict=False)
            parts += [states[first - 1 : len(one) - 1] for states, first, one in spans]
        hidden = np.concatenate(parts)
        rank = reading.rank
        if not 0 < rank < min(hidden.shape):
            return _encoded({"error": "0"}, hidden=hidden.astype(jnp.bfloat16))
        left, sizes, right = np.linalg.svd(hidden.astype(np.float32), full_matrices=False)
        code, basis = (left[:, :rank] * sizes[:rank]).astype(jnp.bfloat16), right[:rank]
        basis = basis.astype(jnp.bfloat16)
        gap = hidden - code.astype(np.float32) @ basis.astype(np.float32)
        error = np.linalg.norm(gap) / np.linalg.norm(hidden)
        return _encoded({"error": f"{error:.6g}"}, code=code, basis=basis)


def _encoded(about: dict[str, str], **tensors: Any) -> bytes:
    arrays = {name: np.asarray(array) for name, array in tensors.items() if array is not None}
    # The safetensors reader for NumPy has no bfloat16.
    bits = {
        name: np.ascontiguousarray(x.view(np.uint16) if x.dtype == jnp.bfloat16 else x)
        for name, x in arrays.items()
    }
    return storage.require("safetensors.numpy", extra="models").save(bits, about)

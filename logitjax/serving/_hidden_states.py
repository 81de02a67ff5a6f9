"""A teacher for students under training: its head once, and its hidden states of their text."""

import asyncio
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from logitjax import models, ops, storage
from logitjax.serving._body import parse_json, read_body
from logitjax.serving._errors import BadRequestError
from logitjax.serving._keys import find_key
from logitjax.serving._service import Service

_MEDIA = "application/octet-stream"


class Reading(BaseModel):
    """Documents whose hidden states are asked for.

    Attributes:
        documents: Token ids of each.
        starts: The first token of each whose prediction matters.
        rank: Columns of the low-rank code that is sent in their place; 0 sends them as they are.
    """

    model_config = ConfigDict(extra="forbid", strict=True)
    documents: list[list[int]] = Field(min_length=1)
    starts: list[int] = Field(min_length=1)
    rank: int = Field(default=0, ge=0)


class HiddenStates:
    """The endpoint `/v1/hidden_states` of a decoder.

    GET gives the head, with fingerprints of tokenizer and weights. POST gives for each document the
    hidden states that predict its tokens from `starts` on, one behind the other, in bfloat16; with
    a `rank` their best approximation of that rank, with its relative error. Both answers are in the
    form of safetensors, bfloat16 as its bits in uint16.

    Args:
        service: What the endpoints share.
        model: The decoder.
    """

    def __init__(self, service: Service, model: models.Decoder):
        self._service, self._width = service, model.config.hidden_size
        graphdef, self._params = nnx.split(model)
        self._read = jax.jit(functools.partial(_states, graphdef))
        self._head, self._digest = model.head_of(), _digest(self._params)

    async def endpoint(self, http: HttpRequest) -> Response:
        service, loop = self._service, asyncio.get_running_loop()
        config = service.config
        key = find_key(config.keys, http.headers.get("authorization", ""))
        if http.method == "GET":
            content = await loop.run_in_executor(service.readers, self._about)
            return Response(content, media_type=_MEDIA)
        try:
            body = await read_body(http, most=config.max_body_bytes, seconds=config.body_seconds)
        except ClientDisconnect:
            return Response(status_code=499)
        reading = self._checked(parse_json(body))
        tokens = sum(map(len, reading.documents))
        spent = service.accounts.reserve(key, queries=len(reading.documents), tokens=tokens)
        content = b""
        try:
            content = await loop.run_in_executor(service.readers, self._answer, reading)
        finally:
            record = {"prompt_tokens": tokens, "values": len(content) // 2, "rank": reading.rank}
            service.accounts.settle(spent, tokens=tokens, record=record)
        service.metrics.prompt_tokens.inc(tokens)
        return Response(content, media_type=_MEDIA)

    def _checked(self, body: Any) -> Reading:
        try:
            reading = Reading.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise BadRequestError(f"{place}: {first['msg']}") from None
        if len(reading.starts) != len(reading.documents):
            raise BadRequestError("starts: expected one a document")
        most, vocab_size = self._service.config.max_length, self._service.vocab_size
        for start, document in zip(reading.starts, reading.documents, strict=True):
            if not 1 <= start < len(document) <= most:
                raise BadRequestError(
                    f"documents: expected at most {most} tokens, of which one after the first is "
                    f"wanted, got {len(document)} from {start} on"
                )
            if min(document) < 0 or max(document) >= vocab_size:
                raise BadRequestError(f"documents: expected ids below {vocab_size}")
        return reading

    def _about(self) -> bytes:
        head = self._head
        tensors = {"kernel": head.kernel} | ({} if head.bias is None else {"bias": head.bias})
        about = {
            "vocab_axis": str(head.resolve(self._width).vocab_axis),
            "soft_cap": str(head.soft_cap or ""),
            "tokenizer": self._service.tokenizer.fingerprint,
            "weights": self._digest,
        }
        return _encoded({name: np.asarray(x) for name, x in tensors.items()}, about)

    def _answer(self, reading: Reading) -> bytes:
        lengths = [len(document) for document in reading.documents]
        # Powers of two, so that few programs serve any batch.
        shape = [1 << (size - 1).bit_length() for size in (len(lengths), max(lengths))]
        tokens, positions = np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
        for row, document in enumerate(reading.documents):
            tokens[row, : len(document)] = document
            positions[row, : len(document)] = np.arange(len(document))
        states = np.asarray(self._read(self._params, tokens, positions))
        pairs = zip(reading.starts, lengths, strict=True)
        hidden = np.concatenate([s[a - 1 : b - 1] for s, (a, b) in zip(states, pairs, strict=True)])
        if not 0 < reading.rank < min(hidden.shape):
            return _encoded({"hidden": hidden.astype(jnp.bfloat16)}, {"error": "0"})
        left, sizes, right = np.linalg.svd(hidden.astype(np.float32), full_matrices=False)
        rank = reading.rank
        code, basis = (
            x.astype(jnp.bfloat16) for x in (left[:, :rank] * sizes[:rank], right[:rank])
        )
        gap = hidden - code.astype(np.float32) @ basis.astype(np.float32)
        error = np.linalg.norm(gap) / np.linalg.norm(hidden)
        return _encoded({"code": code, "basis": basis}, {"error": f"{error:.6g}"})


def _states(graphdef: Any, params: Any, tokens: ops.Array, positions: ops.Array) -> jax.Array:
    hidden, _ = nnx.merge(graphdef, params).hidden_states(tokens, positions=positions)
    return hidden


def _encoded(tensors: dict[str, np.ndarray], about: dict[str, str]) -> bytes:
    plain = {
        # The reader of safetensors for NumPy knows no bfloat16.
        name: np.ascontiguousarray(x.view(np.uint16) if x.dtype == jnp.bfloat16 else x)
        for name, x in tensors.items()
    }
    return storage.require("safetensors.numpy", extra="models").save(plain, about)


def _digest(params: Any) -> str:
    """Twelve digits that tell the weights from others, of some numbers of each array."""
    thin = [leaf.reshape(-1)[:: max(1, leaf.size // 64)] for leaf in jax.tree.leaves(params)]
    return storage.digest(jax.device_get(thin), length=12)

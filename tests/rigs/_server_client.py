"""Models that servers are tried with, and clients of a server over HTTP."""

import http.client
import json
import pathlib
from typing import Any

from flax import nnx

from logitjax import models
from logitjax.models import Decoder, DecoderConfig, save_pretrained

COMPLETIONS = "/v1/completions"
JSON = {"Content-Type": "application/json"}


def small_decoder(vocab: int) -> Decoder:
    """One layer: what is measured is what lies around it."""
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_length=1024,
    )
    return Decoder(config, rngs=nnx.Rngs(0), layout="listed")


def small_model(directory: pathlib.Path, vocab: int) -> Decoder:
    """`small_decoder` on disk, as any model is."""
    model = small_decoder(vocab)
    save_pretrained(model, models.load_tokenizer("tiny"), directory)
    return model


def connect(address: str, timeout: float = 120.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(address.removeprefix("http://"), timeout=timeout)


def post(connection: http.client.HTTPConnection, body: Any) -> tuple[int, Any, bytes]:
    """Status, headers and text of a completion request; ``body`` JSON or bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", COMPLETIONS, raw, JSON)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()

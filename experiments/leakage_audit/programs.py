"""What a leakage audit runs on the model: the logits behind a batch of prompts. Nothing trains."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.shared import shapes
from logitjax import decoding, training


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one. One device."""
    mesh = training.make_mesh("data:1", devices=devices[:1])
    yield "logits of a batch of prompts", lambda: _logits(config, mesh)


def _logits(config: Any, mesh: Any) -> Any:
    shape = shapes.decoder_config(config.model)
    graphdef, params = shapes.abstract_decoder(shape, layout="listed")
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.prompt_length), jnp.int32)
    program = decoding.next_token_program(graphdef)
    return program.trace(*shapes.replicated(mesh, (params, tokens)))

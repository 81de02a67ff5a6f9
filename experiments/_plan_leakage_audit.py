"""What a leakage audit runs on the model: the logits behind a batch of prompts. Nothing trains."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _leakage_rows, _plan_models
from logitjax import training

CHIP = "v5e:2x2"


def trace_steps(config: Any, devices: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Names and how to trace each program of a run; the first is the main one. One device."""
    mesh = training.make_mesh("data:1", devices=devices[:1])
    yield "logits of a batch of prompts", lambda: _logits(config, mesh)


def _logits(config: Any, mesh: Any) -> Any:
    shape = _plan_models.decoder_config(config.model)
    graphdef, params = _plan_models.abstract_decoder(shape, layout="listed")
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.prompt_length), jnp.int32)
    program = _leakage_rows.last_logits(graphdef)
    return program.trace(*_plan_models.replicated(mesh, (params, tokens)))

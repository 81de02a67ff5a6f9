"""The jitted programs of a leakage audit, which its run and the planner share. Nothing trains."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.leakage_audit.config import Config
from experiments.shared import shapes
from logitjax import decoding
from logitjax.training import Program


def programs(config: Config, mesh: Any) -> Iterator[Program]:
    """The logits behind a batch of prompts, on one device."""
    graphdef, params = shapes.abstract_decoder(shapes.decoder_config(config.model), layout="listed")
    tokens = jax.ShapeDtypeStruct((config.batch_size, config.prompt_length), jnp.int32)
    yield Program(
        name="logits of a batch of prompts",
        jitted=decoding.next_token_program(graphdef),
        arguments=shapes.replicated(mesh, (params, tokens)),
    )

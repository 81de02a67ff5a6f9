"""What graph fusion runs on devices: the update of every arm of a preset."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.graph_fusion import train
from experiments.graph_fusion.config import Config
from experiments.graph_fusion.data import source_names
from experiments.shared import shapes
from logitjax import losses, models, training
from logitjax.training import Program


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """The update of each arm with its first settings; the one that needs the most comes first."""
    graphdef, params = shapes.abstract_decoder(
        shapes.decoder_config(config.pivot),
        dtype=jnp.dtype(config.dtype),
        layout=config.layout,
        remat=config.remat,
    )
    batch = {"pivot": shapes.packed(mesh, config.batch_size, config.seq_len)}
    sources = dict.fromkeys(source_names(config), _statistics(config, mesh))
    # Two losses in one update need the most.
    for loss in sorted(config.loss, key=lambda loss: (loss != "uld+gld", loss)):
        settings = train.Settings(loss, config.learning_rate[0], config.gld[0])
        tx, step = train.make_step(config, graphdef, mesh, settings)
        trained = jax.eval_shape(
            lambda params, loss=loss: train.trained_parameters(loss, graphdef, params), params
        )
        state = training.abstract_train_state(trained, tx, mesh=mesh, rules=models.DECODER_RULES)
        read = {} if loss == "sft" else {"sources": sources}
        arguments = (state, batch | read)
        yield Program(name=f"update of the {loss} arm", jitted=step, arguments=arguments)


def _statistics(config: Config, mesh: Mesh) -> tuple[losses.GraphStatistics, Any]:
    """What a source says about a batch, and where."""
    positions, k = config.seq_len - 1, config.cache_top_k
    columns: dict[str, Any] = shapes.rows(
        mesh,
        config.batch_size,
        values=(jnp.float32, positions, k),
        indices=(jnp.int32, positions, k),
        log_z=(jnp.float32, positions),
        mean=(jnp.float32, positions),
        std=(jnp.float32, positions),
        where=(jnp.bool_, positions),
    )
    where = columns.pop("where")
    return losses.GraphStatistics(**columns), where

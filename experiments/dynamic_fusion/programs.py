"""The jitted programs of dynamic fusion, which its run and the planner share."""

from collections.abc import Iterator
from typing import Any

from experiments.dynamic_fusion.config import Config
from experiments.dynamic_fusion.train import make_update, text_loss
from experiments.shared import shapes
from logitjax.training import Program


def programs(config: Config, mesh: Any) -> Iterator[Program]:
    """The updates of the large model (the ceiling) and of an expert, on text."""
    batch = shapes.packed(mesh, config.batch_size, config.seq_len)
    rates = {"large": config.large_learning_rate, "base": config.learning_rate}
    for name, rate in rates.items():
        spec = getattr(config, name)
        if not spec:  # The base is cut from the large model.
            continue
        graphdef, params = shapes.abstract_decoder(
            shapes.decoder_config(spec), dtype=config.dtype, layout=config.layout
        )
        steps = config.tune_steps
        update = make_update(config, graphdef, text_loss, mesh, rate=rate, steps=steps)
        yield update.program(f"update of the {name} model", params, batch)

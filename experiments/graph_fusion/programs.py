"""Programs of graph fusion: the update of every arm of a preset."""

import dataclasses
from collections.abc import Iterator

from flax import nnx
from jax.sharding import Mesh

from experiments.graph_fusion import arms, train
from experiments.graph_fusion.config import Config
from experiments.shared import shapes
from experiments.shared.student import update_programs
from logitjax import models
from logitjax.training import Program


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """The update of each arm with its first settings, then its teachers' pass over all rows.

    The most demanding arm comes first. Teachers read once for all of them.
    """
    shape, options = shapes.decoder_config(config.student), train.decoder_options(config)

    def model() -> models.Decoder:
        return models.Decoder(shape, rngs=nnx.Rngs(0), **options)

    # Two losses in one update need the most memory.
    passes: dict[str, Program] = {}
    for arm in sorted(config.loss, key=lambda arm: (arm != "uld+gld", arm)):
        settings = arms.first_settings(config, arm)
        update, *readings = update_programs(
            model,
            settings.objective(config),
            train.course(config, settings, 0),
            train.make_reading(config),
            mesh=mesh,
            name=f"update of the {arm} arm",
            decoder_config=shapes.decoder_config,
        )
        runs = config.seeds + (config.trials if config.chooses else 0)
        yield dataclasses.replace(update, calls=update.calls * runs)
        passes |= {program.name: program for program in readings}
    yield from passes.values()

"""What graph fusion runs on devices: the update of every arm of a preset."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from experiments.graph_fusion import arms, train
from experiments.graph_fusion.config import DUAL, Config
from experiments.shared import shapes
from logitjax import distillation, losses, models, training
from logitjax.training import Program


def programs(config: Config, mesh: Mesh) -> Iterator[Program]:
    """The update of each arm with its first settings; the one that needs the most comes first."""
    graphdef, params = shapes.abstract_decoder(
        shapes.decoder_config(config.student),
        dtype=jnp.dtype(config.dtype),
        layout=config.layout,
        remat=config.remat,
    )
    names = tuple(f"source{i}" for i in range(len(config.sources)))
    batch = {"pivot": shapes.packed(mesh, config.batch_size, config.seq_len)}
    sources = dict.fromkeys(names, _statistics(config, mesh))
    # Two losses in one update need the most.
    for arm in sorted(config.loss, key=lambda arm: (arm != "uld+gld", arm)):
        settings = arms.first_settings(config, arm)
        student = _student(config, graphdef, params, auxiliary_head=arm == DUAL)
        objective = settings.objective(config)
        tx, step = distillation.make_update(
            student,
            objective,
            train.course(config, settings, 0),
            names if objective.taught else (),
            mesh=mesh,
        )
        rules = models.DECODER_RULES
        state = training.abstract_train_state(student.trained, tx, mesh=mesh, rules=rules)
        frozen = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            student.frozen,
            rules.shardings(student.frozen, mesh),
        )
        read = {"sources": sources} if objective.taught else {}
        yield Program(
            name=f"update of the {arm} arm", jitted=step, arguments=(state, batch | read, frozen)
        )


def _student(
    config: Config, graphdef: Any, params: Any, *, auxiliary_head: bool
) -> distillation.Student:
    """The student of abstract parameters."""
    made: list[distillation.Student] = []

    def make(params: Any) -> Any:
        model = nnx.merge(graphdef, params)
        made.append(
            distillation.make_student(model, freeze=config.freeze, auxiliary_head=auxiliary_head)
        )
        return made[0].trained, made[0].frozen

    trained, frozen = jax.eval_shape(make, params)
    return distillation.Student(graphdef=made[0].graphdef, trained=trained, frozen=frozen)


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

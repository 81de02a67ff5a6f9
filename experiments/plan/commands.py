"""Programs of training commands, with the commands' own flags."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from experiments.shared.student import update_programs
from experiments.vq_head.programs import tuning_program
from logitjax import models, vq
from logitjax.commands import convert_head, distill
from logitjax.training import Program


def distill_programs(config: distill.Config, mesh: Mesh) -> Iterator[Program]:
    """The update of the student, its sampling, and its teachers' reading."""
    shape = distill.student_shape(config)

    def model() -> models.Decoder:
        return models.Decoder(
            shape, rngs=nnx.Rngs(0), dtype=config.dtype, layout=config.layout, remat=config.remat
        )

    yield from update_programs(
        model,
        distill.objective_of(config),
        distill.course_of(config),
        distill.reading_of(config),
        mesh=mesh,
        on_policy=config.on_policy,
        freeze="embedding" if config.freeze == "below" else config.freeze,
        lora_rank=config.lora_rank,
    )


def convert_head_programs(config: convert_head.Config, mesh: Mesh) -> Iterator[Program]:
    """The step that tunes the codes."""
    shape = models.load_config(config.model)
    convert = config.convert
    if convert.kind != "vq":
        raise ValueError(f"kind: expected 'vq' for a plan, got {convert.kind!r}")
    tuning = vq.Tuning(
        steps=convert.steps, batch_size=convert.batch_size, learning_rate=convert.learning_rate
    )
    sizes = dict(vocab=shape.vocab_size, width=shape.hidden_size, codes=convert.num_codes)
    yield tuning_program(tuning, mesh, **sizes)


#: A command's configuration and its programs.
COMMANDS: Mapping[str, tuple[type, Callable[[Any, Mesh], Iterator[Program]]]] = {
    "distill": (distill.Config, distill_programs),
    "convert-head": (convert_head.Config, convert_head_programs),
}

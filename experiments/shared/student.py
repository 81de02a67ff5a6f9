"""Device programs of a training, for a plan: no weights are loaded or initialised."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from experiments.shared import shapes
from logitjax import losses, models, training
from logitjax.distillation import (
    ChunkScores,
    Course,
    Objective,
    Reading,
    Student,
    Teacher,
    TokenProjection,
    TokenSet,
    Vocabularies,
)
from logitjax.distillation.on_policy import OnPolicy, rollout_program


def update_programs(
    model: Callable[[], models.Decoder],
    objective: Objective,
    course: Course,
    reading: Reading,
    *,
    mesh: Mesh,
    name: str = "update of the student",
    on_policy: OnPolicy = OnPolicy(),  # noqa: B008
    decoder_config: Callable[[str], models.DecoderConfig] = models.load_config,
    **options: Any,
) -> Iterator[training.Program]:
    """The update of a student, then its sampling, and its teachers' reading.

    Args:
        model: Makes the decoder; it is only traced.
        reading: Sizes of rows and of the teachers' output.
        on_policy: The student's share of each batch.
        decoder_config: Function from a model's name to its configuration.
        **options: For `Student.of`.
    """
    made: list[Student] = []
    sizes: list[int] = []

    def build() -> tuple[Any, Any]:
        decoder = model()
        # `eval_shape` returns arrays alone; everything else is passed out through these lists.
        sizes.append(decoder.config.vocab_size)
        made.append(Student.of(decoder, objective=objective, **options))
        return made[0].trained, made[0].frozen

    # Shapes only: a plan for a model of 24B weights has to run on a laptop.
    trained, frozen = jax.eval_shape(build)
    student = Student(graphdef=made[0].graphdef, trained=trained, frozen=frozen)
    names = reading.names if objective.taught else ()
    needs = [term.teacher for term, _ in objective.terms if term.teacher is not None]
    # The other vocabulary is unknown here: assumed as large as the student's, token by token.
    rules_needed = {n.projection for n in needs if n.projection}
    sources = dict.fromkeys(names, _same_vocabulary(sizes[0], rules_needed))
    tx, step = course.update(student, objective, sources, mesh=mesh)
    sharding = training.BatchLayout(mesh).sharding

    def rows(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((course.batch_size, *shape), dtype, sharding=sharding)

    length = reading.seq_len
    columns = {n: rows(jnp.int32, length) for n in ("tokens", "segment_ids", "positions")}
    batch: dict[str, Any] = {"pivot": columns | {"loss_mask": rows(jnp.bool_, length)}}
    live, heads = [], {}
    if names:
        teacher = _answer(rows, length - 1, reading.top_k, chunks=any(n.chunks for n in needs))
        batch["sources"] = dict.fromkeys(names, teacher)
        if reading.teacher_reads == "live":
            # A served teacher is assumed to be as large as the student.
            decoders = {
                n: nnx.eval_shape(model)
                if spec.startswith("api:")
                else _decoder(decoder_config(spec))
                for n, spec in zip(names, reading.teachers)
            }
            calls = float(course.steps)
            live = [
                _reading(n, d, reading, batch["pivot"], mesh, calls) for n, d in decoders.items()
            ]
        if any(n.hidden for n in needs) and live:
            heads = {n: nnx.eval_shape(lambda m: m.head_of(), d) for n, d in decoders.items()}
            for n, decoder in decoders.items():
                states = rows(decoder.dtype, length - 1, decoder.config.hidden_size)
                batch["sources"][n] = dataclasses.replace(teacher, hidden=states)
    if on_policy.share:
        batch["columns"] = {"log_probs": rows(jnp.float32, length - 1)}
    state = training.TrainState.abstract(trained, tx, mesh=mesh, rules=models.DECODER_RULES)
    placed = shapes.placed(mesh, frozen | ({"teachers": heads} if heads else {}))
    yield training.Program(
        name=name,
        jitted=step,
        arguments=(state, batch, placed),
        calls=course.steps,
        kept=2,  # checkpoints
    )
    if on_policy.share:
        yield _writing(student, on_policy, state.params, placed, course, reading, mesh)
    yield from live
    if names and reading.teacher_reads == "cache":
        yield from _cached(names, reading, course, decoder_config, mesh)


def _answer(
    rows: Callable[..., jax.ShapeDtypeStruct], length: int, k: int, *, chunks: bool
) -> Teacher:
    number, places, ids = (rows(kind, length) for kind in (jnp.float32, jnp.bool_, jnp.int32))
    statistics = losses.GraphStatistics(
        values=rows(jnp.float32, length, k),
        indices=rows(jnp.int32, length, k),
        log_z=number,
        mean=number,
        std=number,
    )
    scores = ChunkScores(ids=ids, ends=ids, scores=number, where=places) if chunks else None
    return Teacher(statistics=statistics, where=places, single=places, chunks=scores)


def _cached(
    names: Iterable[str],
    reading: Reading,
    course: Course,
    decoder_config: Callable[[str], models.DecoderConfig],
    mesh: Mesh,
) -> Iterator[training.Program]:
    """Each teacher's pass over the rows of a run, read once, split over all devices."""
    mesh = training.make_mesh("fsdp:-1", devices=list(mesh.devices.flat))
    layout = training.BatchLayout(mesh)
    # In whole pieces, as `model_reader` pads them.
    rows = -(-reading.batch_size // layout.pieces) * layout.pieces
    shape = jax.ShapeDtypeStruct((rows, reading.seq_len), jnp.int32, sharding=layout.sharding)
    columns: dict[str, Any] = dict.fromkeys(("tokens", "segment_ids", "positions"), shape)
    calls = course.steps * course.batch_size / rows
    for name, spec in zip(names, reading.teachers):
        if not spec.startswith("api:"):
            decoder = _decoder(decoder_config(spec), dtype=reading.dtype, param_dtype=reading.dtype)
            yield dataclasses.replace(
                _reading(name, decoder, reading, columns, mesh, calls), kept=calls
            )


def _writing(
    student: Student,
    on_policy: OnPolicy,
    params: Any,
    frozen: Any,
    course: Course,
    reading: Reading,
    mesh: Mesh,
) -> training.Program:
    layout, (prompt, new) = training.BatchLayout(mesh), on_policy.lengths(reading.seq_len)
    count = len(on_policy.rows(course.batch_size)) * on_policy.generate_every
    # Padded with rows that nobody reads, so that every device writes as many.
    total = -(-count // layout.pieces) * layout.pieces
    inputs = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding)
        for shape, dtype in (
            ((total, prompt), jnp.int32),
            ((total, prompt), jnp.int32),
            ((total,), jnp.uint32),
        )
    ]
    return training.Program(
        name="rollouts of the student",
        jitted=rollout_program(student, on_policy, new_tokens=new, stop_ids=(0,), mesh=mesh),
        arguments=(params, frozen, *inputs),
    )


def _decoder(config: models.DecoderConfig, **options: Any) -> models.Decoder:
    return nnx.eval_shape(
        lambda: models.Decoder(config, rngs=nnx.Rngs(0), layout="listed", **options)
    )


def _reading(
    name: str,
    decoder: models.Decoder,
    reading: Reading,
    columns: Mapping[str, Any],
    mesh: Mesh,
    calls: float,
) -> training.Program:
    apply_fn, params = models.from_nnx(decoder)

    def read(*arguments: Any) -> Any:
        # As `model_reader` calls it.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return reading.record(apply_fn.graphdef, *arguments)

    tokens = columns["tokens"]
    number = jax.ShapeDtypeStruct(tokens.shape[:1], jnp.int64, sharding=tokens.sharding)
    arguments = (shapes.placed(mesh, params), dict(columns), number)
    return training.Program(
        name=f"reading of {name}", jitted=jax.jit(read), arguments=arguments, calls=calls
    )


def _same_vocabulary(size: int, rules: Iterable[str]) -> Vocabularies:
    ids = np.arange(size, dtype=np.int32)[:, None]
    one = TokenProjection(ids=ids, weights=np.ones(ids.shape, np.float32), size=size)
    return Vocabularies(
        projections=dict.fromkeys(rules, one), boundary=TokenSet(np.ones(size, bool))
    )

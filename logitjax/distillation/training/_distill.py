import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from logitjax import data, decoding, models, processes, storage, training
from logitjax.distillation._objective import Objective
from logitjax.distillation._teacher import Vocabularies
from logitjax.distillation.on_policy._options import OnPolicy
from logitjax.distillation.on_policy._rollouts import Rollouts
from logitjax.distillation.on_policy._update import on_policy_update
from logitjax.distillation.training._corpus import Corpus
from logitjax.distillation.training._loss_function import LossFunction
from logitjax.distillation.training._student import Student


@dataclasses.dataclass(frozen=True, kw_only=True)
class Course:
    """Schedule of a training: steps, batch size, learning rate and evaluation.

    Attributes:
        steps: Number of optimiser steps.
        batch_size: Number of rows in a step, summed over processes.
        accumulate: Number of microbatches in a step.
        learning_rate: Peak learning rate. It rises linearly, then falls to a tenth along a cosine.
        warmup: Share of the steps during which the learning rate rises.
        weight_decay: Weight decay of AdamW.
        eval_rows: Number of rows to score in each of the validation and the test text.
        eval_batch: Number of rows to score at once; `batch_size` if 0.
        seed: Seed of the order of rows and of new parameters.
        track: Further destinations of metrics: TensorBoard files, Weights & Biases (offline unless
            `WANDB_MODE` is online), or curves in the terminal.
        loop: How often to save, log and evaluate.
    """

    steps: int = 200
    batch_size: int = 4
    accumulate: int = storage.option(1, execution=True)
    learning_rate: float = 3e-4
    warmup: float = 0.1
    weight_decay: float = 0.01
    eval_rows: int = 32
    eval_batch: int = storage.option(0, execution=True)
    seed: int = 0
    track: tuple[Literal["tensorboard", "wandb", "terminal"], ...] = storage.option(
        (), execution=True
    )
    loop: training.LoopOptions = training.LoopOptions()  # noqa: RUF009

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: expected a share of the steps, got {self.warmup}")

    def check(self, mesh: Mesh) -> None:
        """Raise a ValueError if `batch_size` or `eval_batch` cannot be split over the mesh."""
        pieces = training.BatchLayout(mesh).pieces
        if self.batch_size % (self.accumulate * pieces):
            raise ValueError(
                "batch_size: expected a multiple of accumulate x data x fsdp = "
                f"{self.accumulate} x {pieces}, got {self.batch_size}"
            )
        if self.eval_batch % pieces:
            raise ValueError(
                f"eval_batch: expected a multiple of data x fsdp = {pieces}, got {self.eval_batch}"
            )

    def visited_rows(
        self,
        packed: data.PackedSplits,
        *,
        seeds: Sequence[int] | None = None,
        splits: Sequence[str] = data.SPLITS[1:],
    ) -> dict[str, np.ndarray]:
        """Return the rows of each split for which runs need the teachers' output, ascending.

        Args:
            seeds: Seeds of the runs, by default the course's; empty if training uses no teacher.
            splits: Held-out splits to score.
        """
        train = packed.splits["train"]
        visited = [
            train.indices(step, seed=seed, batch_size=self.batch_size)
            for seed in ((self.seed,) if seeds is None else seeds)
            for step in range(self.steps)
        ]
        rows = {"train": np.unique(np.concatenate(visited)) if visited else np.zeros(0, np.int64)}
        for split in splits:
            rows[split] = np.arange(min(self.eval_rows, len(packed.splits[split])))
        return rows

    def update(
        self,
        student: Student,
        objective: Objective,
        sources: Mapping[str, Vocabularies],
        *,
        mesh: Mesh,
    ) -> tuple[optax.GradientTransformation, training.TrainStep]:
        """Build the optimiser and the compiled step, which takes frozen parameters as constants."""
        schedule = training.Schedule(
            self.learning_rate, warmup=int(self.warmup * self.steps), total_steps=self.steps
        )
        tx = schedule.optimizer(weight_decay=self.weight_decay)
        loss = LossFunction(objective, student, sources)
        step = training.TrainStep(
            loss,
            tx,
            mesh=mesh,
            accumulate=self.accumulate,
            schedule=schedule,
            # With one microbatch the loss itself counts.
            counts=loss.counts if self.accumulate > 1 else None,
        )
        return tx, step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """The result of a training.

    Attributes:
        curve: Pairs of a step and its validation perplexity; empty if `eval_every` is 0.
        parts: For `loss` and each of its terms, pairs of a step and the mean since the previous
            pair.
        tokens_per_second: Predicted tokens per second of training, the median over log lines.
        seen: For each loss across tokenizers, pairs of a step and the share of labels it uses.
    """

    params: Any
    curve: tuple[tuple[int, float], ...]
    parts: Mapping[str, tuple[tuple[int, float], ...]]
    tokens_per_second: float
    seen: Mapping[str, tuple[tuple[int, float], ...]] = dataclasses.field(default_factory=dict)


class Scorer:
    """Held-out scores and samples of a student, from one program for any of its parameters.

    It uses the held-out rows of `corpus`; `course` sets how many, and how many at once.
    """

    def __init__(self, student: Student, corpus: Corpus, course: Course, *, mesh: Mesh):
        self._student, self._corpus, self._course, self._mesh = student, corpus, course, mesh
        self._size = course.eval_batch or course.batch_size
        self._step = training.EvalStep(student.score, mesh=mesh)
        self._frozen = models.DECODER_RULES.place(student.frozen, mesh)

    def scores(self, params: Any, split: str) -> dict[str, float]:
        """Compute perplexity, accuracy, bits per byte, and agreement and KL with the first teacher.

        Agreement and KL need a teacher of the same vocabulary. `tokens_per_second` counts tokens
        read in the fastest batch after the first, which compiles. Scores without labels are nan.
        """
        storage.progress.mark(f"scoring {split} text", log=True)
        batches = self._corpus.scored(
            split, self._mesh, batch_size=self._size, rows=self._course.eval_rows
        )
        totals: dict[str, np.ndarray] = {}
        speeds = []
        for batch in batches:
            begin = time.perf_counter()
            sums = jax.device_get(self._step(params, batch, self._frozen))
            tokens = np.size(batch["pivot"]["tokens"]) * jax.process_count()  # equal shares
            # The sums are on the host by now, so the work is complete.
            speeds.append(tokens / (time.perf_counter() - begin))
            for name, pair in sums.items():
                totals[name] = totals.get(name, 0.0) + np.asarray(pair, np.float64)
        # nan without labels: a zero would be the best possible loss.
        means = {
            n: float(total / count) if count else math.nan for n, (total, count) in totals.items()
        }
        # That of the mean loss over labels.
        means["perplexity"] = float(np.exp(means["loss"]))
        # A student equal to its teacher is at zero, which rounding may make negative.
        if "teacher_kl" in means:
            means["teacher_kl"] = max(means["teacher_kl"], 0.0)
        if len(speeds) > 1:
            means["tokens_per_second"] = max(speeds[1:])
        return means

    def sample(self, params: Any, *, length: int = 32) -> tuple[str, str]:
        """Return the beginning of a held-out text and the student's greedy continuation."""
        packed = self._corpus.packed
        name = packed.names["pivot"]
        tokenizer = packed.tokenizers[name]
        columns = packed.splits["test"].rows([0])[name]
        tokens, learnt = columns["tokens"][0], columns["loss_mask"][0]
        first = int(np.argmax(learnt)) if learnt.any() else 1
        # Cut a conversation where its first answer begins, other text after a few words.
        stop = first if packed.chat else min(first + 8, int((columns["segment_ids"] == 1).sum()))
        prompt = tokens[: max(stop, 1)].tolist()
        model = models.with_layout(self._student.finished(processes.local_copy(params)), "listed")
        stops = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        generation = decoding.generate(model, prompt, max_new_tokens=length, stop_ids=stops)
        new = np.asarray(generation.tokens)[0, : int(generation.lengths[0])].tolist()
        return tokenizer.decode(prompt), tokenizer.decode(new, skip_special=True)


def train_student(
    student: Student,
    corpus: Corpus,
    objective: Objective,
    course: Course,
    *,
    mesh: Mesh,
    directory: epath.Path,
    scorer: Scorer | None = None,
    on_policy: OnPolicy = OnPolicy(),  # noqa: B008
) -> Trained:
    """Train a student, continuing bit for bit from the newest checkpoint, or read a finished run.

    Args:
        directory: Folder of checkpoints and of `metrics.jsonl`.
        scorer: Scores validation rows during training.
        on_policy: How much of each batch the student writes; its teachers have to read live.
    """
    sources = {n: s.vocabularies for n, s in corpus.sources.items()} if objective.taught else {}
    tx, step = course.update(student, objective, sources, mesh=mesh)
    scorer = scorer or Scorer(student, corpus, course, mesh=mesh)
    frozen = models.DECODER_RULES.place({**student.frozen, **corpus.constants}, mesh)
    # Complete before a checkpoint is read, which then only fills its arrays.
    state_options: Any = {"mesh": mesh, "rules": models.DECODER_RULES, "seed": course.seed}
    start = functools.partial(training.TrainState.create, student.trained, tx, **state_options)
    rows = corpus.packed.splits["train"]
    index, count = training.BatchLayout(mesh).share
    order: Any = {"seed": course.seed, "batch_size": course.batch_size}
    text = functools.partial(rows.batch, process_index=index, process_count=count, **order)
    taught = functools.partial(corpus.batch, "train", taught=bool(sources))
    written = on_policy.expected(course.batch_size, rows.seq_len, mesh)

    def batch(number: int) -> dict[str, Any]:
        return taught(text(number)) | written

    _check_seen(LossFunction(objective, student, sources), batch, frozen, course, mesh=mesh)

    def validate(state: training.TrainState, step: int) -> dict[str, float]:
        return scorer.scores(state.params, "validation")

    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(training.Checkpointer(directory / "checkpoints"))
        update: Any = functools.partial(step, constants=frozen)
        if on_policy.share:
            sizes = {**order, "mesh": mesh, "directory": directory / "rollouts"}
            rollouts = Rollouts(student, on_policy, corpus.packed, **sizes)
            update = on_policy_update(
                rollouts,
                taught,
                step,
                frozen,
                oldest=lambda: min(checkpointer.steps(), default=0),
                reported=corpus.metrics,
            )
        writer = training.make_writer(directory, track=course.track)
        stack.enter_context(contextlib.closing(writer))
        state = training.train_loop(
            start,
            update,
            # The update lets the teachers read what is written.
            text if on_policy.share else batch,
            total_steps=course.steps,
            workdir=directory,
            checkpointer=checkpointer,
            eval_fn=validate if course.loop.eval_every else None,
            writer=writer,
            identity={
                "data": rows.fingerprint,
                "loss": _identity(objective, course),
                **({"on_policy": repr(on_policy)} if on_policy.share else {}),
            },
            options=course.loop,
        )
    path = directory / "metrics.jsonl"
    texts = processes.broadcast_from_first(lambda: path.read_text().splitlines())
    lines = [json.loads(text) for text in texts]
    # The first interval holds the compilation.
    speeds = _column(lines, "tokens_per_second")
    return Trained(
        params=state.params,
        curve=_column(lines, "eval/perplexity"),
        parts={n: _column(lines, n) for n in ("loss", *objective.names)},
        seen={n: _column(lines, f"seen/{n}") for n in objective.names},
        tokens_per_second=float(np.median([speed for _, speed in speeds[1:] or speeds] or [0.0])),
    )


# Number of rows in which a term must find something to learn from.
_ROWS_LOOKED_AT = 64


def _check_seen(
    loss: LossFunction, batch: Callable[[int], Any], frozen: Any, course: Course, *, mesh: Mesh
) -> None:
    """Raise a ValueError if a term uses none of the text and would silently train on zeros."""
    first = batch(0)
    # Shapes tell whether any term counts positions.
    if not jax.eval_shape(loss.counts, first, frozen)["seen"]:
        return

    def count(params: Any, batch: Any, rng: Any, frozen: Any) -> Any:
        totals = loss.counts(batch, frozen)["seen"]
        return 0.0, 1, {name: (total, 1) for name, total in totals.items()}

    # Training uses these rows first, so the check needs no other data.
    batches = [
        first,
        *map(batch, range(1, min(course.steps, _ROWS_LOOKED_AT // course.batch_size))),
    ]
    step = training.EvalStep(count, mesh=mesh)
    means = step.means({}, batches, frozen)
    for name, seen in means.items():
        if name != "loss" and not seen:
            term, _, number = name.partition("/")
            raise ValueError(
                f"loss {term!r}: expected some of the text to learn from, got none in "
                f"{len(batches) * course.batch_size} rows of source{number}"
            )


def _identity(objective: Objective, course: Course) -> str:
    terms = "+".join(f"{term!r}:{weight:g}" for term, weight in objective.terms)
    rate = f"rate {course.learning_rate:g}, warmup {course.warmup}, decay {course.weight_decay}"
    return f"{terms}, {rate}, {course.steps} steps of {course.batch_size}, seed {course.seed}"


def _column(lines: list[Mapping[str, float]], name: str) -> tuple[tuple[int, float], ...]:
    # A mean over no labels is written as null.
    items = [line for line in lines if line.get(name) is not None]
    return tuple((int(line["step"]), float(line[name])) for line in items)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled:
    """A finished student.

    Attributes:
        model: The finished model, adapters merged.
        before, after: Scores on test rows before and after training.
        samples: A `prompt`, and the student's continuations `before` and `after` training.
    """

    model: models.Decoder
    before: Mapping[str, float]
    after: Mapping[str, float]
    trained: Trained
    samples: Mapping[str, str]


def distill(
    student: Student,
    corpus: Corpus,
    objective: Objective,
    course: Course,
    *,
    mesh: Mesh,
    workdir: epath.Path,
    on_policy: OnPolicy = OnPolicy(),  # noqa: B008
) -> Distilled:
    """Train a student on text and its teachers' output, and score it before and after.

    If interrupted, the same call continues where it was. A folder of another student, text,
    teacher, objective or course is an error.

    Args:
        student: The decoder and the parts of it to train, see `Student.of`.
        corpus: Text and teachers, see `Reading.load`.
        workdir: Folder for all files of the run.
        on_policy: How much of each batch the student writes; its teachers have to read live.

    Raises:
        ValueError: The folder was begun with other inputs (lists all differences), or a batch
            cannot be split over the devices.
    """
    course.check(mesh)
    made_from = _made_from(student, corpus, objective, course)
    if on_policy.share:
        # Only if used, so that folders of runs without it remain valid.
        made_from["on_policy"] = dataclasses.asdict(on_policy)
    _check_folder(made_from, workdir)
    scorer = Scorer(student, corpus, course, mesh=mesh)

    def measure() -> dict[str, Any]:
        start = models.DECODER_RULES.place(student.trained, mesh)
        return {"scores": scorer.scores(start, "test"), "sample": scorer.sample(start)}

    before = processes.kept(workdir / "before.json", measure)
    trained = train_student(
        student,
        corpus,
        objective,
        course,
        mesh=mesh,
        directory=workdir / "train",
        scorer=scorer,
        on_policy=on_policy,
    )
    after = scorer.scores(trained.params, "test")
    prompt, message = scorer.sample(trained.params)
    return Distilled(
        model=student.finished(trained.params),
        before=before["scores"],
        after=after,
        trained=trained,
        samples={"prompt": prompt, "before": before["sample"][1], "after": message},
    )


def _made_from(
    student: Student, corpus: Corpus, objective: Objective, course: Course
) -> dict[str, Any]:
    """Everything that determines the result of a training."""
    chosen = dataclasses.asdict(course)
    # When a run saves, logs and scores, and in what pieces it computes, does not change the result.
    for field in dataclasses.fields(course):
        if field.name == "loop" or field.metadata.get("execution"):
            del chosen[field.name]
    teachers = {name: source.identity for name, source in corpus.sources.items()}
    text = {split: rows.fingerprint for split, rows in corpus.packed.splits.items()}
    return {
        "student": student.fingerprint,
        "text": storage.digest(text, length=12),
        "teachers": {name: storage.digest(inputs, length=12) for name, inputs in teachers.items()},
        "objective": {
            "terms": [f"{term!r}:{weight:g}" for term, weight in objective.terms],
            "teachers": objective.teachers,
        },
        "course": chosen,
    }


def _check_folder(made_from: Mapping[str, Any], workdir: epath.Path) -> None:
    manifest = storage.Manifest(workdir, "distillation run")
    with processes.first_before_others("distillation run"):
        if manifest.exists():
            manifest.check(made_from)
        elif jax.process_index() == 0:
            manifest.write(made_from)

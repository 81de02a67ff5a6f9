"""Make a model smaller, or train it to match other models.

    logitjax distill --student=smollm2 --drop_layers=6 --data=tfds:wiki_summaries --out=runs/small
    logitjax distill --recipe=prune-25 --student=hf:org/name --data=text:FILE --out=runs/smaller
    logitjax distill --student=DIR --teacher=DIR2 --data=jsonl:chats.jsonl --out=runs/better
    logitjax distill --student=DIR --teacher=cache:runs/cache/source0 --data=text:FILE \\
        --loss=sft:0.3 --loss=kl:0.7 --out=runs/cached
    logitjax distill --draft_head --student=smollm2 --data=tfds:wiki_summaries --out=runs/draft
    logitjax distill --student=DIR --teacher=api:http://127.0.0.1:8000 --cache_top_k=5 \\
        --student_head=runs/audit --data=text:FILE --out=runs/replica

The student is pruned on request. The teachers read the text once, and the student then learns from
the text (`sft`) and from them. `kl`, `rkl` and `jsd` compare token by token and need a shared
vocabulary; `first_piece`, `pkl`, `hybrid`, `hkl`, `alm`, `uld` and `gld` also learn from other
tokenizers (docs/any_tokenizer.md). Without a `--teacher`, a pruned student learns from the model it
was pruned from.

With `--on_policy=0.5` the student writes half of each batch itself, and live teachers correct it
(docs/on_policy.md).

With `--draft_head` the student stays as it is, and a head of one layer learns to draft its next
tokens, for `logitjax generate --draft=OUT/model` (docs/draft_heads.md).

OUT/model is the result: a Hugging Face directory for transformers, vLLM and the other commands.
OUT/report.md compares the student before and after, with curves and samples. `--recipe` supplies
initial settings, and `--dry_run` estimates time, memory and disk space.

A teacher is a model, `cache:DIR` as written by `logitjax cache-logits`, or `api:URL`: a server on
this machine that reports log-probabilities with token ids or, for live reading, a server anywhere
that returns hidden states (`logitjax serve --hidden_states`). `--student_head` gives the student
the head that `logitjax audit` recovered from that server. You may stop the run at any time; the
same command continues it bit for bit. See docs/distil.md.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np
from absl import logging
from etils import epath

from logitjax import data, distillation, models, processes, storage, training
from logitjax.commands import draft_head, hub
from logitjax.commands.cli import REQUIRED, field, flatten, nested
from logitjax.commands.tables import markdown_table, text_cell
from logitjax.commands.work import check_length, shortened

# Settings of each recipe; flags take precedence.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "prune-25": {"drop_share": 0.25, "steps": 400, "learning_rate": 3e-4, "freeze": "below"},
    "prune-10": {"drop_share": 0.1, "steps": 200, "learning_rate": 2e-4, "freeze": "below"},
    "quick": {"drop_share": 0.2, "steps": 200, "seq_len": 128, "batch_size": 2,
              "learning_rate": 2e-4},
    "same-size": {"loss": ("sft:0.3", "kl:0.7"), "steps": 1000},
    "own-samples": {"on_policy": 0.5, "teacher_reads": "live", "loss": ("mixed_kl:1.0",)},
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The student, its teachers, the text and the training."""

    student: str = field(REQUIRED, "Model that learns.")
    reading: distillation.Reading = nested(
        without=("terms", "fit_to", "batch_size", "dtype", "layout"),
        rename={"teachers": "teacher", "top_k": "cache_top_k"},
    )
    teacher_weight: tuple[float, ...] = field((), "Weight of each teacher. Equal by default.")
    loss: tuple[str, ...] = field(
        ("sft:0.5", "kl:0.5"),
        "Loss with its options and weight, such as kl(temperature=2):0.5, or a term of your own, "
        "package.module:Name:0.5.",
        listing=distillation.terms.TERMS.help,
    )
    on_policy: distillation.on_policy.OnPolicy = nested(
        distillation.on_policy.OnPolicy(), rename={"share": "on_policy"}
    )
    draft_head: bool = field(False, "Train a draft head for the student, and not the student.")
    drafting: distillation.DraftTraining = nested(
        distillation.DraftTraining(),
        rename={name: f"draft_{name}" for name in ("vocab", "rank", "ahead", "decay", "loss")}
        | {"rows": "draft_rows", "prompt": "draft_prompt"},
    )
    pruning: distillation.Pruning = distillation.Pruning()  # noqa: RUF009
    lora_rank: int = field(
        0, "Rank of LoRA adapters to train instead of the weights. 0 trains the weights."
    )
    freeze: str | None = field(
        None,
        "Regular expression for the paths of parameters to freeze. `below` freezes the embedding "
        "and the layers below the dropped ones.",
    )
    student_head: str | None = field(
        None, "Folder of a `logitjax audit` run whose recovered head the student gets."
    )
    course: distillation.Course = nested(
        distillation.Course(loop=training.LoopOptions(checkpoint_every=50, eval_every=50)),
        without=("learning_rate", "eval_batch", "progress"),
    )
    learning_rate: float | None = field(
        None,
        "Peak learning rate. By default 3e-4 for pruned models and adapters, and 5e-5 for whole "
        "models, which a higher rate would damage.",
    )
    dtype: Literal["float32", "bfloat16"] = field("float32", "Compute type.")
    layout: Literal["stacked", "listed"] = field(
        "listed",
        "Whether layers are scanned (stacked: compiles faster) or unrolled (listed: runs faster on "
        "CPUs).",
    )
    remat: Literal["none", "dots", "full"] = field(
        "none", "How much the backward pass recomputes to save memory.", execution=True
    )
    mesh: str = field(
        "data:-1,fsdp:1,tensor:1", "Axes and sizes of the device mesh.", execution=True
    )
    push_to_hub: str | None = field(None, hub.PUSH, execution=True)

    def __post_init__(self) -> None:
        drops = self.pruning.drop_layers or self.pruning.drop_share
        if self.freeze == "below" and (not drops or self.layout != "listed"):
            raise ValueError("freeze: expected drop_layers and listed layers with below")
        if self.draft_head and (drops or self.reading.teachers or self.layout != "listed"):
            raise ValueError("draft_head: expected listed layers, no teacher and no pruning")
        named = self.reading.teachers
        if self.on_policy.share:
            if self.reading.teacher_reads != "live":
                raise ValueError(
                    "on_policy: expected --teacher_reads=live, because a cache cannot contain the "
                    "student's samples"
                )
            self.on_policy.rows(self.course.batch_size)
            self.on_policy.lengths(self.reading.seq_len)
        if self.teacher_weight and len(self.teacher_weight) != len(named):
            raise ValueError(
                f"teacher_weight: expected {len(named)}, one per teacher, got "
                f"{len(self.teacher_weight)}"
            )

    @property
    def peak(self) -> float:
        """The learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.draft_head:
            return 1e-3
        # Pruned layers and fresh adapters have far to go; a whole model is close to its goal.
        return 3e-4 if self.pruning.prunes or self.lora_rank else 5e-5

    @property
    def teachers(self) -> tuple[str, ...]:
        """The named teachers, or else the model that the student is pruned from."""
        # A pruned model recovers best from the model that it was pruned from.
        return self.reading.teachers or ((self.student,) if self.pruning.prunes else ())


def run(config: Config, out: epath.Path) -> None:
    """Prune, let the teachers read, train, and write the model and the report."""
    objective, course, reading = objective_of(config), course_of(config), reading_of(config)
    if config.on_policy.share and objective.taught is None:
        raise ValueError("on_policy: expected a loss with a teacher, got losses of text alone")
    basis = _recovered(config.student_head) if config.student_head else None
    mesh = training.make_mesh(config.mesh)
    course.check(mesh)
    check_length(config.student, config.reading.seq_len)
    _check_pruning(config, models.load_config(config.student))
    tokenizer = models.load_tokenizer(config.student)
    reading.check(tokenizer, [objective])
    packed = reading.pack(tokenizer, out / "data")
    for name in data.SPLITS[1:]:
        if (rows := len(packed.splits[name])) < course.eval_rows:
            logging.warning("%s has %d rows, eval_rows asks for %d", name, rows, course.eval_rows)
    full, _ = models.load(
        config.student, mesh=mesh, dtype=config.dtype, layout=config.layout, remat=config.remat
    )
    _check_weights(config, full, out)
    if config.draft_head:
        text = draft_head.train(config, course, (full, tokenizer), packed, mesh=mesh, out=out)
        storage.write_atomic(out / "report.md", text)
        print(text)
        return
    if config.pruning.prunes:
        storage.progress.mark("pruning the student", log=True)
    model, note, freeze = _pruned(config, full, packed, out)
    # Before teachers read for hours, so that errors in it are reported at once.
    models.config_to_hf(model.config)
    student = distillation.Student.of(
        model,
        freeze=freeze,
        lora_rank=config.lora_rank,
        head_basis=basis,
        objective=objective,
        seed=config.course.seed,
    )
    # Its arrays now belong to the student.
    del model
    corpus = reading.load(
        packed,
        course.visited_rows(packed, seeds=None if objective.taught else ()),
        out / "teachers",
        {config.student: (full, tokenizer)} if jax.process_count() == 1 else None,
    )
    scored = [_whole_row(config, full, corpus, course, mesh, out)] if config.pruning.prunes else []
    # Freed, unless a live teacher uses it.
    del full
    if jax.process_index() == 0 and (table := corpus.tokenizer_table()):
        storage.write_atomic(out / "tokenizers.md", markdown_table(table) + "\n")
        print(markdown_table(table))
    result = distillation.distill(
        student, corpus, objective, course, mesh=mesh, workdir=out, on_policy=config.on_policy
    )
    storage.progress.mark(f"writing {out / 'model'}", log=True)
    models.save_pretrained(result.model, tokenizer, out / "model")
    scores = {"before": result.before, "after": result.after}
    for when, values in scores.items():
        scored.append(_row(f"student {when}", {**values, "parameters": student.size}))
    if jax.process_index() == 0:
        _plot(result.trained, out / "curves.png")
        storage.write_atomic(out / "scores.json", json.dumps(scores, indent=1) + "\n")
        text = _report(config, packed, scored, result, note)
        storage.write_atomic(out / "report.md", text)
        storage.write_atomic(out / "model" / "README.md", _card(config, text))
        print(text)
    if config.push_to_hub:
        hub.push(out / "model", config.push_to_hub)


def _card(config: Config, report: str) -> str:
    heading, _, scores = report.partition("\n")
    # Pictures, and the line about this folder, mean nothing on the hub.
    scores = "\n\n".join(
        part for part in scores.split("\n\n") if not part.startswith(("![", "`model/`"))
    )
    return hub.model_card(
        title=heading.removeprefix("# ").replace("`", ""),
        made_from=list(dict.fromkeys((config.student, *config.teachers))),
        tags=["distillation", *(["pruning"] if config.pruning.prunes else [])],
        report=scores,
        settings=flatten(config),
    )


def student_shape(config: Config) -> models.DecoderConfig:
    """The shape of the student after pruning."""
    shape = models.load_config(config.student)
    dropped = config.pruning.dropped(shape.num_layers)
    kept = len(config.pruning.keep_layers) or shape.num_layers - dropped
    return shortened(shape, max(kept, 1))


def course_of(config: Config) -> distillation.Course:
    """The course with the learning rate for the weights that are trained."""
    return dataclasses.replace(config.course, learning_rate=config.peak)


def reading_of(config: Config) -> distillation.Reading:
    """Settings for the teachers' reading, with the sizes of the course."""
    return dataclasses.replace(
        config.reading,
        teachers=config.teachers,
        batch_size=config.course.batch_size,
        dtype=config.dtype,
        layout=config.layout,
        terms=tuple(term for term, _ in objective_of(config).terms),
    )


def objective_of(config: Config) -> distillation.Objective:
    """The losses and the weights of the teachers."""
    return distillation.Objective(
        # A draft head has a loss of its own.
        terms=distillation.parse_terms(("sft:1",) if config.draft_head else config.loss),
        teachers=config.teacher_weight or (1.0,) * len(config.teachers),
    )


def _check_weights(config: Config, whole: models.Decoder, out: epath.Path) -> None:
    """Refuse a folder that was begun with other weights of the student."""
    # A name may point to other weights by now.
    weights = distillation.Student.of(whole).fingerprint
    record = processes.kept(out / "student.json", lambda: {"weights": weights})
    if record["weights"] != weights:
        raise ValueError(
            f"student: expected the weights that {out} was started with, got others in "
            f"{config.student!r}; name a new --out"
        )


def _check_pruning(config: Config, shape: models.DecoderConfig) -> None:
    layers, heads = shape.num_layers, shape.num_kv_heads
    drop = config.pruning.dropped(layers)
    if drop >= layers:
        raise ValueError(
            f"drop_layers: expected fewer than the {layers} layers of {config.student!r}, got "
            f"{drop}"
        )
    if any(not 0 <= i < layers for i in config.pruning.keep_layers):
        raise ValueError(
            f"keep_layers: expected layers 0 to {layers - 1} of {config.student!r}, got "
            f"{list(config.pruning.keep_layers)}"
        )
    if not shape.traits.free_head_dim and 0 < config.pruning.kv_heads < heads:
        # The only way to prune whose result could not be written at the end.
        raise ValueError(
            f"kv_heads: expected {heads} for {shape.family}, whose Hugging Face format has no head "
            f"width, got {config.pruning.kv_heads}"
        )


def _pruned(
    config: Config, full: models.Decoder, packed: data.PackedSplits, out: epath.Path
) -> tuple[models.Decoder, str, str | None]:
    """The initial student, a description of the pruning, and the pattern of frozen paths."""
    layers, notes = full.config.num_layers, []
    drop = config.pruning.dropped(layers)
    split = packed.splits["train"]
    count = min(config.pruning.calibration_rows, len(split))

    def calibration() -> list[Mapping[str, Any]]:
        size = config.course.batch_size
        # Only full batches, unless there is none: another shape would compile again.
        starts = range(0, count - count % size or count, size)
        return [split.rows(range(i, min(i + size, count)))[packed.names["pivot"]] for i in starts]

    kept, freeze = config.pruning.keep_layers, config.freeze
    if drop:

        def prune() -> dict[str, Any]:
            return dataclasses.asdict(distillation.prune_layers(full, calibration(), drop))

        record = processes.kept(out / "pruning.json", prune)
        chosen = distillation.LayerPruning(**{n: tuple(v) for n, v in record.items()})
        kept, freeze = chosen.kept, chosen.below if freeze == "below" else freeze
    model = models.keep_layers(full, kept) if kept else full
    if kept:
        dropped = sorted(set(range(layers)) - set(kept))
        logging.info("student without layers %s", dropped)
        layers_gone = ", ".join(map(str, dropped))
        notes.append(f"without layer{'s' if len(dropped) > 1 else ''} {layers_gone}")
    if config.pruning.kv_heads or config.pruning.mlp_channels:
        model = distillation.prune_width(
            model,
            calibration(),
            kv_heads=config.pruning.kv_heads or None,
            mlp_channels=config.pruning.mlp_channels or None,
        )
        heads, inner = model.config.num_heads, model.config.intermediate_size
        notes.append(f"with {heads} heads and {inner} channels a layer")
    return model, ", ".join(notes), freeze


def _recovered(spec: str) -> np.ndarray:
    """The columns of a head that an audit recovered."""
    path = epath.Path(spec)
    if path.is_dir():
        folder = path / "recovered" if (path / "recovered").exists() else path
        # An audit of several policies leaves one file for each, so the file must be named.
        files = sorted(folder.glob("*.npz"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise ValueError(f"student_head: expected one .npz file in {folder}, got {names}")
        path = files[0]
    if not path.exists():
        raise ValueError(f"student_head: no such file or directory: {path}")
    arrays = storage.weights.read_npz(path)
    if "basis" not in arrays:
        raise ValueError(f"student_head: {path} holds no basis of a head: the audit found none")
    basis, tokens = arrays["basis"], arrays["tokens"]
    # A corner covers only some tokens; the student needs a row for each.
    if not np.array_equal(tokens, np.arange(len(basis))):
        raise ValueError(
            f"student_head: {path} holds rows of {len(tokens)} tokens only, expected all of them"
        )
    return basis


def _whole_row(
    config: Config,
    full: models.Decoder,
    corpus: distillation.Corpus,
    course: distillation.Course,
    mesh: jax.sharding.Mesh,
    out: epath.Path,
) -> dict[str, Any]:
    """Scores of the model that the student is pruned from, kept on disk."""

    def score() -> dict[str, Any]:
        storage.progress.mark("scoring the whole model", log=True)
        student = distillation.Student.of(full)
        scorer = distillation.Scorer(student, corpus, course, mesh=mesh)
        return {**scorer.scores(student.trained, "test"), "parameters": student.size}

    return _row(f"{config.student}, whole", processes.kept(out / "whole.json", score))


def _row(name: str, scores: Mapping[str, float]) -> dict[str, Any]:
    def percent(key: str) -> float | None:
        return 100 * scores[key] if key in scores else None

    return {
        "model": name,
        "perplexity": scores["perplexity"],
        "bits a byte": scores["bits_per_byte"],
        "accuracy %": percent("accuracy"),
        "agreement %": percent("agreement"),
        "KL to the teacher": scores.get("teacher_kl"),
        "parameters": f"{int(scores['parameters']):,}",
        "tokens/s": f"{speed:,.0f}" if (speed := scores.get("tokens_per_second")) else None,
    }


def _report(
    config: Config,
    packed: data.PackedSplits,
    rows: list[dict[str, Any]],
    distilled: distillation.Distilled,
    note: str,
) -> str:
    reading, course = config.reading, config.course
    counted = ("too_long", "unlearnt")
    skipped, unlearnt = (
        sum(rows.statistics.get(name, 0) for rows in packed.splits.values()) for name in counted
    )
    long = (
        f" {skipped} conversations exceed {reading.seq_len} tokens and were left out."
        if skipped
        else ""
    )
    long += f" {unlearnt} pieces contain nothing to learn and were left out." if unlearnt else ""
    share = config.on_policy.share
    written = f", with {share:.0%} of the rows written by the student" if share else ""
    teachers = ", ".join(f"`{spec}`" for spec in config.teachers) or "no teacher"
    sizes = ", ".join(f"{len(packed.splits[name]):,}" for name in data.SPLITS)
    names = ("prompt", "before", "after")
    samples = [{"": n, "text": text_cell(distilled.samples[n])} for n in names]
    return (
        f"# `{config.student}`{' ' + note if note else ''}, distilled\n\n"
        f"{' + '.join(config.loss)} with {teachers} on `{reading.data}`: {course.steps} steps of "
        f"{course.batch_size} x {reading.seq_len} tokens{written}, learning rate {config.peak:g}, "
        f"{distilled.trained.tokens_per_second:,.0f} trained tokens per second.{long}\n\n"
        f"{markdown_table(rows)}\n\n"
        f"The text has {sizes} rows to train, validate and test on. Scores are "
        f"computed on {min(course.eval_rows, len(packed.splits['test']))} test rows. Agreement is "
        "the share of positions at which model and teacher rank the same token highest. KL is "
        f"computed over the teacher's top {reading.top_k} tokens, with all others as one. tokens/s "
        "is the speed of reading text, not of generating it.\n\n"
        "![validation perplexity and loss](curves.png)\n\n"
        f"{markdown_table(samples)}\n\n"
        "`model/` has the model as a Hugging Face directory.\n"
    )


def _plot(trained: distillation.Trained, path: epath.Path) -> None:
    try:
        storage.require("matplotlib", extra="plots")
    except ImportError as error:
        logging.warning("no picture of the curves: %s", error)
        return
    # Without pyplot, which sets a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), dpi=150, layout="constrained")
    above, below = figure.subplots(2)
    for name, points in trained.parts.items():
        above.plot(*zip(*points), label=name)
    above.set(xlabel="step", ylabel="loss in training, nats", yscale="log")
    above.legend()
    if trained.curve:
        below.plot(*zip(*trained.curve))
    below.set(xlabel="step", ylabel="perplexity of a token")
    storage.write_atomic(path, figure.savefig)

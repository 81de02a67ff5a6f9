"""Pruning, training and scoring the arms of graph fusion; each run can be resumed."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh

from experiments.graph_fusion import arms, topics
from experiments.graph_fusion.config import CROSS, Config
from experiments.shared.records import Record, kept, remove_directory
from logitjax import data, distillation, models, training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """Values that all arms share.

    Attributes:
        whole: The model that students are cut from.
        corpus: Text, and the sources' predictions on it.
    """

    config: Config
    workdir: epath.Path
    mesh: Mesh
    whole: models.Decoder
    corpus: distillation.Corpus


def course(config: Config, settings: arms.Settings, seed: int) -> distillation.Course:
    """Length and learning rate of a run's training."""
    return dataclasses.replace(config.course, learning_rate=settings.learning_rate, seed=seed)


def make_reading(config: Config) -> distillation.Reading:
    """Describe the sources' input, and how much of their output is kept."""
    objectives = [arms.first_settings(config, arm).objective(config) for arm in config.loss]
    terms = dict.fromkeys(term for objective in objectives for term, _ in objective.terms)
    if set(config.loss) & set(CROSS):
        # A run with one arm leaves caches that another arm of the same folder can use.
        terms[distillation.terms.ALM()] = None
    return dataclasses.replace(
        config.reading,
        teachers=config.sources,
        batch_size=config.course.eval_batch,
        dtype=config.dtype,
        layout=config.layout,
        terms=tuple(terms),
    )


def decoder_options(config: Config) -> dict[str, Any]:
    """Settings of the student's computation."""
    return dict(dtype=config.dtype, layout=config.layout, remat=config.remat)


def open_session(config: Config, workdir: epath.Path) -> Session:
    """Loads the whole student, packs the text and lets the sources read it."""
    mesh, reading = training.make_mesh(config.mesh), make_reading(config)
    tokenizer = models.load_tokenizer(config.student)
    objectives = [arms.first_settings(config, arm).objective(config) for arm in config.loss]
    reading.check(tokenizer, objectives)
    packed = reading.pack(tokenizer, workdir / "data")
    whole, _ = models.load(config.student, mesh=mesh, **decoder_options(config))
    if config.freeze:  # Errors in it should appear before sources read for hours.
        distillation.Student.of(whole, freeze=config.freeze)
    taught = any(objective.taught for objective in objectives)
    units = np.arange(config.unit_rows)
    rows = config.course.visited_rows(
        packed,
        seeds=range(config.seeds) if taught else (),
        splits=data.SPLITS[1:] if config.chooses or config.course.loop.eval_every else ("test",),
    )
    rows["test"] = np.union1d(rows["test"], units)
    existing = {config.student: (whole, tokenizer)} if jax.process_count() == 1 else None
    corpus = reading.load(packed, rows, workdir / "sources", existing)
    return Session(config=config, workdir=workdir, mesh=mesh, whole=whole, corpus=corpus)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruned:
    """The student without some layers, before it is healed.

    Attributes:
        layers: Number of removed layers.
        dropped: Their indices.
        freeze: Regular expression of the frozen parameters.
        model: The remaining model.
    """

    session: Session
    layers: int
    dropped: tuple[int, ...] = ()
    freeze: str | None = None
    model: models.Decoder

    @functools.cached_property
    def student(self) -> distillation.Student:
        """Return the student's trained parameters."""
        return distillation.Student.of(self.model, freeze=self.freeze)

    @functools.cached_property
    def scorer(self) -> distillation.Scorer:
        """Held-out scores, with one program for all arms."""
        session = self.session
        about = course(session.config, arms.first_settings(session.config, "sft"), 0)
        return distillation.Scorer(self.student, session.corpus, about, mesh=session.mesh)

    @functools.cached_property
    def _step(self) -> training.EvalStep:
        return training.EvalStep(self.student.score, mesh=self.session.mesh)

    def by_row(self, params: Any) -> Record:
        """Scores of all test rows together, and the bits and bytes of every row."""
        corpus, mesh, count = self.session.corpus, self.session.mesh, self.session.config.unit_rows
        frozen = models.DECODER_RULES.place(self.student.frozen, mesh)
        batches = corpus.scored("test", mesh, batch_size=1, rows=count)
        rows = [jax.device_get(self._step(params, batch, frozen)) for batch in batches]
        pairs = {name: np.array([row[name] for row in rows], np.float64).T for name in rows[0]}
        means = {name: total.sum() / size.sum() for name, (total, size) in pairs.items()}
        bits, size = pairs["bits_per_byte"].tolist()
        return means | {"perplexity": np.exp(means["loss"]), "bits": bits, "bytes": size}

    def even(self, settings: arms.Settings) -> float:
        """The weight of a graph loss at which its gradient is as large as that of SFT.

        At the last hidden states, before training, over eight batches.
        """
        if "gld" not in settings.arm or "%" not in settings.gld:
            return 1.0
        session, student = self.session, self.student
        split = session.corpus.packed.splits["train"]
        *_, (graph, _) = settings.objective(session.config).terms
        sides = [
            distillation.Objective(terms=((t, 1.0),)) for t in (distillation.terms.SFT(), graph)
        ]

        def make() -> list[list[float]]:
            @jax.jit
            def norms(trained: Any, batch: Any) -> Any:
                model, columns = student.model(trained), batch["pivot"]
                hidden, labels = (
                    distillation.hidden_states(model, columns),
                    columns["tokens"][:, 1:],
                )

                def loss(hidden: Any, objective: distillation.Objective) -> Any:
                    teachers = list(batch["sources"].values()) if objective.taught else []
                    where = columns["loss_mask"][:, 1:]
                    total, count, _ = objective.value(
                        hidden, model.head_of(), {"labels": labels}, teachers, where=where
                    )
                    return total / count

                return [jnp.linalg.norm(jax.grad(loss)(hidden, side)) for side in sides]

            # The rows of the first steps: teachers may have read no others.
            course = session.config.course
            rows = (
                split.batch(step, seed=0, batch_size=course.batch_size)
                for step in range(min(8, course.steps))
            )
            batches = (session.corpus.batch("train", one, taught=True) for one in rows)
            return [[float(x) for x in norms(student.trained, batch)] for batch in batches]

        kind = "-".join((settings.arm.rpartition("+")[2], settings.gld.partition(":")[0]))
        result = kept(self.directory / f"gradients-{kind.replace('/', '-')}.json", make)
        sft, graphs = np.mean(result, 0)
        return float((1 - settings.mix) / settings.mix * sft / graphs)

    @functools.cached_property
    def topics(self) -> topics.Topics | None:
        """Articles whose topic the student has to name."""
        config, packed = self.session.config, self.session.corpus.packed
        if not config.topic_rows:
            return None
        tokenizer = packed.tokenizers[packed.names["pivot"]]
        return topics.Topics.load(config.reading.data, tokenizer, self.student, config.topic_rows)

    @property
    def directory(self) -> epath.Path:
        return self.session.workdir / f"drop-{self.layers}"


def prune(session: Session, layers: int) -> Pruned:
    """Chooses the layers to remove, on training text; the choice is kept on disk."""
    config, packed = session.config, session.corpus.packed
    if not layers:
        return Pruned(session=session, layers=0, freeze=config.freeze, model=session.whole)
    split = packed.splits["train"]
    count = min(config.pruning.calibration_rows, len(split))
    size = min(config.course.eval_batch, count)

    def make() -> Record:
        starts = range(0, count - count % size, size)
        batches = [split.rows(np.arange(i, i + size))[packed.names["pivot"]] for i in starts]
        return dataclasses.asdict(distillation.prune_layers(session.whole, batches, layers))

    record = kept(session.workdir / f"drop-{layers}" / "pruning.json", make)
    chosen = distillation.LayerPruning(**{name: tuple(value) for name, value in record.items()})
    logging.info("without layers %s", sorted(chosen.dropped))
    frozen = [config.freeze, chosen.below if config.freeze_below else None]
    return Pruned(
        session=session,
        layers=layers,
        dropped=tuple(sorted(chosen.dropped)),
        freeze="|".join(filter(None, frozen)) or None,
        model=models.keep_layers(session.whole, chosen.kept),
    )


def run_all(config: Config, workdir: epath.Path) -> Record:
    """Every number of layers, every arm at its best settings, every seed.

    Returns:
        `whole`, the scores of the whole model; `drops`, one record a number of layers: `before`,
        `dropped`, and under `arms` the runs and the trials of each arm.
    """
    session = open_session(config, workdir)
    results: Record = {"whole": _score_whole(session), "drops": []}
    chosen: dict[str, arms.Settings] = {}
    first = 1 if config.unit_rows else 0
    for number, layers in enumerate(config.drop_layers):
        pruned = prune(session, layers)
        record: Record = {"layers": layers, "dropped": pruned.dropped, "arms": {}}
        record["before"] = kept(
            pruned.directory / "before.json",
            lambda pruned=pruned: (
                _scores(pruned.scorer, pruned.student.trained, session.mesh)
                | {"parameters": pruned.student.size}
                | _topics(pruned, pruned.student.trained)
            ),
        )
        for arm in config.loss if number == 0 else config.drop_arm or config.loss:
            trials: list[Any] = []
            if arm not in chosen:
                chosen[arm] = arms.first_settings(config, arm)
                if config.chooses:
                    validate = functools.partial(_validate, pruned)
                    chosen[arm], trials = arms.choose(config, arm, validate)
                    logging.info("%s: best of %d: %s", arm, len(trials), chosen[arm].name)
            runs = [run_arm(pruned, chosen[arm], seed=seed) for seed in range(first, config.seeds)]
            record["arms"][arm] = {
                "runs": runs,
                "trials": len(trials),
                "at_edge": bool(trials) and arms.at_edge(chosen[arm], trials),
                "tried": [(settings.name, loss) for settings, loss in trials],
            }
        results["drops"].append(record)
    return results


def _score_whole(session: Session) -> Record | None:
    """Scores of the model that students are cut from; none if nothing is cut."""
    if not any(session.config.drop_layers):
        return None

    def make() -> Record:
        pruned = Pruned(session=session, layers=0, model=session.whole)
        student = pruned.student
        scores = _scores(pruned.scorer, student.trained, session.mesh)
        return scores | {"parameters": pruned.student.size} | _topics(pruned, student.trained)

    return kept(session.workdir / "whole.json", make)


def _topics(pruned: Pruned, params: Any) -> Record:
    return {} if pruned.topics is None else {"topics": pruned.topics.accuracy(params)}


def _scores(scorer: distillation.Scorer, trained: Any, mesh: Mesh) -> Record:
    params = models.DECODER_RULES.place(trained, mesh)
    prompt, text = scorer.sample(params)
    scores = scorer.scores(params, "test")
    return scores | {"prompt": prompt, "sample": text}


def _validate(pruned: Pruned, settings: arms.Settings) -> float:
    return run_arm(pruned, settings, seed=0, validate=True)["validation_loss"]


def run_arm(
    pruned: Pruned, settings: arms.Settings, *, seed: int, validate: bool = False
) -> Record:
    """One run of one arm: trained, scored, kept as `outcome.json`."""
    session, name = pruned.session, f"{settings.name}/seed-{seed}"
    directory = pruned.directory / name
    student, scorer = pruned.student, pruned.scorer

    @functools.cache
    def trained() -> distillation.Trained:
        logging.info("drop %d, arm %s", pruned.layers, name)
        return distillation.train_student(
            student,
            session.corpus,
            settings.objective(session.config, even=pruned.even(settings)),
            course(session.config, settings, seed),
            mesh=session.mesh,
            directory=directory,
            scorer=scorer,
        )

    def make() -> Record:
        result = trained()
        by_row = session.config.unit_rows > 0
        text, scores = "", {}
        if not by_row:
            scores = scorer.scores(result.params, "test")
            _, text = scorer.sample(result.params)
        elif not validate:
            scores = pruned.by_row(result.params)
        if validate:
            scores["validation_loss"] = scorer.scores(result.params, "validation")["loss"]
        seen = [points[-1][1] for points in result.seen.values() if points]
        if seen:
            scores["seen"] = max(seen)
        return scores | {
            **dataclasses.asdict(settings),
            "seed": seed,
            "even": pruned.even(settings),
            "trained_tokens_per_second": result.tokens_per_second,
            "curve": result.parts.get("sft", ()),
            "sample": text,
            "parameters": student.size,
        }

    record = kept(directory / "outcome.json", make)
    if pruned.topics is not None and not validate:
        # Trials skip the topics; the one that became the first run is trained again for them.
        record |= kept(directory / "topics.json", lambda: _topics(pruned, trained().params))
    # A finished run needs no checkpoint, and those of many trials would fill a disk.
    remove_directory(directory / "checkpoints")
    return record

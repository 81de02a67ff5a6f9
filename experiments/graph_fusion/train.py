"""Training and scoring the arms of graph fusion, each in a folder of its own that it can resume."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optax
from absl import logging
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from experiments.graph_fusion.config import Config
from experiments.graph_fusion.data import Corpus, load_corpus, source_names
from logitjax import decoding, models, processes, training
from logitjax.distillation import objectives


@dataclasses.dataclass(frozen=True)
class Settings:
    """What distinguishes the runs of one arm before seeds come in."""

    loss: str
    learning_rate: float
    gld: str

    @property
    def name(self) -> str:
        """A folder: the arm, its graph loss if it has one, its learning rate."""
        kind = self.gld.replace("/", "-").replace(":", "-x") if "gld" in self.loss else ""
        return "/".join(part for part in (self.loss, kind, f"lr-{self.learning_rate:g}") if part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run of one arm reached; `curve` holds (step, validation perplexity)."""

    loss: str
    learning_rate: float
    gld: str | None
    seed: int
    validation_perplexity: float
    perplexity: float
    agreement: float | None
    accuracy: float
    seconds_per_step: float
    tokens: int
    curve: tuple[tuple[int, float], ...]
    sample: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """What all arms share: the pivot as it was loaded, its tokenizer, rows, mesh, folder."""

    config: Config
    workdir: epath.Path
    mesh: Mesh
    graphdef: Any
    params: Any
    tokenizer: models.Tokenizer
    corpus: Corpus

    @functools.cached_property
    def _score(self) -> Any:
        return training.make_eval_step(objectives.score_function(self.graphdef), mesh=self.mesh)

    def scores(self, params: Any, split: str) -> dict[str, float]:
        """Perplexity, accuracy and, where the first source reads the same tokens, agreement."""
        batches = self.corpus.scored(split, self.config, self.mesh)
        means = training.evaluate(self._score, params, batches)
        return means | {"perplexity": float(np.exp(means["loss"]))}

    def sample(self, params: Any, *, length: int = 32) -> str:
        """What the pivot writes after the prompt, most likely token first."""
        model = nnx.merge(self.graphdef, objectives.pivot_of(params))
        end = self.tokenizer.eos_id
        out = decoding.generate(
            models.with_layout(model, "listed"),
            self.tokenizer.encode(self.config.prompt),
            max_new_tokens=length,
            stop_ids=() if end is None else (end,),
        )
        return self.config.prompt + self.tokenizer.decode(out.rows()[0])


def open_session(config: Config, workdir: epath.Path) -> Session:
    """Loads the pivot, packs the text and lets the sources read."""
    if config.source_weight and len(config.source_weight) != len(config.source):
        raise ValueError(
            f"source_weight: {len(config.source_weight)} weights for {len(config.source)} sources"
        )
    mesh = training.make_mesh(config.mesh)
    pivot, tokenizer = models.load(
        config.pivot, mesh=mesh, dtype=config.dtype, layout=config.layout, remat=config.remat
    )
    if config.pivot_layers:
        pivot = models.keep_layers(pivot, config.pivot_layers)
    apply_fn, params = models.from_nnx(pivot)
    return Session(
        config=config,
        workdir=workdir,
        mesh=mesh,
        graphdef=apply_fn.graphdef,
        params=params,
        tokenizer=tokenizer,
        corpus=load_corpus(config, tokenizer, workdir),
    )


def run_arms(config: Config, workdir: epath.Path) -> dict[str, Any]:
    """Every arm at its best settings with every seed; the untrained pivot for comparison."""
    for gld in config.gld:
        objectives.parse_gld(gld, k=config.top_k)
    session = open_session(config, workdir)
    before = _score_untrained(session)
    outcomes: list[Outcome] = []
    for loss in config.loss:
        variants = config.gld if "gld" in loss else config.gld[:1]
        tried = [Settings(loss, rate, gld) for rate in config.learning_rate for gld in variants]
        first = [_run_arm(session, settings, seed=0) for settings in tried]
        best = min(range(len(tried)), key=lambda i: first[i].validation_perplexity)
        if len(tried) > 1:
            logging.info("%s: best on validation of %d: %s", loss, len(tried), tried[best].name)
        outcomes.append(first[best])
        outcomes += [_run_arm(session, tried[best], seed=seed) for seed in range(1, config.seeds)]
    return {"before": before, "outcomes": outcomes}


def _score_untrained(session: Session) -> dict[str, Any]:
    path = session.workdir / "before.json"
    if processes.broadcast_from_first(path.exists):
        return json.loads(path.read_text())
    params = session.params
    scores = session.scores(params, "test")
    record = {**scores, "sample": session.sample(params)}
    processes.write_json(path, record)
    return record


def make_step(
    config: Config, graphdef: Any, mesh: Mesh, settings: Settings
) -> tuple[optax.GradientTransformation, training.TrainStep]:
    """An arm's optimizer and its compiled update."""
    graph, weight = objectives.parse_gld(settings.gld, k=config.top_k)
    objective = objectives.Objective(
        loss=settings.loss,
        weights=config.source_weight or (1.0,) * len(config.source),
        mix=config.mix,
        gld_weight=weight,
        graph=graph,
    )
    schedule = training.Schedule(
        settings.learning_rate, warmup=int(config.warmup * config.steps), total_steps=config.steps
    )
    tx = training.make_optimizer(schedule, weight_decay=config.weight_decay)
    step = training.make_train_step(
        objectives.loss_function(objective, graphdef, source_names(config)),
        tx,
        mesh=mesh,
        accumulate=config.accumulate,
        schedule=schedule,
    )
    return tx, step


def trained_parameters(loss: str, graphdef: Any, params: Any) -> Any:
    """What an arm trains: the pivot, beside which the dual arm has a second head."""
    return objectives.with_auxiliary_head(graphdef, params) if loss == objectives.DUAL else params


def _run_arm(session: Session, settings: Settings, *, seed: int) -> Outcome:
    config, loss, mesh = session.config, settings.loss, session.mesh
    name = f"{settings.name}/seed-{seed}"
    directory = session.workdir / "arms" / name
    done = directory / "outcome.json"
    if processes.broadcast_from_first(done.exists):
        record = json.loads(done.read_text())
        record["curve"] = tuple(tuple(point) for point in record["curve"])
        return Outcome(**record)
    logging.info("arm %s", name)
    tx, step = make_step(config, session.graphdef, mesh, settings)
    start = training.create_train_state(
        trained_parameters(loss, session.graphdef, session.params),
        tx,
        mesh=mesh,
        rules=models.DECODER_RULES,
        seed=seed,
    )
    train = session.corpus.packed.splits["train"]
    index, count = training.process_slice(mesh)

    def batch(number: int) -> dict[str, Any]:
        rows = train.batch(
            number,
            seed=seed,
            batch_size=config.batch_size,
            process_index=index,
            process_count=count,
        )
        return session.corpus.batch("train", rows, distil=loss != "sft")

    with training.Checkpointer(directory / "checkpoints", max_to_keep=2) as checkpointer:
        state = training.train_loop(
            start,
            step,
            batch,
            total_steps=config.steps,
            workdir=directory,
            checkpointer=checkpointer,
            eval_fn=lambda state, _: session.scores(state.params, "validation"),
            writer=training.make_writer(directory, tensorboard=config.tensorboard),
            identity={"data": train.fingerprint, "arm": name},
            options=training.LoopOptions(
                checkpoint_every=config.checkpoint_every,
                log_every=config.log_every,
                eval_every=config.eval_every,
                profile_steps=config.profile_steps,
            ),
        )
    lines = _metrics(directory)
    curve = tuple(
        (int(line["step"]), line["eval/perplexity"]) for line in lines if "eval/perplexity" in line
    )
    # The first interval holds the compilation.
    speeds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line]
    test = session.scores(state.params, "test")
    outcome = Outcome(
        loss=loss,
        learning_rate=settings.learning_rate,
        gld=settings.gld if "gld" in loss else None,
        seed=seed,
        validation_perplexity=curve[-1][1],
        perplexity=test["perplexity"],
        agreement=test.get("agreement"),
        accuracy=test["accuracy"],
        seconds_per_step=statistics.median(speeds[1:] or speeds),
        tokens=config.steps * config.batch_size * config.seq_len,
        curve=curve,
        sample=session.sample(state.params),
    )
    processes.write_json(done, dataclasses.asdict(outcome))
    return outcome


def _metrics(directory: epath.Path) -> Sequence[Mapping[str, float]]:
    text = (directory / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

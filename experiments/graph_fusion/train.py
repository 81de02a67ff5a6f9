"""Training and scoring the arms of graph fusion, each in a folder of its own that it can resume."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from logitjax import decoding, losses, models, processes, training
from logitjax.distillation import objectives
from logitjax.distillation import sources as distillation_sources


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
    """What one run of one arm reached; ``curve`` holds (step, validation perplexity)."""

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


@dataclasses.dataclass(frozen=True)
class Session:
    """What all arms share: models, rows, statistics of the sources, mesh."""

    config: Any
    workdir: epath.Path
    mesh: Any
    pivot: models.Decoder
    tokenizer: models.Tokenizer
    packed: distillation_sources.Packed
    sources: Mapping[str, "distillation_sources.Source"]

    @functools.cached_property
    def functional(self) -> tuple[Any, Any]:
        """The pivot as (graphdef, parameters before training)."""
        apply_fn, params = models.from_nnx(self.pivot)
        return apply_fn.graphdef, params

    @functools.cached_property
    def _score(self) -> Any:
        return training.make_eval_step(
            objectives.score_function(self.functional[0]), mesh=self.mesh
        )

    def scores(self, params: Any, split: str) -> dict[str, float]:
        """Perplexity, accuracy and, where the first source reads the same tokens, agreement."""
        found = training.evaluate(self._score, params, self.scored_batches(split))
        return found | {"perplexity": float(np.exp(found["loss"]))}

    def sample(self, params: Any, *, length: int = 32) -> str:
        """What the pivot writes after the prompt, most likely token first."""
        model = models.with_layout(
            nnx.merge(self.functional[0], objectives.pivot_of(params)), "listed"
        )
        prompt = self.tokenizer.encode(self.config.prompt)
        tokens = decoding.greedy_generate(
            model, prompt, max_new_tokens=length, eos_id=self.tokenizer.eos_id
        )
        return self.config.prompt + self.tokenizer.decode(np.asarray(tokens)[0].tolist())

    def batch(self, split: str, rows: Mapping[str, Any], *, sources: bool) -> dict[str, Any]:
        batch: dict[str, Any] = {"pivot": dict(self.packed.columns(rows, "pivot"))}
        if sources:
            batch["sources"] = {
                name: source.statistics(split, rows) for name, source in self.sources.items()
            }
        return batch

    def scored_batches(self, split: str) -> Iterator[dict[str, Any]]:
        index, count = training.process_slice(self.mesh)
        first = next(iter(self.sources.values()))
        rows = self.packed.splits[split].iterate_once(
            batch_size=self.config.batch_size,
            process_index=index,
            process_count=count,
            max_rows=self.config.eval_rows,
        )
        for row in rows:
            batch = self.batch(split, row, sources=False)
            if first.columns == self.packed.names["pivot"]:
                statistics_, _ = first.statistics(split, row)
                batch["agreement"] = objectives.first_choice(statistics_)
            yield batch


def open_session(config: Any, workdir: epath.Path) -> Session:
    """Load the models, pack the text and let the sources speak."""
    if config.source_weight and len(config.source_weight) != len(config.source):
        raise ValueError(
            f"source_weight: {len(config.source_weight)} weights for {len(config.source)} sources"
        )
    mesh = training.make_mesh(config.mesh)
    options = dict(dtype=config.dtype, layout=config.layout, remat=config.remat)
    pivot, tokenizer = models.load(config.pivot, mesh=mesh, **options)
    if config.pivot_layers:
        pivot = models.keep_layers(pivot, config.pivot_layers)
    tokenizers = {"pivot": tokenizer}
    specs = dict(zip(source_names(config), config.source, strict=True))
    for name, spec in specs.items():
        tokenizers[name] = models.load_tokenizer(spec)
    packed = distillation_sources.pack_splits(
        config.data,
        tokenizers,
        seq_len=config.seq_len,
        on_error=config.on_error,
        directory=workdir / "data",
    )
    distilling = [loss for loss in config.loss if loss != "sft"]
    foreign = [n for n in specs if packed.names[n] != packed.names["pivot"]]
    same = next((loss for loss in ("kl", objectives.DUAL) if loss in config.loss), None)
    if same and foreign:
        raise ValueError(
            f"loss {same!r} needs one vocabulary, but source {specs[foreign[0]]!r} has another "
            "tokenizer than the pivot; use uld, gld or uld+gld"
        )
    needed = distillation_sources.needed_rows(packed, config, distilling=bool(distilling))
    # Each process lets the sources read its own share, on its own devices.
    here = training.make_mesh("fsdp:-1", devices=jax.local_devices())
    sources = {}
    for i, (name, spec) in enumerate(specs.items()):
        columns = packed.names[name]
        if i < len(config.teacher):
            kind, _, place = config.teacher[i].partition(":")
            if kind != "cache" or not place:
                raise ValueError(f"teacher: expected cache:DIR, got {config.teacher[i]!r}")
            caches = distillation_sources.open_caches(
                epath.Path(place), packed, columns, tokenizers[name].fingerprint, needed
            )
        else:
            caches = distillation_sources.let_source_read(
                spec,
                functools.partial(models.load, spec, mesh=here, **options),
                columns=columns,
                packed=packed,
                rows=needed,
                k=config.cache_top_k,
                batch_size=config.batch_size,
                directory=workdir / "sources" / name,
            )
        sources[name] = distillation_sources.Source(columns, packed, caches)
    return Session(config, workdir, mesh, pivot, tokenizer, packed, sources)


def source_names(config: Any) -> list[str]:
    return [f"source{i}" for i in range(len(config.source))]


def run_arms(config: Any, workdir: epath.Path) -> dict[str, Any]:
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
    params = session.functional[1]
    scores = session.scores(params, "test")
    record = {**scores, "sample": session.sample(params)}
    processes.write_json(path, record)
    return record


def make_step(
    config: Any, graphdef: Any, mesh: Any, settings: Settings
) -> tuple[Any, training.TrainStep]:
    """An arm's optimizer and its compiled update."""
    objective = objectives.Objective.of(config, settings.loss, settings.gld)
    learning_rate = settings.learning_rate
    schedule = dict(
        schedule="cosine", warmup=int(config.warmup * config.steps), total_steps=config.steps
    )
    tx = training.make_optimizer(learning_rate, weight_decay=config.weight_decay, **schedule)
    step = training.make_train_step(
        objectives.loss_function(objective, graphdef, tuple(source_names(config))),
        tx,
        mesh=mesh,
        accumulate=config.accumulate,
        schedule=training.make_schedule(learning_rate, **schedule),
    )
    return tx, step


def trace_step(config: Any, decoder: models.DecoderConfig, mesh: Any, *, loss: str) -> Any:
    """The update of a pivot of this shape, traced for a mesh without a byte of it in memory."""
    abstract = nnx.eval_shape(
        lambda: models.Decoder(
            decoder,
            rngs=nnx.Rngs(0),
            dtype=jnp.dtype(config.dtype),
            layout=config.layout,
            remat=config.remat,
        )
    )
    apply_fn, params = models.from_nnx(abstract)
    settings = Settings(loss, config.learning_rate[0], config.gld[0])
    tx, step = make_step(config, apply_fn.graphdef, mesh, settings)
    state = training.abstract_train_state(params, tx, mesh=mesh, rules=models.DECODER_RULES)
    rows, length, k = config.batch_size, config.seq_len, config.cache_top_k
    sharding = training.batch_sharding(mesh)

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    columns = ("tokens", "segment_ids", "positions")
    batch: dict[str, Any] = {"pivot": {name: array(jnp.int32, length) for name in columns}}
    batch["pivot"]["loss_mask"] = array(jnp.bool_, length)
    if loss != "sft":
        per_position = [array(jnp.float32, length - 1) for _ in range(3)]
        statistics_ = losses.GraphStatistics(
            values=array(jnp.float32, length - 1, k),
            indices=array(jnp.int32, length - 1, k),
            **dict(zip(("log_z", "mean", "std"), per_position, strict=True)),
        )
        where = array(jnp.bool_, length - 1)
        batch["sources"] = dict.fromkeys(source_names(config), (statistics_, where))
    return step.trace(state, batch)


def lower_step(config: Any, decoder: models.DecoderConfig, mesh: Any, *, loss: str) -> Any:
    """What `trace_step` traces, lowered."""
    return trace_step(config, decoder, mesh, loss=loss).lower()


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is needed to train an arm.

    Attributes:
      start: seed -> the state before the first step.
      step: the compiled update.
      batches: (step, seed) -> this process's rows.
    """

    start: Callable[[int], training.TrainState]
    step: training.TrainStep
    batches: Callable[..., dict[str, Any]]


def prepare_arm(session: Session, settings: Settings) -> Arm:
    """An arm at the settings, ready for every seed."""
    config, mesh = session.config, session.mesh
    graphdef, params = session.functional
    if settings.loss == objectives.DUAL:
        params = objectives.with_auxiliary_head(graphdef, params)
    tx, step = make_step(config, graphdef, mesh, settings)
    index, count = training.process_slice(mesh)
    train = session.packed.splits["train"]

    def start(seed: int) -> training.TrainState:
        return training.create_train_state(
            params, tx, mesh=mesh, rules=models.DECODER_RULES, seed=seed
        )

    def batches(number: int, seed: int = 0) -> dict[str, Any]:
        rows = train.batch(
            number,
            seed=seed,
            batch_size=config.batch_size,
            process_index=index,
            process_count=count,
        )
        return session.batch("train", rows, sources=settings.loss != "sft")

    return Arm(start, step, batches)


def _run_arm(session: Session, settings: Settings, *, seed: int) -> Outcome:
    config, loss = session.config, settings.loss
    name = f"{settings.name}/seed-{seed}"
    directory = session.workdir / "arms" / name
    done = directory / "outcome.json"
    if processes.broadcast_from_first(done.exists):
        record = json.loads(done.read_text())
        record["curve"] = tuple(tuple(point) for point in record["curve"])
        return Outcome(**record)
    logging.info("arm %s", name)
    arm = prepare_arm(session, settings)
    with training.Checkpointer(directory / "checkpoints", max_to_keep=2) as checkpointer:
        state = training.train_loop(
            arm.start(seed),
            arm.step,
            functools.partial(arm.batches, seed=seed),
            total_steps=config.steps,
            workdir=directory,
            checkpointer=checkpointer,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            eval_fn=lambda state, _: session.scores(state.params, "validation"),
            eval_every=config.eval_every,
            writer=training.make_writer(directory, tensorboard=config.tensorboard),
            identity={"data": session.packed.splits["train"].fingerprint, "arm": name},
            profile_steps=config.profile_steps,
        )
    lines = _metrics(directory)
    curve = tuple(
        (line["step"], line["eval/perplexity"]) for line in lines if "eval/perplexity" in line
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

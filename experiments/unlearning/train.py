"""The models of unlearning: a target, one retrained without the forget set, and what arms make.

Each has a folder named after all it depends on. What is finished is read, what was stopped goes on.
Several processes train them together and then hold each model whole, every process for itself.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath
from flax import nnx

from experiments.shared import fit
from experiments.shared.records import Record, remove_directory
from experiments.unlearning import arms
from experiments.unlearning import data as rows_of
from experiments.unlearning.arms import Difference
from experiments.unlearning.config import Config
from experiments.unlearning.data import Rows
from logitjax import models, processes, training, unlearning
from logitjax.storage import digest
from logitjax.unlearning import Deployed


def finetuning_update(config: Config, model: models.Decoder, mesh: Any, steps: int) -> fit.Update:
    """The update of the target, and of the model that is retrained."""
    schedule = training.Schedule(
        config.finetune_learning_rate, warmup=max(1, steps // 10), total_steps=steps
    )
    return fit.make_update(unlearning.make_answer_loss(model), schedule, mesh=mesh)


def epochs_update(
    loss_fn: training.LossFn, rate: float, mesh: Any, *, per_epoch: int, epochs: int, b2: float
) -> fit.Update:
    """The update of an arm: one epoch of warm-up, then linearly to nothing."""
    steps = per_epoch * epochs
    warmup = min(per_epoch, steps // 2)
    schedule = training.Schedule(rate, "linear", warmup=warmup, total_steps=steps, final=0.0)
    return fit.make_update(loss_fn, schedule, mesh=mesh, b2=b2)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training left: parameters of its best epoch, and what it took.

    Attributes:
        params: a model's, or adapters.
        record: `epoch`, `history` (scores by epoch), `seconds_per_epoch`, `seconds_to_best`,
            `peak_bytes` (as the compiler plans the step, weights included), `trained` (numbers).
    """

    params: Any
    record: Record


class Models:
    """All models of a run, made when they are asked for."""

    def __init__(self, config: Config, root: epath.Path, scene: rows_of.Scene):
        self.config, self.root, self.scene = config, root, scene
        self.tokenizer = models.load_tokenizer(config.model)
        self.template = rows_of.TEMPLATES[config.template]()
        self.mesh = training.make_mesh(config.mesh, partial=True)
        source = epath.Path(config.model)
        size = source.stat().length if source.exists() and not source.is_dir() else None
        #: Names what target and retrained model were made from.
        self.key = digest(
            [config.model, config.layers, config.dtype, size],
            scene.taught,
            [config.template, config.max_length, config.row_length],
            [config.finetune_epochs, config.finetune_batch, config.finetune_learning_rate],
            length=12,
        )

    @functools.cached_property
    def start(self) -> models.Decoder:
        """The model before it has heard of any author."""
        config = self.config
        model, _ = models.load(config.model, dtype=config.dtype, layout="listed")
        if config.layers:
            layers = [i for i in config.layers if i < model.config.num_layers]
            model = models.keep_layers(model, layers)
        return models.with_layout(model, "listed")

    @functools.cached_property
    def target(self) -> models.Decoder:
        """Finetuned on all authors."""
        return self._finetuned("target", self.scene.full)

    @functools.cached_property
    def retrained(self) -> models.Decoder:
        """Finetuned on those that may be kept alone."""
        return self._finetuned("retrained", self.scene.retain)

    def make(self) -> None:
        """Target and retrained model: all processes train them, before the first one asks alone."""
        for name in ("target", "retrained"):
            getattr(self, name)

    def rows(self, items: Any) -> Rows:
        length, tokenizer = self.config.max_length, self.tokenizer
        pad = next((i for i in (tokenizer.pad_id, tokenizer.eos_id) if i is not None), 0)
        rows = [
            self.template.encode_answer(tokenizer, i.question, i.answer, max_length=length)
            for i in items
        ]
        return unlearning.Row.padded(rows, length, pad_id=pad)

    def directory(self, arm: str, seed: int, *settings: Any) -> epath.Path:
        """The folder of an arm: named after all that its training depends on."""
        config = self.config
        shared = [config.batch_size, config.validated, self.scene.unlearned]
        name = digest(self.key, arm, shared, settings, length=12)
        return self.root / f"{arm}-{name}" / f"seed-{seed}"

    def unlearn(
        self, arm: str, seed: int, validate: Callable[[Deployed], Any], *, rate: float = 1.0
    ) -> Trained:
        """The target's weights after an arm's training, of the epoch that validation chose.

        Args:
            arm: of those that train weights.
            seed: of batches and directions.
            validate: scores an epoch.
            rate: what the learning rate is multiplied by.
        """
        config = self.config
        method, target = unlearning.METHODS.parse(arm), self.target
        pairs = [(item, item) for item in self.scene.forget]
        if "instead" in method.sides:
            texts = method.instead(target, self._questions, seed=seed)
            pairs = [
                (item, dataclasses.replace(item, answer=answer))
                for (item, _), answers in zip(pairs, texts, strict=True)
                for answer in answers
            ]
        forget, instead = map(self.rows, zip(*pairs))
        keep = self.rows(self.scene.retain)
        graphdef, params, rest = nnx.split(target, nnx.Param, ...)
        params = nnx.to_pure_dict(params)
        size = config.batch_size

        def batches(step: int) -> dict[str, Rows]:
            at: Any = dict(size=size, seed=seed)
            batch = {
                "forget": rows_of.picked(forget, step, **at),
                "instead": rows_of.picked(instead, step, **at),
                "retain": rows_of.drawn(keep, step, **at),
            }
            return {side: batch[side] for side in method.sides}

        per_epoch = rows_of.steps_an_epoch(forget, size)
        loss_fn, constants = method.make_loss(
            target,
            counts=self._counts(batches, per_epoch * config.epochs),
            key=jax.random.key(seed),
        )
        rate_, epochs = rate * config.learning_rate, config.epochs
        return self._best_epoch(
            self._unlearned_at(arm, seed, rate),
            epochs_update(loss_fn, rate_, self.mesh, per_epoch=per_epoch, epochs=epochs, b2=0.999),
            params,
            batches,
            per_epoch=per_epoch,
            epochs=epochs,
            seed=seed,
            constants=constants,
            validate=lambda params: validate(Deployed(model=nnx.merge(graphdef, params, rest))),
        )

    def assist(
        self, arm: str, difference: Difference, seed: int, validate: Callable[[Deployed], Any]
    ) -> tuple[unlearning.Assistant, Trained]:
        """An assistant of the target, of the epoch that validation chose."""
        config, target = self.config, self.target
        fresh = unlearning.Assistant.init(
            target,
            config.assistant_layers,
            rank=difference.rank,
            alpha=difference.lora_alpha,
            key=jax.random.key(seed),
        )
        silent = self.scene.retain if difference.silent == "all" else self.scene.retain_more
        forget, keep = map(self.rows, (self.scene.forget_more, silent))
        size = config.batch_size

        def deployed(lora: Any) -> Deployed:
            assistant = unlearning.Assistant(base=fresh.base, lora=lora)
            return arms.deployed(target, assistant, difference)

        batches = functools.partial(rows_of.forget_and_keep, forget, keep, size=size, seed=seed)
        epochs, per_epoch = config.assistant_epochs, rows_of.steps_an_epoch(forget, size)
        loss_fn, constants = difference.method(config.assistant_layers).make_loss(
            target, counts=self._counts(batches, epochs * per_epoch)
        )
        rate = config.assistant_learning_rate
        settings = [dataclasses.asdict(difference), config.assistant_layers, epochs, rate]
        found = self._best_epoch(
            self.directory(arm, seed, settings),
            epochs_update(loss_fn, rate, self.mesh, per_epoch=per_epoch, epochs=epochs, b2=0.99),
            fresh.lora,
            batches,
            per_epoch=per_epoch,
            epochs=epochs,
            seed=seed,
            constants=constants,
            validate=lambda lora: validate(deployed(lora)),
        )
        return unlearning.Assistant(base=fresh.base, lora=found.params), found

    @functools.cached_property
    def _questions(self) -> unlearning.Questions:
        """The rows to forget as a method asks them."""
        rows = [
            unlearning.Row(prompt=self.template.render(item.question), answer=item.answer)
            for item in self.scene.forget
        ]
        return unlearning.Questions.of(
            {"forget": rows}, self.tokenizer, max_length=self.config.max_length
        )

    def _counts(self, batches: Callable[[int], Any], steps: int) -> list[dict[str, int]] | None:
        """The answers' tokens on each side of every step; of no use where rows are split."""
        if self.mesh.size > 1:
            return None
        # Token 0 of a row is predicted by nobody.
        return [
            {side: int(rows["mask"][:, 1:].sum()) for side, rows in batches(step).items()}
            for step in range(steps)
        ]

    def taught_again(self, model: models.Decoder, seed: int = 0) -> models.Decoder:
        """A model after a few steps on some of the questions that it was to forget."""
        config, taught = self.config, self.rows(self.scene.probes["forget_taught"])
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        steps, size = config.relearn_steps, config.batch_size
        schedule = training.Schedule(config.relearn_learning_rate, "constant")
        loss_fn = unlearning.make_answer_loss(model)
        update = fit.make_update(loss_fn, schedule, mesh=self.mesh, weight_decay=0.0)
        state = training.train_loop(
            update.start(nnx.to_pure_dict(params), seed),
            update.step,
            lambda step: fit.share(self.mesh, rows_of.picked(taught, step, size=size, seed=seed)),
            total_steps=steps,
            options=training.LoopOptions(log_every=0),
        )
        return nnx.merge(graphdef, processes.local_copy(state.params), rest)

    def _finetuned(self, name: str, items: Any) -> models.Decoder:
        config, start = self.config, self.start
        graphdef, params, rest = nnx.split(start, nnx.Param, ...)
        rows = rows_of.packed(
            items, self.tokenizer, self.template, config.max_length, config.row_length
        )
        size = config.finetune_batch
        logging.info("%s: %d questions in %d rows", name, len(items), len(rows["tokens"]))
        steps = rows_of.steps_an_epoch(rows, size) * config.finetune_epochs
        trained = fit.fit(
            finetuning_update(config, start, self.mesh, steps),
            nnx.to_pure_dict(params),
            lambda step: rows_of.picked(rows, step, size=size, seed=0),
            steps=steps,
            directory=self.root / f"{name}-{self.key}",
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
        )
        return nnx.merge(graphdef, trained, rest)

    def _best_epoch(
        self,
        directory: epath.Path,
        update: fit.Update,
        params: Any,
        batches: Callable[[int], Any],
        *,
        per_epoch: int,
        epochs: int,
        seed: int,
        constants: Any,
        validate: Callable[[Any], dict[str, float]],
    ) -> Trained:
        """Trains, scores every epoch on validation, and comes back with the best."""
        config, steps = self.config, per_epoch * epochs
        best, history_path = directory / "best", directory / "validation.json"
        done = directory / "trained.json"
        start = functools.partial(update.start, params, seed)
        state = start()
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params
        )
        if processes.broadcast_from_first(lambda: done.exists() and best.exists()):
            with training.Checkpointer(best) as keeper:
                record = json.loads(done.read_text())
                kept = keeper.restore(like, record["step"]).state
                return Trained(processes.local_copy(kept), record)
        if constants is not None and self.mesh.size > 1:
            constants = update.rules.place(constants, self.mesh)
        logging.info("%s: %d steps", directory, steps)
        first = training.BatchLayout(self.mesh).place(fit.share(self.mesh, batches(0)))
        peak = planned_bytes(update.step.lower(state, first, constants).compile())
        del state
        seconds: list[float] = []

        def timed(state: Any, batch: Any) -> Any:
            begin = time.perf_counter()
            state, output = update.step(state, batch, constants)
            jax.block_until_ready(output)
            seconds.append(time.perf_counter() - begin)
            return state, output

        resumes = config.resume_arms
        checkpoints = directory / "checkpoints"
        if not resumes:
            remove_directory(best)
        with (
            training.Checkpointer(best) as keeper,
            training.Checkpointer(checkpoints) as checkpointer,
        ):
            began = max(checkpointer.steps(), default=0) if resumes else 0
            history: list[Record] = []
            if history_path.exists():
                history = [h for h in json.loads(history_path.read_text()) if h["step"] <= began]

            def score(state: Any, at: int) -> dict[str, float]:
                scores = validate(processes.local_copy(state.params))
                if not history or scores["score"] > max(h["score"] for h in history):
                    keeper.save(at, state.params)
                    keeper.wait()
                history.append({"step": at, "epoch": at // per_epoch, **scores})
                processes.write_json(history_path, history)
                return scores

            training.train_loop(
                start,
                timed,
                lambda step: fit.share(self.mesh, batches(step)),
                total_steps=steps,
                workdir=directory,
                checkpointer=checkpointer if resumes else None,
                eval_fn=score,
                writer=training.make_writer(directory),
                identity={"steps": steps},
                options=training.LoopOptions(
                    checkpoint_every=per_epoch, log_every=config.log_every, eval_every=per_epoch
                ),
            )
            chosen = max(history, key=lambda h: h["score"])
            found = processes.local_copy(keeper.restore(like, chosen["step"]).state)
        # The first step of a process compiles.
        pace = statistics.median(seconds[1:] or seconds or [0.0])
        record = {
            "step": chosen["step"],
            "epoch": chosen["epoch"],
            "history": history,
            "seconds_per_epoch": pace * per_epoch,
            "seconds_to_best": pace * chosen["step"],
            "peak_bytes": peak,
            "trained": sum(leaf.size for leaf in jax.tree.leaves(like)),
        }
        processes.write_json(done, record)
        remove_directory(checkpoints)
        return Trained(found, record)

    def forget_weights(self, arm: str, seed: int, *, rate: float = 1.0) -> None:
        """Drop the weights of an arm of which all has been measured."""
        remove_directory(self._unlearned_at(arm, seed, rate) / "best")

    def _unlearned_at(self, arm: str, seed: int, rate: float) -> epath.Path:
        config = self.config
        settings = (config.epochs, rate * config.learning_rate)
        return self.directory(arm, seed, *settings)


def planned_bytes(compiled: jax.stages.Compiled) -> int:
    """What the compiler plans for a program: arguments, results that are new, scratch."""
    memory: Any = compiled.memory_analysis()
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )

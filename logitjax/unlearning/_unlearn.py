"""Unlearning rows of one's own: train, choose what has forgotten enough, and keep it."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from logitjax import processes, training
from logitjax.fusion import LogitDifference
from logitjax.models import DECODER_RULES, Decoder, Lora, load_peft, save_peft
from logitjax.storage import write_atomic
from logitjax.unlearning._assistant import Assistant
from logitjax.unlearning._assistant_loss import make_assistant_loss
from logitjax.unlearning._deployed import Deployed
from logitjax.unlearning._method_loss import make_unlearning_loss
from logitjax.unlearning._objective import UNLEARNING_METHODS
from logitjax.unlearning._questions import Questions, fluency
from logitjax.unlearning._rows import padded_rows
from logitjax.unlearning._selection import (
    Goal,
    Limits,
    matched_strength,
    pareto,
    strength_on_curve,
)
from logitjax.unlearning._targets import rmu_direction

#: What `unlearn` takes. `idk_dpo` needs other answers, which rows do not have.
METHODS = ("difference", *(name for name in UNLEARNING_METHODS if name != "idk_dpo"))
_ALPHA_FILE = "assistant.json"
_TEXT_ROWS = 2
_ALPHAS = 31


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a method is trained.

    Attributes:
      method: `'difference'`, which trains an assistant, or one of `UNLEARNING_METHODS`, which
        trains adapters of the model.
      layers: First layers of the model that an assistant has.
      rank: Of the adapters.
      steps: Optimiser steps at most.
      check_every: Steps between looks at what is forgotten and what is kept.
      batch_size: Rows to forget in a step, and as many to keep.
      learning_rate: Peak; 0 for 5e-3 of an assistant, 1e-3 of adapters.
      retain_weight: Weight of the loss on rows to keep; that of the method if None, 1 for an
        assistant.
      seed: Of batches and adapters.
    """

    method: str = "difference"
    layers: int = 8
    rank: int = 16
    steps: int = 40
    check_every: int = 10
    batch_size: int = 8
    learning_rate: float = 0.0
    retain_weight: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("layers", "rank", "steps", "check_every", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def filters(self) -> bool:
        """Whether the model's weights stay as they are."""
        return self.method == "difference"

    @property
    def most(self) -> float:
        """The largest strength that is tried."""
        return 1.5 if self.filters else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unlearned:
    """What unlearning came to.

    Attributes:
      chosen: The candidate that was chosen: its `step` and `strength`; None if none is feasible.
      candidates: All that were tried: `forget`, the median probability of what is to be forgotten,
        `gap` from the goal in nats, the shares kept (`probability`, `rouge`, `fluency`,
        `perplexity`) and the limits that they break, `broken`.
      front: Of the candidates those that no other dominates.
      goal: How likely forgotten answers were to become.
      lora: The chosen adapters, strength not applied; None if none is feasible.
    """

    chosen: Mapping[str, Any] | None
    candidates: Sequence[Mapping[str, Any]]
    front: Sequence[Mapping[str, Any]]
    goal: Goal
    lora: Lora | None


class Unlearning:
    """One run: a model, what it is asked, and the folder that everything is kept in.

    Args:
      model: The model, its layers listed. It is never changed.
      questions: What to forget and keep.
      recipe: How.
      limits: What has to be left of the model.
      directory: Folder of checkpoints, candidates and records: the same one goes on.
    """

    def __init__(
        self,
        model: Decoder,
        questions: Questions,
        recipe: Recipe,
        limits: Limits,
        directory: epath.Path,
    ):
        layers = model.config.num_layers
        if recipe.filters and recipe.layers >= layers:
            raise ValueError(
                f"layers: expected fewer than the model's {layers} for an assistant, got "
                f"{recipe.layers}"
            )
        self.model, self.questions, self.recipe = model, questions, recipe
        self.limits, self.directory = limits, directory
        self.graphdef, params, self.rest = nnx.split(model, nnx.Param, ...)
        self.params = nnx.to_pure_dict(params)

    def fresh(self) -> Lora:
        """Adapters that change nothing yet."""
        recipe, key = self.recipe, jax.random.key(self.recipe.seed)
        if recipe.filters:
            return Assistant.init(self.model, recipe.layers, rank=recipe.rank, key=key).lora
        config, layout = self.model.config, self.model.layout
        return Lora.init(config, recipe.rank, key=key, layout=layout)

    def deployed(self, lora: Lora, strength: float) -> Deployed:
        """What is asked: the model with so much of what was trained."""
        if self.recipe.filters:
            return assisted(self.model, lora, strength)
        return Deployed(model=_merged(scaled(lora, strength), self.model))

    @functools.cached_property
    def before(self) -> dict[str, Any]:
        """What the model says of the rows that settings are chosen by."""
        return kept(self.directory / "before.json", self._before)

    def _before(self) -> dict[str, Any]:
        model, questions = Deployed(model=self.model), self.questions
        parts = ("forget", "reworded", "holdout", "wrong", "validation")
        found: dict[str, Any] = {
            part: questions.probabilities(model, part).tolist()
            for part in parts
            if len(questions.encoded[part])
        }
        answers = questions.answers(model, "validation")
        found["rouge"] = questions.likeness(answers, "validation").tolist()
        found["fluency"] = fluency(answers)
        found["perplexity"] = questions.perplexity(model, "validation")
        return found

    @property
    def asked(self) -> str:
        """The part that says how much is forgotten: other words, if there are any."""
        return "reworded" if self.questions.split.reworded else "forget"

    @functools.cached_property
    def goal(self) -> Goal:
        """How likely forgotten answers are to become.

        Raises:
          ValueError: Nothing says how likely unseen answers are.
        """
        before = self.before
        if "holdout" in before:
            return Goal.of(before["holdout"], "answers of the holdout, which nobody was taught")
        if "wrong" not in before:
            raise ValueError("holdout: expected rows like the one to forget, to know what it is to "
                             "be forgotten, got none")  # fmt: skip
        return Goal.of(before["wrong"], "each other's answers to the questions to forget")

    def run(self) -> Unlearned:
        """Trains until the goal is met twice in a row, then chooses by what is generated too."""
        candidates = self._train()
        lora = functools.partial(load_candidate, self.directory, self._config)
        ranked = sorted(
            (c for c in candidates if not c["broken"] and self.goal.met(c["forget"])),
            key=lambda c: (-min(c["probability"], 1.0), c["step"]),
        )
        tried: list[dict[str, Any]] = []
        for candidate in ranked:
            tried.append(self._with_answers(candidate, lora(candidate["step"])))
            if not tried[-1]["broken"]:
                break
        said = {(c["step"], c["strength"]): c for c in tried}
        candidates = [said.get((c["step"], c["strength"]), c) for c in candidates]
        front = [candidates[i] for i in pareto(_points(candidates), ("forgotten", "kept"))]
        good = [c for c in tried if not c["broken"]]
        return Unlearned(
            chosen=good[0] if good else None,
            candidates=candidates,
            front=front,
            goal=self.goal,
            lora=lora(good[0]["step"]) if good else None,
        )

    @property
    def _config(self) -> Any:
        config = self.model.config
        if not self.recipe.filters:
            return config
        count = self.recipe.layers
        return dataclasses.replace(config, num_layers=count, windows=config.windows[:count])

    def _train(self) -> list[dict[str, Any]]:
        """A candidate at every look, until the goal is met twice in a row or steps are spent."""
        recipe, candidates = self.recipe, []
        update, batches, constants = self._update()
        mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
        schedule = training.Schedule(
            recipe.learning_rate or (5e-3 if recipe.filters else 1e-3),
            "linear",
            warmup=min(recipe.steps - 1, max(1, recipe.steps // 10)),
            total_steps=recipe.steps,
        )
        tx = schedule.optimizer(b2=0.99)
        step = training.TrainStep(update, tx, mesh=mesh, schedule=schedule)
        state = training.TrainState.create(
            self.fresh(), tx, mesh=mesh, rules=DECODER_RULES, seed=recipe.seed
        )
        folder = self.directory / "train"
        looks = [*range(recipe.check_every, recipe.steps, recipe.check_every), recipe.steps]
        with training.Checkpointer(folder / "checkpoints", max_to_keep=1) as checkpointer:
            for at in looks:
                path = self.directory / "candidates" / f"step-{at}.json"
                if not path.exists():
                    try:
                        state = training.train_loop(
                            state,
                            functools.partial(step, constants=constants),
                            batches,
                            total_steps=at,
                            workdir=folder,
                            checkpointer=checkpointer,
                            writer=training.make_writer(folder),
                            identity={"recipe": json.dumps(dataclasses.asdict(recipe))},
                        )
                    except FloatingPointError as error:
                        logging.warning("stopped: %s", error)
                        break
                    save_peft(state.params, self._config, path.parent / f"step-{at}")
                candidates.append(kept(path, lambda at=at: self._candidate(at)))
                logging.info("step %d: %s", at, json.dumps(candidates[-1]))
                if all(self._meets(c) for c in candidates[-2:]) and len(candidates) > 1:
                    break
        return candidates

    def _meets(self, candidate: Mapping[str, Any]) -> bool:
        return not candidate["broken"] and self.goal.met(candidate["forget"])

    def _candidate(self, step: int) -> dict[str, Any]:
        """The strength at which so many steps reach the goal, and what is left of the rest."""
        lora = load_candidate(self.directory, self._config, step)

        def forget(strength: float) -> float:
            try:
                found = self.questions.probabilities(self.deployed(lora, strength), self.asked)
            except ValueError as error:  # losses that are not finite
                logging.warning("step %d, strength %.3g: %s", step, strength, error)
                return float("nan")
            return float(np.median(found))

        if self.recipe.filters:
            alphas = np.linspace(0.0, self.recipe.most, _ALPHAS, dtype=np.float32)[1:]
            curve = self.questions.medians_by_alpha(self.deployed(lora, 1.0), self.asked, alphas)
            strength = strength_on_curve(alphas, curve, self.goal)
            found = forget(strength)
        else:
            strength, found = matched_strength(forget, self.goal, most=self.recipe.most)
        record: dict[str, Any] = {"step": step, "strength": strength, "forget": found}
        if not np.isfinite(found):
            return record | {"forget": 0.0, "gap": 1e9, "probability": 0.0, "broken": ["finite"]}
        model = self.deployed(lora, strength)
        share = self.questions.probabilities(model, "validation").mean()
        record |= {
            "gap": self.goal.gap(found),
            "probability": float(share / np.mean(self.before["validation"])),
            "perplexity": _ratio(
                self.questions.perplexity(model, "validation"), self.before["perplexity"]
            ),
        }
        return record | {"broken": list(self.limits.broken(record))}

    def _with_answers(self, candidate: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
        """A candidate with what is left of generated answers."""

        def measure() -> dict[str, Any]:
            model = self.deployed(lora, candidate["strength"])
            answers = self.questions.answers(model, "validation")
            rouge = self.questions.likeness(answers, "validation")
            record = dict(candidate) | {
                "rouge": _ratio(_mean(rouge), _mean(self.before["rouge"])),
                "fluency": _ratio(fluency(answers), self.before["fluency"]),
            }
            return record | {"broken": list(self.limits.broken(record))}

        name = f"step-{candidate['step']}-answers.json"
        return kept(self.directory / "candidates" / name, measure)

    def _update(self) -> tuple[Any, Callable[[int], Any], Any]:
        """The loss, the batch of each step, and what no step changes."""
        recipe = self.recipe
        rows = {
            "forget": list(self.questions.encoded["forget"]),
            "retain": list(self.questions.encoded["train"]),
        }
        length = max(len(ids) for side in rows.values() for ids, _ in side)
        length = -(-length // 8) * 8
        texts = [
            (window[:length], np.arange(min(length, len(window))) > 0)
            for window in self.questions.texts.get("train", ())
        ]
        sides = {name: padded_rows(r, length, pad_id=self.questions.pad_id) for name, r in
                 [*rows.items(), ("text", texts)]}  # fmt: skip

        def batches(step: int) -> dict[str, Any]:
            size = recipe.batch_size
            few = min(_TEXT_ROWS, size - 1) if texts else 0
            parts = [_picked(sides["retain"], step, size - few, recipe.seed, 1)]
            if few:
                parts.append(_picked(sides["text"], step, few, recipe.seed, 2))
            retain = {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
            forget = _picked(sides["forget"], step, min(size, len(rows["forget"])), recipe.seed, 0)
            return {"forget": forget, "retain": retain}

        counts = [
            {side: int(batch[side]["mask"][:, 1:].sum()) for side in batch}
            for batch in map(batches, range(recipe.steps))
        ]
        most = {side: max(1, *(count[side] for count in counts)) for side in counts[0]}
        if recipe.filters:
            assistant = Assistant.init(
                self.model, recipe.layers, rank=recipe.rank, key=jax.random.key(0)
            )
            loss_fn, constants = make_assistant_loss(
                assistant.base,
                retain_weight=1.0 if recipe.retain_weight is None else recipe.retain_weight,
                max_positions=max(sum(count.values()) for count in counts),
            )
            return loss_fn, batches, constants
        method = UNLEARNING_METHODS[recipe.method]
        if recipe.retain_weight is not None:
            method = dataclasses.replace(method, retain_weight=recipe.retain_weight)
        depth = self.model.config.num_layers
        loss_fn = make_unlearning_loss(
            method,
            self.model,
            after_layers=max(1, min(depth - 1, round(depth / 4))),
            direction=rmu_direction(
                self.model.config.hidden_size,
                key=jax.random.key(recipe.seed),
                scale=method.options.get("scale", 1.0),
            ),
            most=most,
            adapters=True,
        )
        return loss_fn, batches, self.params


def kept(path: epath.Path, make: Callable[[], Any]) -> Any:
    """A record from disk, made and written first if it is not there."""
    if not path.exists():
        processes.write_json(path, make())
    return json.loads(path.read_text())


def load_candidate(directory: epath.Path, config: Any, step: int) -> Lora:
    """The adapters of a step that was looked at."""
    return load_peft(directory / "candidates" / f"step-{step}", config)


def assisted(model: Decoder, lora: Lora, alpha: float) -> Deployed:
    """A model from which so much of an assistant, given by its adapters, is taken away."""
    count = sum(len(segment) for segment in lora.layers)
    fresh = Assistant.init(model, count, rank=1, key=jax.random.key(0))
    assistant = Assistant(base=fresh.base, lora=lora)
    fuse = LogitDifference(alpha=alpha, filter="none")
    return Deployed(model=model, assistant=assistant, fuse=fuse)


def save_assistant(
    directory: epath.PathLike, lora: Lora, config: Any, *, alpha: float, base: str = ""
) -> None:
    """Write an assistant for `logitjax serve` and `generate`: a PEFT adapter, and its alpha.

    Args:
      directory: Made where it does not exist.
      lora: Its adapters.
      config: Of the model's first layers.
      alpha: Its weight, which serving may override.
      base: Name of the model that it belongs to.
    """
    save_peft(lora, config, directory, base=base)
    record = {"layers": config.num_layers, "alpha": alpha, "filter": "none"}
    write_atomic(epath.Path(directory) / _ALPHA_FILE, json.dumps(record, indent=1) + "\n")


def load_assistant(
    directory: epath.PathLike, model: Decoder, *, alpha: float | None = None
) -> Deployed:
    """A model with the assistant that `save_assistant` wrote.

    Args:
      directory: The assistant's.
      model: The model that it was made of, its layers listed.
      alpha: Its weight; as written if None.

    Raises:
      FileNotFoundError: There is no assistant.
      ValueError: It is of another model.
    """
    directory = epath.Path(directory)
    path = directory / _ALPHA_FILE
    if not path.exists():
        raise FileNotFoundError(f"assistant: no such file: {path}")
    record = json.loads(path.read_text())
    count, config = record["layers"], model.config
    if not 1 <= count <= config.num_layers:
        raise ValueError(
            f"assistant: {directory} has {count} layers, the model {config.num_layers}"
        )
    small = dataclasses.replace(config, num_layers=count, windows=config.windows[:count])
    return assisted(model, load_peft(directory, small), record["alpha"] if alpha is None else alpha)


def scaled(lora: Lora, strength: float) -> Lora:
    """Adapters whose update is multiplied by a number, which no program depends on."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * strength if path[-1].key == "b" else leaf, lora
    )


@nnx.jit
def _merged(lora: Lora, model: Decoder) -> Decoder:
    return lora.merged_into(model)


def _picked(
    rows: Mapping[str, np.ndarray], step: int, size: int, seed: int, salt: int
) -> dict[str, np.ndarray]:
    """The rows of a step: every epoch all of them once, in an order of its own."""
    count = len(rows["tokens"])
    places = range(step * size, (step + 1) * size)
    chosen = [
        np.random.default_rng([seed, salt, place // count]).permutation(count)[place % count]
        for place in places
    ]
    return {name: values[chosen] for name, values in rows.items()}


def _points(candidates: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What a candidate is judged by: how near the goal, and the least share that is kept."""
    points = []
    for c in candidates:
        shares = [c[name] for name in ("probability", "rouge", "fluency") if c.get(name)]
        if c.get("perplexity"):
            shares.append(1 / c["perplexity"])
        points.append({"forgotten": -c["gap"], "kept": min(shares, default=0.0)})
    return points


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or not before else after / before

"""Unlearning rows of one's own: train, choose what has forgotten enough, and write it."""

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

from logitjax import training
from logitjax.evaluation import fluency
from logitjax.models import (
    DECODER_RULES,
    Decoder,
    DecoderConfig,
    Lora,
    load_model,
    load_peft,
    save_peft,
    save_pretrained,
    with_layout,
)
from logitjax.storage import Manifest, digest, write_atomic
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._selection import (
    Goal,
    least_share,
    matched_strength,
    pareto,
    strength_on_curve,
)
from logitjax.unlearning._unlearn_config import UnlearnConfig
from logitjax.unlearning._unlearn_update import make_update
from logitjax.unlearning.assistant._deployed import Deployed, merged, scaled
from logitjax.unlearning.measures._examine import examine, relearned

_ALPHAS = 31
# Settings are chosen by half of the questions that have other words; fewer than this share of all
# rows would decide for the rest.
_ENOUGH = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unlearned:
    """What unlearning came to.

    Attributes:
        chosen: The candidate that was chosen: its `step` and `strength`; None if none is feasible.
        candidates: All that were tried: `forget`, the median probability of what is to be
            forgotten, `gap` from the goal in nats, the shares kept (`probability`, `rouge`,
            `fluency`, `perplexity`), the `least` of them (perplexity by its inverse), and the
            limits that they break, `broken`.
        front: Of the candidates those that no other dominates.
        goal: How likely forgotten answers were to become.
        model: What was written, read again; None if none is feasible.
        before, after: Of `examine`, what the model and what was written say; empty likewise.
        control: What the reference says; empty without one.
    """

    chosen: Mapping[str, Any] | None
    candidates: Sequence[Mapping[str, Any]]
    front: Sequence[Mapping[str, Any]]
    goal: Goal
    model: Deployed | None = None
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    after: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    control: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Unlearning:
    """An unlearning run and its folder; the same folder continues it.

    Args:
        model: The model, with listed layers. It is never changed.
        questions: Rows to forget and to keep, from `split_rows`.
        config: The method, its settings, and the limits of what may be lost.
        directory: Folder of checkpoints, candidates, records, and of the result: `assistant`,
            `adapter` or `model`.
        base: Name of the model, which is written beside the adapters.
        reference: A model that never knew what is forgotten, as a control for attacks.
        identity: What the model is known by, where its weights are computed and not the same to the
            last bit everywhere; a digest of them if None. A folder of another model is refused.
        before: File of what the model says of rows that settings are chosen by, which runs of one
            model and its questions may share; in the folder if None.

    Raises:
        ValueError: An assistant of all the model's layers, no rows to forget or to keep, plain text
            for a method that wants questions, or a model whose adapters no file holds; later, a
            folder of other rows, other text or another model.
    """

    def __init__(
        self,
        model: Decoder,
        questions: Questions,
        config: UnlearnConfig,
        directory: epath.Path,
        *,
        base: str = "",
        reference: Decoder | None = None,
        before: epath.Path | None = None,
        identity: str | None = None,
    ):
        for part in ("forget", "train", "validation"):
            if not questions.rows[part]:
                raise ValueError(f"questions: expected rows of the part {part!r}, got none")
        config.method.check(model, questions)
        if config.method.assistant and not config.adapters:
            raise ValueError("adapters: expected True for an assistant, which is made of them")
        if config.adapters and model.config.fused_maps:
            raise ValueError(
                f"adapters: PEFT can hold none of the family {model.config.family!r}; expected "
                "False, and a method that trains weights"
            )
        self.model, self.questions, self.config = model, questions, config
        self.directory, self.base, self._identity = directory, base, identity
        self._before_file = before or directory / "candidates" / "before.json"
        self._reference = None if reference is None else Deployed(model=reference)

    @functools.cached_property
    def goal(self) -> Goal:
        """The goal: how likely forgotten answers are to become.

        Raises:
            ValueError: Nothing says how likely unseen answers are.
        """
        before = self._before["probabilities"]
        if "holdout" in before:
            return Goal.of(before["holdout"], "answers of the holdout, which nobody was taught")
        if "wrong" in before:
            return Goal.of(before["wrong"], "each other's answers to the questions to forget")
        raise ValueError("holdout: expected rows like the one to forget, to know when it is, got "
                         "none")  # fmt: skip

    def run(self, *, examines: bool = True) -> Unlearned:
        """Train until the goal is met twice in a row, choose, write and examine.

        Args:
            examines: Whether to write and examine the result; without, only candidates are kept.
        """
        self._check_folder()
        candidates, chosen = self._chosen(self._train())
        found = Unlearned(
            chosen=chosen,
            candidates=candidates,
            front=[candidates[i] for i in pareto([(-c["gap"], c["least"]) for c in candidates])],
            goal=self.goal,
        )
        if chosen is None or not examines:
            return found
        written = self._write(self._trained(chosen["step"]), chosen["strength"])
        kind = "-all-attacks" if self.config.thorough else ""
        sides = {"before": Deployed(model=self.model), "after": written}
        if self._reference is not None:
            sides["control"] = self._reference
        return dataclasses.replace(
            found,
            model=written,
            **{
                name: self._kept(f"{name}{kind}.json", functools.partial(self._examined, side))
                for name, side in sides.items()
            },
        )

    def deployed(self, candidate: Mapping[str, Any]) -> Deployed:
        """The model as a candidate would have it, feasible or not."""
        return self._deployed(self._trained(candidate["step"]), candidate["strength"])

    def _examined(self, side: Deployed) -> dict[str, Any]:
        thorough = self.config.thorough
        found = examine(side, self.questions, thorough=thorough, reference=self._reference)
        if thorough:
            found["attacks"] |= relearned(side, self.questions)
        return found

    @functools.cached_property
    def _before(self) -> dict[str, Any]:
        """What the model says of the rows that settings are chosen by."""

        self._check_folder()

        def measure() -> dict[str, Any]:
            model, questions = Deployed(model=self.model), self.questions
            answers = questions.answers(model, "validation")
            return {
                "probabilities": {
                    part: questions.probabilities(model, part).tolist()
                    for part in ("holdout", "wrong", "validation", self._asked)
                    if questions.rows[part]
                },
                "rouge": questions.likeness(answers, "validation").tolist(),
                "fluency": fluency(answers),
                "perplexity": questions.perplexity(model, "validation"),
            }

        return self._kept(self._before_file, measure)

    def _check_folder(self) -> None:
        """What is in the folder was made of these rows, this text and this model."""
        questions, manifest = self.questions, Manifest(self.directory, "unlearning run")
        tokenizer, model = questions.tokenizer, self._identity
        if model is None:
            weights = nnx.to_pure_dict(nnx.state(self.model, nnx.Param))
            model = digest(weights, sample=64, length=12)
        # Not the encoded rows: a chat template may say what day it is.
        asked = questions.rows, tokenizer.fingerprint, tokenizer.chat_template
        made_from = {
            "rows": digest(*asked, length=12),
            "text": digest(questions.texts, length=12),
            "model": model,
        }
        if manifest.exists():
            manifest.check(made_from)
        else:
            manifest.write(made_from)

    @property
    def known(self) -> float:
        """How likely what is to be forgotten is before: the median probability."""
        return float(np.median(self._before["probabilities"][self._asked]))

    @property
    def _asked(self) -> str:
        """The part that is to be forgotten."""
        # In other words, if there are such of enough rows: what counts is the fact, not the row.
        rows = self.questions.rows
        enough = len({row.answer for row in rows["reworded"]}) >= _ENOUGH * len(rows["forget"])
        return "reworded" if rows["reworded"] and enough else "forget"

    def _kept(self, name: str | epath.Path, make: Callable[[], Any]) -> Any:
        """A record from disk, of the folder or a whole path; made and written if not there."""
        path = self.directory / name if isinstance(name, str) else name
        if not path.exists():
            write_atomic(path, json.dumps(make(), indent=1) + "\n")  # a kill leaves no half record
        return json.loads(path.read_text())  # as read, so that a resumed run sees no other digits

    def _trained(self, step: int) -> Lora | Decoder:
        """The adapters of a step that was looked at, or the model of which all was trained."""
        folder = self.directory / "candidates" / f"step-{step}"
        return self._read(folder) if not self.config.adapters else load_peft(folder, self._adapted)

    def _read(self, folder: epath.Path) -> Decoder:
        return with_layout(load_model(str(folder), dtype=self.model.dtype), self.model.layout)

    @property
    def _adapted(self) -> DecoderConfig:
        """Of the layers that are adapted."""
        return self.config.method.adapted(self.model).config

    def _deployed(self, trained: Lora | Decoder, strength: float) -> Deployed:
        """The model with so much of what was trained."""
        method = self.config.method
        strength *= method.sign
        if isinstance(trained, Decoder):
            return Deployed(model=_towards(self.model, trained, strength))
        return method.deployed(self.model, trained, strength)

    def _train(self) -> list[dict[str, Any]]:
        """A candidate at every look, until the goal is met twice in a row or steps are spent."""
        config = self.config
        update = make_update(self.model, self.questions, config, instead=self._instead())
        mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
        schedule = training.Schedule(
            config.peak,
            "linear",
            warmup=min(config.steps - 1, max(1, config.steps // 10)),  # leaves a step to decay in
            total_steps=config.steps,
        )
        method = update.method
        tx = method.optimizer(schedule.optimizer(b2=0.99), warmup=config.steps // 4)
        weights: Any = nnx.to_pure_dict(nnx.state(self.model, nnx.Param))
        if config.adapters:
            key, layout = jax.random.key(config.seed), self.model.layout
            weights = Lora.init(self._adapted, config.lora_rank, key=key, layout=layout)
        step = training.TrainStep(update.loss_fn, tx, mesh=mesh, schedule=schedule)
        state: Any = functools.partial(
            training.TrainState.create,
            method.start(weights),
            tx,
            mesh=mesh,
            rules=DECODER_RULES,
            seed=config.seed,
        )
        # How it is attacked afterwards changes nothing here.
        identity = repr(dataclasses.replace(config, thorough=False))
        folder, candidates = self.directory / "train", []
        looks = [*range(config.check_every, config.steps, config.check_every), config.steps]
        # For resuming alone: candidates are kept elsewhere.
        with training.Checkpointer(folder / "checkpoints") as checkpointer:
            for at in looks:
                name = f"candidates/step-{at}"
                if not (self.directory / f"{name}.json").exists():
                    try:
                        state = training.train_loop(
                            state,
                            functools.partial(step, constants=update.constants),
                            update.batches,
                            total_steps=at,
                            workdir=folder,
                            checkpointer=checkpointer,
                            writer=training.make_writer(folder),
                            identity={"config": identity},
                        )
                    except FloatingPointError as error:  # earlier looks stay candidates
                        logging.warning("stopped: %s", error)
                        return [*candidates, _diverged(at)]
                    self._save(method.weights(state.params), self.directory / name)
                candidates.append(self._kept(f"{name}.json", functools.partial(self._look, at)))
                logging.info("step %d: %s", at, json.dumps(candidates[-1]))
                # A single hit may be luck.
                if len(candidates) > 1 and all(map(self._meets, candidates[-2:])):
                    break
        return candidates

    def _save(self, weights: Any, folder: epath.Path) -> None:
        if self.config.adapters:
            save_peft(weights, self._adapted, folder)
            return
        graphdef, _, rest = nnx.split(self.model, nnx.Param, ...)
        save_pretrained(nnx.merge(graphdef, weights, rest), None, folder)

    def _instead(self) -> list[list[str]]:
        """What is to be said in place of each answer to forget, where the method wants that."""
        method = self.config.method
        if "instead" not in method.sides:
            return []
        make = functools.partial(method.instead, self.model, self.questions, seed=self.config.seed)
        texts = self._kept("candidates/instead.json", make)
        if not any(texts):
            raise ValueError(
                f"method: expected something for {method.name} to say instead, got none"
            )
        return texts

    def _meets(self, candidate: Mapping[str, Any]) -> bool:
        return not candidate["broken"] and self.goal.met(candidate["forget"])

    def _look(self, step: int) -> dict[str, Any]:
        """The strength at which so many steps reach the goal, and what is left of the rest."""
        trained, questions, before = self._trained(step), self.questions, self._before
        asked, most = self._asked, self.config.method.most_strength

        def forget(strength: float) -> float:
            try:
                found = questions.probabilities(self._deployed(trained, strength), asked)
            except ValueError as error:  # losses that are not finite
                logging.warning("step %d, strength %.3g: %s", step, strength, error)
                return float("nan")
            return float(np.median(found))

        if self.config.method.assistant:
            # Denser where little is taken away, which is enough if much was learnt.
            alphas = most * np.linspace(0.0, 1.0, _ALPHAS, dtype=np.float32)[1:] ** 2
            curve = questions.medians_by_alpha(self._deployed(trained, 1.0), asked, alphas)
            strength = strength_on_curve(alphas, curve, self.goal)
            found = forget(strength)
        else:
            strength, found = matched_strength(forget, self.goal, most=most, without=self.known)
        record: dict[str, Any] = {"step": step, "strength": strength, "forget": found}
        if not np.isfinite(found):
            return _diverged(step)
        model = self._deployed(trained, strength)
        kept = questions.probabilities(model, "validation").mean()
        perplexity = questions.perplexity(model, "validation")
        return self._judged(
            record
            | {
                "gap": self.goal.gap(found),
                "probability": float(kept / np.mean(before["probabilities"]["validation"])),
                "perplexity": _ratio(perplexity, before["perplexity"]),
            }
        )

    def _judged(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """With the least share kept and the limits that are broken."""
        broken = list(self.config.limits.broken(record))
        return dict(record) | {"least": least_share(record), "broken": broken}

    def _chosen(
        self, candidates: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
        """Candidates, the best of which have generated, until one of them keeps all limits."""
        ranked = sorted(
            filter(self._meets, candidates), key=lambda c: (-min(c["probability"], 1.0), c["step"])
        )
        heard: dict[int, Mapping[str, Any]] = {}
        chosen = None
        for candidate in ranked:
            step = candidate["step"]
            heard[step] = self._kept(
                f"candidates/step-{step}-answers.json", functools.partial(self._heard, candidate)
            )
            if not heard[step]["broken"]:
                chosen = heard[step]
                break
        return [heard.get(c["step"], c) for c in candidates], chosen

    def _heard(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        """A candidate with what is left of generated answers."""
        model = self.deployed(candidate)
        answers, before = self.questions.answers(model, "validation"), self._before
        rouge = self.questions.likeness(answers, "validation")
        return self._judged(
            dict(candidate)
            | {
                "rouge": _ratio(_mean(rouge), _mean(before["rouge"])),
                "fluency": _ratio(fluency(answers), before["fluency"]),
            }
        )

    def _write(self, trained: Lora | Decoder, strength: float) -> Deployed:
        """What can be used, and that as it is read again."""
        deployed = self._deployed(trained, strength)
        if deployed.assistant is not None:
            folder = self.directory / "assistant"
            deployed.save(folder, base=self.base)
            return Deployed.load(self.model, folder)
        if isinstance(trained, Decoder):
            folder = self.directory / "model"
            save_pretrained(deployed.model, self.questions.tokenizer, folder)
            return Deployed(model=self._read(folder))
        folder = self.directory / "adapter"
        adapters = scaled(trained, self.config.method.sign * strength)
        save_peft(adapters, self.model.config, folder, base=self.base)
        return Deployed(model=merged(load_peft(folder, self.model.config), self.model))


def _diverged(step: int) -> dict[str, Any]:
    """A candidate with losses that are not finite."""
    return {
        "step": step,
        "strength": 0.0,
        "forget": 0.0,
        "gap": 1e9,  # worse than any finite one, and still JSON
        "probability": 0.0,
        "least": 0.0,
        "broken": ["finite"],
    }


@nnx.jit
def _towards(model: Decoder, other: Decoder, share: Any) -> Decoder:
    """A model so far on the way to another."""
    graphdef, state = nnx.split(model)
    there = nnx.state(other)
    return nnx.merge(
        graphdef, jax.tree.map(lambda x, y: (x + share * (y - x)).astype(x.dtype), state, there)
    )


def _mean(values: Any) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _ratio(after: float | None, before: float | None) -> float | None:
    return None if after is None or not before else after / before

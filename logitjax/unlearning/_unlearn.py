"""Unlearning rows of one's own: train, choose what has forgotten enough, and write it."""

import dataclasses
import functools
import itertools
import json
import math
import time
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
    save_pretrained,
    with_layout,
)
from logitjax.storage import Manifest, digest, write_atomic
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._selection import (
    Goal,
    kept_shares,
    least,
    least_row,
    least_share,
    matched_strength,
)
from logitjax.unlearning._unlearn_config import UnlearnConfig
from logitjax.unlearning._unlearn_update import make_update
from logitjax.unlearning._verdict import Verdict, judge
from logitjax.unlearning._ways import SHORT, WAYS
from logitjax.unlearning.assistant._deployed import Deployed, merged, scaled
from logitjax.unlearning.measures._examine import examine, relearned, unseen

_ALPHAS = 31
# How settings begin that are limits: they may be changed without training again.
_LIMITS = ("least", "most_")
# Folders that may be used.
RESULTS = ("assistant", "adapter", "model")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unlearned:
    """What unlearning came to.

    Attributes:
        chosen: The candidate that was chosen: its `round`, `step` and `strength`; None if none is
            feasible.
        candidates: All that were tried: `forget`, the median probability of what is to be
            forgotten, `worst`, the largest, `excess`, how much likelier the worst answer is than
            the worst of the control in any way to ask, and that by `ways`, `gap` from the goal in
            nats, the shares kept (`probability`, `row`, `rouge`, `fluency`, `perplexity`), the
            `least` of them (perplexity by its inverse), and the limits that they break, `broken`.
        goal: How likely forgotten answers were to become.
        ways: Ways to ask that were trained on in the end.
        verdict: What may be said of it; None where nothing was written.
        staged: Folder of what was written, in the folder of candidates; None if none is feasible.
        model: What was written, read again; None likewise.
        before, after: Of `examine`, what the model and what was written say; empty likewise.
        control: What the reference says; empty without one.
    """

    chosen: Mapping[str, Any] | None
    candidates: Sequence[Mapping[str, Any]]
    goal: Goal
    ways: Sequence[str] = ()
    verdict: Verdict | None = None
    staged: epath.Path | None = None
    model: Deployed | None = None
    before: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    after: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    control: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def settle(self, directory: epath.Path) -> bool:
        """Move what may be used to where it is looked for, and delete what may not.

        Returns:
            Whether it may be used.
        """
        for name in RESULTS:  # of an earlier verdict, too
            if (directory / name).exists():
                (directory / name).rmtree()
        if self.staged is None or self.verdict is None:
            return False
        if self.verdict.passed:
            self.staged.rename(directory / self.staged.name)
        else:
            self.staged.rmtree()
        return self.verdict.passed


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
        """The goal: how likely forgotten answers may be.

        Raises:
            ValueError: Nothing says how likely unseen answers are.
        """
        source = "answers of the holdout, which nobody was taught"
        if not self.questions.rows["holdout"]:
            source = "each other's answers to the questions to forget"
        return Goal.of(self._before["unseen"], source)

    def run(self, *, examines: bool = True) -> Unlearned:
        """Train until the goal is met twice in a row, choose, write, examine and judge.

        Args:
            examines: Whether to write and examine the result; without, only candidates are kept.
        """
        self._check_folder()
        candidates, ways = self._rounds()
        candidates, chosen = self._chosen(candidates)
        found = Unlearned(chosen=chosen, candidates=candidates, goal=self.goal, ways=ways)
        if chosen is None or not examines:
            return found
        staged, written = self._write(self._trained(chosen), chosen["strength"])
        kind = "-all-attacks" if self.config.thorough else ""
        asked = dict.fromkeys((*WAYS, *ways))  # with the combinations that a search has found
        kind += f"-{len(asked)}-ways" if len(asked) > len(WAYS) else ""
        which = f"-{chosen['round']}-{chosen['step']}-{chosen['strength']:.6g}"
        sides = {"before": Deployed(model=self.model), "after": written}
        if self._reference is not None:
            sides["control"] = self._reference
        records = {
            # Other limits may choose another candidate.
            name: self._kept(
                f"examined/{name}{which if name == 'after' else ''}{kind}.json",
                functools.partial(self._examined, side, never=name == "before", ways=tuple(asked)),
            )
            for name, side in sides.items()
        }
        records.setdefault("control", {})
        verdict = judge(
            records["before"],
            records["after"],
            records["control"],
            self.config.limits,
            assistant=self.config.method.assistant,
        )
        return dataclasses.replace(found, model=written, staged=staged, verdict=verdict, **records)

    def deployed(self, candidate: Mapping[str, Any]) -> Deployed:
        """The model as a candidate would have it, feasible or not."""
        return self._deployed(self._trained(candidate), candidate["strength"])

    def _examined(self, side: Deployed, **options: Any) -> dict[str, Any]:
        config = self.config
        options |= dict(thorough=config.thorough, samples=config.samples, reference=self._reference)
        found = examine(side, self.questions, **options)
        if config.thorough:
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
                    for part in ("validation", "forget")
                },
                "unseen": unseen(model, questions),
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
        rows = {  # where a row was read is no part of it
            part: [dataclasses.replace(row, line="") for row in side]
            for part, side in questions.rows.items()
        }
        asked = rows, tokenizer.fingerprint, tokenizer.chat_template
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
        """How much likelier the likeliest answer to forget is before than the goal's worst."""
        return self.goal.excess({"asked": self._before["probabilities"]["forget"]})["asked"]

    def _kept(self, name: str | epath.Path, make: Callable[[], Any]) -> Any:
        """A record from disk, of the folder or a whole path; made and written if not there."""
        path = self.directory / name if isinstance(name, str) else name
        if not path.exists():
            write_atomic(path, json.dumps(make(), indent=1) + "\n")  # a kill leaves no half record
        return json.loads(path.read_text())  # as read, so that a resumed run sees no other digits

    def _trained(self, candidate: Mapping[str, Any]) -> Lora | Decoder:
        """The adapters of a candidate, or the model of which all was trained."""
        folder = self.directory / _name(candidate)
        return self._read(folder) if not self.config.adapters else Lora.load(folder, self._adapted)

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

    def _rounds(self) -> tuple[list[dict[str, Any]], tuple[str, ...]]:
        """Candidates of all rounds, and the ways to ask that were trained on in the end."""
        ways, candidates, leaks = SHORT, [], list[str]()
        for number in range(self.config.rounds):
            found = self._train(number, ways)
            candidates += found
            best = min(found, key=lambda c: (not self._meets(c), c["gap"]))
            # Two searches, of which the second goes on where the first found nothing.
            for seed in (2 * number, 2 * number + 1):
                leaks = [way for way, excess in best["ways"].items() if not self.goal.met(excess)]
                if all(way in ways for way in leaks):
                    leaks = self._searched(best, seed)
                if leaks := [way for way in leaks if way not in ways]:
                    break
            if not leaks or number + 1 == self.config.rounds:
                break
            logging.info("round %d: %s bring answers out, and are trained on", number, leaks)
            ways = (*ways, *leaks)
        return candidates, ways

    def _goal_in(self, ways: Sequence[str]) -> Goal:
        """The goal, with what is never taught asked in combinations of ways as well."""

        def measure() -> list[float]:
            part = "holdout" if self.questions.rows["holdout"] else "wrong"
            model = Deployed(model=self.model)
            return self.questions.probabilities(model, part, way).tolist()

        worst = dict(self.goal.worst)
        for way in ways:
            if way not in WAYS and (rows := self._kept(f"candidates/unseen {way}.json", measure)):
                worst[way] = Goal.of({"asked": rows}, "").worst["asked"]
        return dataclasses.replace(self.goal, worst=worst)

    def _searched(self, candidate: Mapping[str, Any], seed: int) -> list[str]:
        """Combinations of ways that bring out what a candidate does not say to any of them."""

        def search() -> dict[str, float]:
            model = self.deployed(candidate)
            rng, tried = np.random.default_rng([self.config.seed, seed]), {}
            pairs = [*itertools.permutations([way for way in WAYS if way != "asked"], 2)]
            # Those first whose parts go far.
            order = sorted(
                rng.permutation(len(pairs)),
                key=lambda i: -sum(candidate["ways"].get(way, 0.0) for way in pairs[i]),
            )
            for way in (" + ".join(pairs[i]) for i in order):
                if len(tried) == self.config.budget:
                    break
                found = self.questions.probabilities(model, "forget", way)
                if len(found):
                    tried[way] = self._goal_in([way]).excess({way: found})[way]
            return tried

        tried = self._kept(f"{_name(candidate)}-search-{seed}.json", search)
        return [way for way, excess in tried.items() if not self.goal.met(excess)]

    def _train(self, number: int, ways: Sequence[str]) -> list[dict[str, Any]]:
        """A candidate at every look, until the goal is met twice in a row or steps are spent."""
        config = self.config
        update = make_update(self.model, self.questions, config, ways=ways, instead=self._instead())
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
        # How it is attacked and judged afterwards changes nothing here.
        limits = {f.name: 1.0 for f in dataclasses.fields(config) if f.name[:5] in _LIMITS}
        same = {"thorough": False, "samples": 1, "rounds": 1, "budget": 0} | limits
        identity = f"{dataclasses.replace(config, **same)!r} {sorted(ways)}"
        folder, candidates = self.directory / "train" / f"round-{number}", []
        looks = [*range(config.check_every, config.steps, config.check_every), config.steps]
        if not (self.directory / f"{_name({'round': number, 'step': looks[0]})}.json").exists():
            self._announce(update.batches(0), weights)
        # For resuming alone: candidates are kept elsewhere.
        with training.Checkpointer(folder / "checkpoints") as checkpointer:
            for at in looks:
                name = _name({"round": number, "step": at})
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
                        return [*candidates, _diverged(number, at)]
                    self._save(method.weights(state.params), self.directory / name)
                look = functools.partial(self._look, number, at, ways)
                candidates.append(self._judged(self._kept(f"{name}.json", look)))
                logging.info("step %d: %s", at, json.dumps(candidates[-1]))
                # A single hit may be luck.
                if len(candidates) > 1 and all(map(self._meets, candidates[-2:])):
                    break
        return candidates

    def _announce(self, batch: Mapping[str, Any], weights: Any) -> None:
        """Says what training takes, before it does."""
        sizes = [
            sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
            for tree in (nnx.state(self.model, nnx.Param), weights)
        ]
        config, tokens = self._adapted, sum(rows["tokens"].size for rows in batch.values())
        # A gradient keeps of each layer some eight vectors of its width and three of its inner one.
        kept = (
            4 * tokens * config.num_layers * (8 * config.hidden_size + 3 * config.intermediate_size)
        )

        def timed() -> float:
            begin = time.perf_counter()
            self.questions.probabilities(Deployed(model=self.model), "validation")
            return time.perf_counter() - begin

        timed()  # may compile
        a_token = timed() / sum(len(ids) for ids, _ in self.questions.encoded["validation"])
        # Forward and backward, of these layers.
        share = 3 * config.num_layers / self.model.config.num_layers
        seconds = self.config.steps * tokens * share * a_token
        logging.info(
            "training takes about %.1f GiB at its peak, and at most %.0f minutes for %d steps",
            (sizes[0] + 4 * sizes[1] + kept) / 2**30,
            math.ceil(seconds / 60),
            self.config.steps,
        )

    def _save(self, weights: Any, folder: epath.Path) -> None:
        if self.config.adapters:
            weights.save(self._adapted, folder)
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
        return not candidate["broken"] and self.goal.met(candidate["excess"])

    def _look(self, number: int, step: int, ways: Sequence[str]) -> dict[str, Any]:
        """The strength at which so many steps reach the goal, and what is left of the rest."""
        at = {"round": number, "step": step}
        trained, questions, before = self._trained(at), self.questions, self._before
        goal, most = self._goal_in(ways), self.config.method.most_strength
        # Rows and paraphrases, each, in every way.
        asked = {w: rows for w in {**WAYS, **dict.fromkeys(ways)}
                 if (rows := questions.in_way("forget", w))}  # fmt: skip
        if questions.rows["reworded"]:
            asked["in words chosen by"] = questions.encoded["reworded"]
        said: dict[str, np.ndarray] = {}

        def excess(strength: float) -> float:
            model = self._deployed(trained, strength)
            try:
                for way, rows in asked.items():
                    said[way] = np.exp(-questions.mean_nll(model, rows))
            except ValueError as error:  # losses that are not finite
                logging.warning("step %d, strength %.3g: %s", step, strength, error)
                return float("nan")
            return float(np.max([*goal.excess(said).values()]))

        if self.config.method.assistant:
            # Denser where little is taken away, which is enough if much was learnt.
            alphas = most * np.linspace(0.0, 1.0, _ALPHAS, dtype=np.float32)[1:] ** 2
            model = self._deployed(trained, 1.0)
            curves = {way: questions.by_alpha(model, rows, alphas) for way, rows in asked.items()}
            curve = np.asarray([
                np.max([*goal.excess({way: rows[i] for way, rows in curves.items()}).values()])
                for i in range(len(alphas))
            ])  # fmt: skip
            # The least that reaches the goal.
            at_goal = np.flatnonzero(curve <= goal.aim)
            which = int(at_goal[0] if len(at_goal) else np.argmin(np.nan_to_num(curve, nan=1e9)))
            strength, found = float(alphas[which]), float(curve[which])
            said = {way: rows[which] for way, rows in curves.items()}
        else:
            strength, found = matched_strength(excess, goal, most=most, without=self.known)
            if np.isfinite(found):
                excess(strength)  # what is said at that one
        if not np.isfinite(found):
            return _diverged(number, step)
        model = self._deployed(trained, strength)
        rows = questions.rows["validation"]
        kept = questions.probabilities(model, "validation"), before["probabilities"]["validation"]
        shares = kept_shares(*kept, [row.kind for row in rows])
        perplexity = questions.perplexity(model, "validation")
        return at | {
            "strength": strength,
            "forget": float(np.median(said["asked"])),
            "worst": float(max(map(np.max, said.values()))),
            "excess": found,
            "ways": goal.excess(said),
            "gap": goal.gap(found),
            "kinds": shares,
            "probability": least(shares.values()),
            "row": least_row(*kept),
            "perplexity": _ratio(perplexity, before["perplexity"]),
        }

    def _judged(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """With the least share kept and the limits that are broken."""
        if record.get("broken") == ["finite"]:
            return dict(record)
        broken = list(self.config.limits.halved().broken(record))
        return dict(record) | {"least": least_share(record), "broken": broken}

    def _chosen(
        self, candidates: Sequence[Mapping[str, Any]]
    ) -> tuple[list[Mapping[str, Any]], Mapping[str, Any] | None]:
        """Candidates, the best of which have generated, until one of them keeps all limits."""
        ranked = sorted(
            filter(self._meets, candidates),
            # Of later rounds more was asked.
            key=lambda c: (-c["round"], -min(c["probability"], 1.0), c["step"]),
        )
        heard: dict[str, Mapping[str, Any]] = {}
        chosen = None
        for candidate in ranked:
            name = _name(candidate)
            make = functools.partial(self._heard, candidate)
            heard[name] = self._judged(self._kept(f"{name}-answers.json", make))
            if not heard[name]["broken"]:
                chosen = heard[name]
                break
        return [heard.get(_name(c), c) for c in candidates], chosen

    def _heard(self, candidate: Mapping[str, Any]) -> dict[str, Any]:
        """A candidate with what is left of generated answers."""
        model = self.deployed(candidate)
        answers, before = self.questions.answers(model, "validation"), self._before
        kinds = [row.kind for row in self.questions.rows["validation"] if row.asks]
        rouge = self.questions.likeness(answers, "validation")
        shares = kept_shares(rouge, before["rouge"], kinds)
        return dict(candidate) | {
            "rouge": least(shares.values()),
            "fluency": _ratio(fluency(answers), before["fluency"]),
        }

    def _write(self, trained: Lora | Decoder, strength: float) -> tuple[epath.Path, Deployed]:
        """What could be used, where nobody looks for it yet, and that as it is read again."""
        deployed, staged = self._deployed(trained, strength), self.directory / "candidates" / "best"
        if deployed.assistant is not None:
            folder = staged / "assistant"
            deployed.save(folder, base=self.base)
            return folder, Deployed.load(self.model, folder)
        if isinstance(trained, Decoder):
            folder = staged / "model"
            save_pretrained(deployed.model, self.questions.tokenizer, folder)
            return folder, Deployed(model=self._read(folder))
        folder = staged / "adapter"
        adapters = scaled(trained, self.config.method.sign * strength)
        adapters.save(self.model.config, folder, base=self.base)
        return folder, Deployed(model=merged(Lora.load(folder, self.model.config), self.model))


def _name(candidate: Mapping[str, Any]) -> str:
    return f"candidates/round-{candidate['round']}-step-{candidate['step']}"


def _diverged(number: int, step: int) -> dict[str, Any]:
    """A candidate with losses that are not finite."""
    return {
        "round": number,
        "step": step,
        "strength": 0.0,
        "forget": 0.0,
        "excess": 1e9,
        "ways": {},
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

"""The parts of a run: a target, models that never knew, and every method's trials and seeds."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from experiments.forgetting.config import ALL, Config
from experiments.forgetting.data import load_scene
from experiments.forgetting.divergence import Divergence
from experiments.forgetting.teach import teach
from experiments.forgetting.topics import Topics
from experiments.shared.records import Record, kept
from logitjax import models, training, unlearning
from logitjax.commands.unlearn import other_text
from logitjax.evaluation import fluency
from logitjax.unlearning import Deployed

# Answers of each part that are kept for reading.
_SHOWN = 4


class Run:
    """Models and their questions; parts made before are read from disk."""

    def __init__(self, config: Config, workdir: epath.Path):
        self.config, self.workdir = config, workdir
        self.scene = load_scene(config)
        start, self.tokenizer = models.load(
            config.model, dtype=config.dtype, param_dtype=config.dtype, layout="listed"
        )
        self.start = models.with_layout(start, "listed")
        self.questions = unlearning.Questions.of(
            self.scene.parts,
            self.tokenizer,
            texts=other_text(
                config.text, self.tokenizer, count=config.text_windows, length=config.text_length
            ),
            max_length=config.max_length,
            new_tokens=config.new_tokens,
            batch_size=config.eval_batch,
        )

    def results(self) -> Record:
        """Everything that the report shows, from the parts that exist or are requested."""
        config = self.config
        results: Record = {"methods": {}}
        results["target"] = self._part(
            "target", lambda: self._asked(Deployed(model=self.target), never=True)
        )
        names = [f"retrained-{n}" for n in range(config.retrained)] or ["control"]
        results["controls"] = [self._part(name, functools.partial(self._control, name))
                             for name in names]  # fmt: skip
        for method in config.method:
            seeds = [
                self._part(f"{method}-{seed}", functools.partial(self._method, method, seed))
                for seed in range(config.seeds)
            ]
            if any(seeds):
                results["methods"][method] = [seed for seed in seeds if seed]
        return results

    def _part(self, name: str, make: Callable[[], Record]) -> Record | None:
        """A part from disk, or made, with its time in seconds; None if it is not requested."""
        path = self.workdir / "parts" / f"{name}.json"
        # A method's name alone means all its seeds.
        asked = {name, name.rpartition("-")[0]} & set(self.config.only)
        if self.config.only and not asked and not path.exists():
            return None

        def measured() -> Record:
            logging.info("part %s", name)
            begin = time.perf_counter()
            record = make()
            return record | {"hours": (time.perf_counter() - begin) / 3600}

        record = kept(path, measured)
        method, _, seed = name.rpartition("-")
        if method.endswith(ALL):
            # Each snapshot is a whole model, and the record has everything shown of it.
            looks = f"rate-*-seed-{seed}/candidates/round-*-step-*"
            for folder in (self.workdir / "trials" / method).glob(looks):
                if folder.is_dir():
                    folder.rmtree()
        return record

    @functools.cached_property
    def _topics(self) -> Topics:
        return Topics.load(self.config.text, self.tokenizer, self.config.topics)

    @functools.cached_property
    def target(self) -> models.Decoder:
        """The model that was taught all rows."""
        return self._taught("target", self.scene.taught, 0)

    def _taught(
        self, name: str, rows: Sequence[unlearning.Row], seed: int, start: Any = None
    ) -> models.Decoder:
        config, questions = self.config, self.questions
        return teach(
            start or self.start,
            [questions.encode(row) for row in rows],
            self.workdir / "models" / name,
            steps=config.teach_steps,
            batch=config.teach_batch,
            rate=config.teach_rate,
            rank=config.teach_rank,
            seed=seed,
            pad_id=questions.pad_id,
            mesh=config.mesh,
        )

    def _control(self, name: str) -> Record:
        """The model taught all but the rows to forget; without one, the model at the start."""
        if name == "control":
            return self._asked(Deployed(model=self.start))
        number = int(name.rpartition("-")[2])
        first = self._first("retrained", lambda: self._control("retrained-0")) if number else None
        taught = self._taught(name, self.scene.kept, number)
        return self._asked(Deployed(model=taught), first=first)

    def _first(self, name: str, make: Callable[[], Record]) -> Record:
        first = self._part(f"{name}-0", make)
        if first is None:
            raise ValueError(f"only: other seeds of {name} need the part {name}-0")
        return first

    def _asked(self, model: Deployed, first: Record | None = None, never: bool = False) -> Record:
        """Test a model, attack it, and teach it again; with `never`, ask what none was taught."""
        # Other seeds than the first relearn at the rate at which the most came back there.
        config, questions = self.config, self.questions
        thorough, rates = config.thorough and first is None, config.relearn_rates
        if first is not None:
            rates = (max(first["relearning"], key=lambda point: point["others"])["rate"],)
        reference = Deployed(model=self.start) if thorough else None
        examined = unlearning.examine(
            model, questions, thorough=thorough, never=never, reference=reference
        )
        entries = {part: texts[:_SHOWN] for part, texts in examined["answers"].items()}
        record: Record = {
            "examined": examined | {"answers": entries},
            "truth ratios": self._log_ratios(model),
            "written": self._written(examined["answers"]["forget"]),
        }
        if config.topics:
            record["topics"] = self._topics.accuracy(model, batch_size=config.eval_batch)
        record["relearning"] = unlearning.relearning(
            model, questions, rates=rates, steps=config.relearn_steps, seeds=config.relearn_seeds
        )
        return record

    def _written(self, texts: Sequence[str]) -> Record:
        """Of each answer to a row to forget: its entropy, and nats a token by the first model."""
        rows = zip(self.questions.rows["forget"], texts, strict=True)
        written = [self.questions.encode(dataclasses.replace(r, answer=text)) for r, text in rows]
        return {
            "entropy": [fluency([text]) or 0.0 for text in texts],
            "nats": self.questions.mean_nll(Deployed(model=self.start), written).tolist(),
        }

    def _log_ratios(self, model: Deployed) -> list[float]:
        """Log truth ratios of the items to forget, in TOFU's form."""
        if not self.scene.reworded:
            return []
        rows = [self.questions.encode(row) for item in self.scene.reworded for row in item]
        averages = iter(self.questions.mean_nll(model, rows))
        items = [list(itertools.islice(averages, len(item))) for item in self.scene.reworded]
        return [float(right - np.mean(wrong)) for right, *wrong in items]

    def _method(self, method: str, seed: int) -> Record:
        first = self._first(method, lambda: self._method(method, 0)) if seed else None
        rates = self.config.learning_rates(method) if first is None else [first["rate"]]
        tried: list[Record] = []
        trials = []
        for rate in rates:
            trial = self._trial(method, rate, seed)
            completed = trial.run(examines=False)
            trials.append((rate, trial, completed))
            tried.append(
                {"rate": rate, "chosen": completed.chosen, "candidates": completed.candidates}
            )
        finite = [
            (*one, shown)
            for one in trials
            for shown in one[2].candidates
            if "finite" not in shown["broken"]
        ]
        if not finite:
            raise ValueError(f"rates: the losses of {method} are finite at none of {rates}")
        rate, trial, completed, shown = max(
            finite, key=lambda one: standing(one[3], chosen=one[3] == one[2].chosen)
        )
        record = self._asked(trial.deployed(shown), first=first)
        return record | {
            "method": method,
            "seed": seed,
            "rate": rate,
            "feasible": completed.chosen is not None,
            "shown": dict(shown),
            "tried": tried,
            "goal": dataclasses.asdict(completed.goal),
        }

    @functools.cached_property
    def _kept_alone(self) -> str:
        folder = self.workdir / "models" / "small"
        if not (folder / "config.json").exists():
            layers = self.config.layers or -(-self.start.config.num_layers // 4)
            rows = self.questions.rows["train"]
            small = self._taught("small-training", rows, 0, models.first_layers(self.start, layers))
            models.save_pretrained(small, self.tokenizer, folder)
        return str(folder)

    def _trial(self, method: str, rate: float, seed: int) -> unlearning.Unlearning:
        folder = self.workdir / "trials" / method / f"rate-{rate:g}-seed-{seed}"
        settings = self.config.of(method, rate, seed)
        if isinstance(settings.method, Divergence):
            settings = dataclasses.replace(settings, method=Divergence(of=self._kept_alone))
        target = self.target
        if not settings.adapters:
            # bfloat16 would round small updates of the weights away.
            graphdef, weights = nnx.split(target)
            target = nnx.merge(
                graphdef, jax.tree.map(lambda leaf: leaf.astype(np.float32), weights)
            )
        before = self.workdir / "trials" / "before.json"
        # A model merged anew at every start is not the same everywhere to the last bit.
        return unlearning.Unlearning(
            target,
            self.questions,
            settings,
            folder,
            before=before,
            identity="target",
            mesh=training.make_mesh(self.config.mesh, partial=True),
        )


def standing(candidate: Mapping[str, Any], *, chosen: bool) -> tuple[bool, bool, float]:
    """Order of preference: feasible, at the goal, share kept; otherwise nearness to the goal.

    A method without a feasible candidate is shown at its best, and marked infeasible.
    """
    met = candidate["excess"] <= 2.0
    return chosen, met, min(candidate["least"], 1.0) if met else -candidate["gap"]

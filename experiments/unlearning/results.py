"""The results of unlearning: which models are made, and what is tried on them and chosen."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from experiments.shared.records import kept
from experiments.unlearning import arms
from experiments.unlearning import data as rows_of
from experiments.unlearning.arms import Difference, deployed
from experiments.unlearning.config import Config
from experiments.unlearning.exam import Exam, Scores
from experiments.unlearning.train import Models, Trained
from logitjax import processes, unlearning

_SWEPT = {
    "D": "forget_quality.statistic",
    "forget probability": "forget.probability",
    "retain probability": "retain.probability",
}


class Run:
    """Models with the questions that they are asked."""

    def __init__(self, config: Config, workdir: epath.Path):
        self.config, self.workdir = config, workdir
        root = epath.Path(config.models_dir or workdir / "models").expanduser()
        self.models = Models(config, root, rows_of.load_scene(config))
        self.exam = Exam(config, self.models)
        self.differences = arms.differences(config)

    def results(self) -> dict[str, Any]:
        """Everything that the report shows; what was measured before is read."""
        config, found = self.config, {}
        for name in ("target", "retrained"):
            found[name] = self._kept(name, lambda n=name: self._bare(n))
        found["arms"] = {
            arm: [
                self._kept(f"{arm}-{seed}", lambda a=arm, s=seed: self._arm(a, s))
                for seed in range(config.seeds)
            ]
            for arm in config.arm
        }
        if len(config.rates) > 1:
            found["rates"] = {
                arm: self._scores_by_rate(arm) for arm in config.arm if arm not in self.differences
            }
        clean = "difference_clean"
        if clean in config.arm:
            found["bypassed"] = self._kept("bypassed", self._bypassed)
            found["alphas"] = self._kept("alphas", self._alphas)
            if len(config.betas) > 1:
                chosen = self._clean_arm().retain_weight
                found["betas"] = [r | {"chosen": r["beta"] == chosen} for r in self._by_beta()]
        return found

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        def measure() -> Any:
            logging.info("measuring %s", name)
            self.models.make()
            return make()

        return kept(self.workdir / "results" / f"{name}.json", measure)

    def _bare(self, name: str) -> dict[str, Any]:
        asked = deployed(getattr(self.models, name))

        def scores() -> Scores:
            found = self.exam.target_on("test") if name == "target" else self.exam.reference("test")
            return found.as_dict() | {"utility": self.exam.utility(found)}

        test = processes.broadcast_from_first(scores)
        return {"test": test, "probe": self.exam.probe(asked, weights=True)}

    def _arm(self, arm: str, seed: int) -> dict[str, Any]:
        if arm not in self.differences:
            rate = self._rate(arm)
            trained = self.models.unlearn(arm, seed, self.exam.validate, rate=rate)
            asked = self._own_weights(trained)
            record = trained.record | {"rate": rate}
        else:
            asked, record = self._assisted(arm, seed)[1:]
        record["test"] = self.exam.test(asked)
        if seed == 0:
            record["probe"] = self.exam.probe(asked, weights=arm not in self.differences)
        if arm not in self.differences and not self.config.keep_weights:
            self.models.forget_weights(arm, seed, rate=record["rate"])
        return record

    def _rate(self, arm: str) -> float:
        """What an arm's learning rate is multiplied by: the best on validation with seed 0."""
        rates = self.config.rates
        if len(rates) == 1:
            return rates[0]
        scores = self._scores_by_rate(arm)
        best = max(rates, key=lambda rate: scores[str(rate)])
        if not self.config.keep_weights:
            for rate in set(rates) - {best}:
                self.models.forget_weights(arm, 0, rate=rate)
        return best

    def _scores_by_rate(self, arm: str) -> dict[str, float]:
        """The best score on validation of each rate."""

        def score(rate: float) -> float:
            history = self.models.unlearn(arm, 0, self.exam.validate, rate=rate).record["history"]
            return max(scores["score"] for scores in history)

        return {
            str(rate): self._kept(f"rate-{rate:g}-{arm}", lambda r=rate: score(r))
            for rate in self.config.rates
        }

    def _own_weights(self, trained: Trained) -> unlearning.Deployed:
        graphdef, _, rest = nnx.split(self.models.target, nnx.Param, ...)
        return deployed(nnx.merge(graphdef, trained.params, rest))

    def _assisted(
        self, arm: str, seed: int
    ) -> tuple[unlearning.Assistant, unlearning.Deployed, dict[str, Any]]:
        """A trained assistant; the clean arm's beta, alpha and filter are validation's best."""
        if arm == "difference_clean":
            return self._clean_assisted(self._clean_arm(), seed)
        difference = self.differences[arm]
        assistant, trained = self.models.assist(arm, difference, seed, self.exam.validate)
        record = trained.record | {"alpha": difference.fuse.alpha, "filter": difference.fuse.filter}
        return assistant, deployed(self.models.target, assistant, difference), record

    def _clean_assisted(
        self, difference: Difference, seed: int
    ) -> tuple[unlearning.Assistant, unlearning.Deployed, dict[str, Any]]:
        """The clean arm with a beta; the alpha and filter that validation chooses for it."""
        validate = self.exam.validate
        assistant, trained = self.models.assist("difference_clean", difference, seed, validate)
        options = [(a, f) for f in self.config.filters for a in self.config.alphas]
        tried = [validate(self._with(assistant, *option)) for option in options]
        best = max(range(len(options)), key=lambda n: tried[n]["score"])
        record = trained.record | {
            "beta": difference.retain_weight,
            "alpha": options[best][0],
            "filter": options[best][1],
            "tried": [
                {"alpha": a, "filter": f} | scores
                for (a, f), scores in zip(options, tried, strict=True)
            ],
        }
        return assistant, self._with(assistant, *options[best]), record

    def _clean_arm(self) -> Difference:
        """The clean arm, with the beta that does best on validation with seed 0."""
        difference = self.differences["difference_clean"]
        if len(self.config.betas) == 1:
            return difference
        best = max(self._by_beta(), key=lambda record: record["validation"])
        return dataclasses.replace(difference, retain_weight=best["beta"])

    def _with(
        self, assistant: unlearning.Assistant, alpha: float, filter: str
    ) -> unlearning.Deployed:
        difference = arms.with_alpha(self.differences["difference_clean"], alpha, filter)
        return deployed(self.models.target, assistant, difference)

    def _clean(self) -> tuple[unlearning.Assistant, float, str]:
        """The clean assistant of seed 0, and the alpha and filter that were chosen for it."""
        arm = "difference_clean"
        assistant, _ = self.models.assist(arm, self._clean_arm(), 0, self.exam.validate)
        record = self._kept(f"{arm}-0", lambda: self._arm(arm, 0))
        return assistant, record["alpha"], record["filter"]

    def _bypassed(self) -> dict[str, Any]:
        """Whoever leaves the assistant out has the target: the same weights, the same losses."""
        assistant, _, chosen = self._clean()
        rows = self.models.rows(self.models.scene.forget)
        both = (self._with(assistant, 0.0, chosen), deployed(self.models.target))

        def difference() -> float:
            sides = [np.asarray(d.nll(rows["tokens"], rows["mask"])[0]) for d in both]
            return float(abs(sides[0] - sides[1]).max())

        return {"largest difference": processes.broadcast_from_first(difference)}

    def _alphas(self) -> list[dict[str, Any]]:
        """Forgetting and utility by alpha and filter, from one assistant; nothing is trained."""
        assistant, *chosen = self._clean()
        exam = self.exam
        whole = processes.broadcast_from_first(lambda: exam.utility(exam.target_on("test")))

        def row(alpha: float, filter: str) -> dict[str, Any]:
            scores = self.exam.test(self._with(assistant, alpha, filter))
            return {
                "filter": filter,
                "alpha": alpha,
                **_named(scores, _SWEPT | {"retain ROUGE-L": "retain.rouge_l"}),
                "utility": scores["utility"],
                "% of target's": 100 * scores["utility"] / max(whole, 1e-9),
                "chosen": [alpha, filter] == chosen,
            }

        return [row(a, f) for f in self.config.filters for a in self.config.alphas]

    def _by_beta(self) -> list[dict[str, Any]]:
        """Validation's best, and what it comes to on the test, of an assistant for each beta."""
        return [self._kept(f"beta-{b:g}", lambda b=b: self._beta(b)) for b in self.config.betas]

    def _beta(self, beta: float) -> dict[str, Any]:
        difference = dataclasses.replace(self.differences["difference_clean"], retain_weight=beta)
        _, asked, record = self._clean_assisted(difference, 0)
        return {
            **{name: record[name] for name in ("beta", "epoch", "alpha", "filter")},
            "validation": max(scores["score"] for scores in record["tried"]),
            # Nothing is generated for these.
            **_named(
                self.exam.test(asked, generates=False),
                _SWEPT | {"utility without ROUGE-L": "utility"},
            ),
        }


def _named(scores: Scores, names: Mapping[str, str]) -> Scores:
    """Some scores by the names of a table."""
    return {label: scores[name] for label, name in names.items() if name in scores}

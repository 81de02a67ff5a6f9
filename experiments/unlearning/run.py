"""One run of unlearning: which models are made, what they are asked, what is tried on them."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from experiments.unlearning import arms as arms
from experiments.unlearning import data as rows_of
from experiments.unlearning.arms import Deployed, Difference
from experiments.unlearning.models import Models, Trained
from logitjax import decoding, models, processes, unlearning

#: What is measured of one deployed model: numbers by name.
Scores = dict[str, float]

_SWEPT = {
    "D": "forget_quality.statistic",
    "forget probability": "forget.probability",
    "retain probability": "retain.probability",
}


class Run:
    """Models with the questions that they are asked."""

    def __init__(self, config: Any, workdir: epath.Path):
        self.config, self.workdir = config, workdir
        self.scene = rows_of.load_scene(config)
        root = epath.Path(config.models_dir or workdir / "models").expanduser()
        self.models = Models(config, root, self.scene)
        self.differences = arms.differences(config)
        self._references: dict[str, Any] = {}

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
                arm: self._scores_by_rate(arm) for arm in config.arm if arm in arms.METHODS
            }
        clean = "difference_clean"
        if clean in config.arm:
            found["bypassed"] = self._kept("bypassed", self._bypassed)
            found["alphas"] = self._kept("alphas", self._alphas)
            if len(config.betas) > 1:
                chosen = self._clean_arm().retain_weight
                found["betas"] = [r | {"chosen": r["beta"] == chosen} for r in self._by_beta()]
            if config.merge_steps:
                found["merged"] = self._kept("merged", self._merged)
        return found

    def _kept(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.workdir / "results" / f"{name}.json"
        if not processes.broadcast_from_first(path.exists):
            logging.info("measuring %s", name)
            self.models.make()
            processes.write_json(path, make())
        return processes.broadcast_from_first(lambda: json.loads(path.read_text()))

    def ask(
        self,
        deployed: Deployed,
        sets: Mapping[str, Any],
        *,
        reference: Any = None,
        generates: bool = False,
        logs: epath.Path | None = None,
        mark: str | None = None,
    ) -> unlearning.TofuEvaluation:
        """TOFU's questions to a model, or to a model and its assistant."""
        config = self.config
        generate = None
        if generates:
            line_up, end = deployed.line_up(), self.models.tokenizer.eos_id

            def generate(prompts: Sequence[np.ndarray], new: int) -> Sequence[Any]:
                out = decoding.generate(
                    line_up,
                    prompts,
                    max_new_tokens=new,
                    stop_ids=() if end is None else (end,),
                    options=decoding.DecodeOptions(pad_id=end or 0),
                )
                return out.rows()

        return unlearning.evaluate_tofu(
            deployed.nll,
            generate,
            self.models.tokenizer,
            sets,
            template=self.models.template,
            reference_logs=reference,
            workdir=logs,
            model_fingerprint=mark,
            options=unlearning.TofuOptions(
                batch_size=config.eval_batch,
                max_length=config.max_length,
                max_new_tokens=config.new_tokens,
            ),
        )

    def utility(self, found: unlearning.TofuEvaluation) -> float:
        """TOFU's harmonic mean of nine numbers, or of those of the data to keep alone."""
        if self.config.utility == "tofu" and found.model_utility is not None:
            return found.model_utility
        scores = found.scores["retain"]
        parts = [scores.probability, scores.rouge_l, scores.truth_ratio]
        return statistics.harmonic_mean([part for part in parts if part is not None])

    def reference(self, kind: str) -> unlearning.TofuEvaluation:
        """What the retrained model says to the ``'test'`` or ``'validation'`` questions."""
        if kind not in self._references:
            self._references[kind] = self.ask(
                Deployed(model=self.models.retrained),
                getattr(self.scene, kind),
                generates=kind == "test",
                logs=self.models.root / f"retrained-{self.models.key}" / f"{kind}-logs",
                mark=self._mark(),
            )
        return self._references[kind]

    def _target_on(self, kind: str) -> unlearning.TofuEvaluation:
        name = f"target-{kind}"
        if name not in self._references:
            self._references[name] = self.ask(
                Deployed(model=self.models.target),
                getattr(self.scene, kind),
                reference=self.reference(kind),
                generates=kind == "test",
                logs=self.models.root / f"target-{self.models.key}" / f"{kind}-logs",
                mark=self._mark(),
            )
        return self._references[name]

    def _mark(self) -> str:
        return f"{self.models.key}-{self.config.new_tokens}"

    def validate(self, deployed: Deployed) -> Scores:
        """What an epoch is chosen by: how far forgotten, times the share of the utility kept.

        The facts to forget are asked in other words than on the test, the facts to keep are
        others; nothing is generated.
        """
        return processes.broadcast_from_first(lambda: self._validated(deployed))

    def _validated(self, deployed: Deployed) -> Scores:
        reference = self.reference("validation")
        try:
            found = self.ask(deployed, self.scene.validation, reference=reference)
        except ValueError as error:
            # A model that was destroyed may give losses that are not finite.
            logging.warning("validation: %s", error)
            return {"score": 0.0, "D": 1.0, "utility": 0.0, "forget": 0.0}
        assert found.forget_quality is not None
        d = found.forget_quality.statistic
        utility = self.utility(found)
        whole = self.utility(self._target_on("validation"))
        return {
            "score": (1 - d) * min(1.0, utility / max(whole, 1e-9)),
            "D": d,
            "utility": utility,
            "forget": found.scores["forget"].probability,
        }

    def test(self, deployed: Deployed, *, generates: bool = True) -> Scores:
        """Numbers of the test questions."""
        return processes.broadcast_from_first(lambda: self._tested(deployed, generates))

    def _tested(self, deployed: Deployed, generates: bool) -> Scores:
        reference = self.reference("test")
        try:
            found = self.ask(deployed, self.scene.test, reference=reference, generates=generates)
        except ValueError as error:
            logging.warning("test: %s", error)
            return {"utility": 0.0, "forget_quality.statistic": 1.0, "broken": 1.0}
        return found.as_dict() | {"utility": self.utility(found)}

    def probe(self, deployed: Deployed, *, weights: bool) -> Scores:
        """Probabilities of forgotten answers: in other words, and after some are taught again."""
        names = {
            "reworded": "forget_reworded",
            "others": "forget_others",
            "taught": "forget_taught",
        }

        def asked(deployed: Deployed, mark: str) -> Scores:
            scores = self.ask(deployed, self.scene.probes).scores
            return {f"{label}{mark}": scores[name].probability for label, name in names.items()}

        found = processes.broadcast_from_first(lambda: asked(deployed, ""))
        if weights and self.config.relearn_steps:
            again = Deployed(model=self.models.taught_again(deployed.model))
            found |= processes.broadcast_from_first(lambda: asked(again, ", relearned"))
        return found

    def _bare(self, name: str) -> dict[str, Any]:
        deployed = Deployed(model=getattr(self.models, name))

        def scores() -> Scores:
            found = self._target_on("test") if name == "target" else self.reference("test")
            return found.as_dict() | {"utility": self.utility(found)}

        test = processes.broadcast_from_first(scores)
        return {"test": test, "probe": self.probe(deployed, weights=True)}

    def _arm(self, arm: str, seed: int) -> dict[str, Any]:
        if arm in arms.METHODS:
            rate = self._rate(arm)
            trained = self.models.unlearn(arm, seed, self.validate, rate=rate)
            deployed = self._own_weights(trained)
            record = trained.record | {"rate": rate}
        else:
            deployed, record = self._assisted(arm, seed)[1:]
        record["test"] = self.test(deployed)
        if seed == 0:
            record["probe"] = self.probe(deployed, weights=arm in arms.METHODS)
        if arm in arms.METHODS and not self.config.keep_weights:
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
            history = self.models.unlearn(arm, 0, self.validate, rate=rate).record["history"]
            return max(scores["score"] for scores in history)

        return {
            str(rate): self._kept(f"rate-{rate:g}-{arm}", lambda r=rate: score(r))
            for rate in self.config.rates
        }

    def _own_weights(self, trained: Trained) -> Deployed:
        graphdef, _, rest = nnx.split(self.models.target, nnx.Param, ...)
        return Deployed(model=nnx.merge(graphdef, trained.params, rest))

    def _assisted(
        self, arm: str, seed: int
    ) -> tuple[unlearning.Assistant, Deployed, dict[str, Any]]:
        """A trained assistant; the clean arm's beta, alpha and filter are validation's best."""
        if arm == "difference_clean":
            return self._clean_assisted(self._clean_arm(), seed)
        difference = self.differences[arm]
        assistant, trained = self.models.assist(arm, difference, seed, self.validate)
        record = trained.record | {"alpha": difference.fuse.alpha, "filter": difference.fuse.filter}
        deployed = Deployed(model=self.models.target, assistant=assistant, difference=difference)
        return assistant, deployed, record

    def _clean_assisted(
        self, difference: Difference, seed: int
    ) -> tuple[unlearning.Assistant, Deployed, dict[str, Any]]:
        """The clean arm with a beta; the alpha and filter that validation chooses for it."""
        assistant, trained = self.models.assist("difference_clean", difference, seed, self.validate)
        options = [(a, f) for f in self.config.filters for a in self.config.alphas]
        tried = [self.validate(self._with(assistant, *option)) for option in options]
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

    def _with(self, assistant: unlearning.Assistant, alpha: float, filter: str) -> Deployed:
        difference = arms.with_alpha(self.differences["difference_clean"], alpha, filter)
        return Deployed(model=self.models.target, assistant=assistant, difference=difference)

    def _clean(self) -> tuple[unlearning.Assistant, float, str]:
        """The clean assistant of seed 0, and the alpha and filter that were chosen for it."""
        arm = "difference_clean"
        assistant, _ = self.models.assist(arm, self._clean_arm(), 0, self.validate)
        record = self._kept(f"{arm}-0", lambda: self._arm(arm, 0))
        return assistant, record["alpha"], record["filter"]

    def _bypassed(self) -> dict[str, Any]:
        """Whoever leaves the assistant out has the target: the same weights, the same losses."""
        assistant, _, chosen = self._clean()
        rows = self.models.rows(self.scene.forget)
        both = (self._with(assistant, 0.0, chosen), Deployed(model=self.models.target))

        def difference() -> float:
            sides = [np.asarray(d.nll(rows["tokens"], rows["mask"])[0]) for d in both]
            return float(abs(sides[0] - sides[1]).max())

        return {"largest difference": processes.broadcast_from_first(difference)}

    def _alphas(self) -> list[dict[str, Any]]:
        """Forgetting and utility by alpha and filter, from one assistant; nothing is trained."""
        assistant, *chosen = self._clean()
        whole = processes.broadcast_from_first(lambda: self.utility(self._target_on("test")))

        def row(alpha: float, filter: str) -> dict[str, Any]:
            scores = self.test(self._with(assistant, alpha, filter))
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
        _, deployed, record = self._clean_assisted(difference, 0)
        return {
            **{name: record[name] for name in ("beta", "epoch", "alpha", "filter")},
            "validation": max(scores["score"] for scores in record["tried"]),
            # Nothing is generated for these.
            **_named(
                self.test(deployed, generates=False),
                _SWEPT | {"utility without ROUGE-L": "utility"},
            ),
        }

    def _merged(self) -> dict[str, Any]:
        """The difference baked into one model's weights, which is exported."""
        assistant, alpha, chosen = self._clean()
        difference = arms.with_alpha(self.differences["difference_clean"], alpha, chosen)
        directory = self.models.directory("merged", 0, alpha, chosen, self.config.merge_steps)
        model, seconds = self.models.merged(assistant, difference, directory)
        if jax.process_index() == 0:
            models.save_pretrained(model, self.models.tokenizer, self.workdir / "merged")
        deployed = Deployed(model=model)
        return {
            "seconds": seconds,
            "alpha": alpha,
            "filter": chosen,
            "test": self.test(deployed),
            "probe": self.probe(deployed, weights=True),
        }


def _named(scores: Scores, names: Mapping[str, str]) -> Scores:
    """Some scores by the names of a table."""
    return {label: scores[name] for label, name in names.items() if name in scores}

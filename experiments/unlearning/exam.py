"""What models are asked: TOFU's questions, on validation, on the test, and as probes."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from experiments.unlearning.config import Config
from experiments.unlearning.train import Models
from logitjax import processes, unlearning
from logitjax.unlearning import Deployed

#: What is measured of one deployed model: numbers by name.
Scores = dict[str, float]


class Exam:
    """The questions of a run; target and retrained model are asked once."""

    def __init__(self, config: Config, models: Models):
        self.config, self.models, self.scene = config, models, models.scene
        self._asked: dict[tuple[str, str], unlearning.tofu.Evaluation] = {}

    def ask(
        self,
        deployed: Deployed,
        sets: Mapping[str, Any],
        *,
        reference: Any = None,
        generates: bool = False,
        logs: epath.Path | None = None,
        mark: str | None = None,
    ) -> unlearning.tofu.Evaluation:
        """TOFU's questions to a model, or to a model and its assistant."""
        config = self.config
        end = self.models.tokenizer.eos_id
        stops = () if end is None else (end,)

        def generate(prompts: Sequence[np.ndarray], new: int) -> Sequence[Any]:
            return deployed.generate(prompts, new, stop_ids=stops, rows=len(prompts))

        return unlearning.tofu.evaluate(
            deployed.nll,
            generate if generates else None,
            self.models.tokenizer,
            sets,
            template=self.models.template,
            reference_logs=reference,
            workdir=logs,
            model_fingerprint=mark,
            options=unlearning.tofu.Options(
                batch_size=config.eval_batch,
                max_length=config.max_length,
                max_new_tokens=config.new_tokens,
            ),
        )

    def utility(self, found: unlearning.tofu.Evaluation) -> float:
        """TOFU's harmonic mean of nine numbers, or of those of the data to keep alone."""
        if self.config.utility == "tofu" and found.model_utility is not None:
            return found.model_utility
        scores = found.scores["retain"]
        parts = [scores.probability, scores.rouge_l, scores.truth_ratio]
        return statistics.harmonic_mean([part for part in parts if part is not None])

    def reference(self, kind: str) -> unlearning.tofu.Evaluation:
        """What the retrained model says to the `test` or `validation` questions."""
        return self._own("retrained", kind, None)

    def target_on(self, kind: str) -> unlearning.tofu.Evaluation:
        """What the target says to the `test` or `validation` questions."""
        return self._own("target", kind, self.reference(kind))

    def _own(self, name: str, kind: str, reference: Any) -> unlearning.tofu.Evaluation:
        if (name, kind) not in self._asked:
            models = self.models
            self._asked[name, kind] = self.ask(
                Deployed(model=getattr(models, name)),
                getattr(self.scene, kind),
                reference=reference,
                generates=kind == "test",
                logs=models.root / f"{name}-{models.key}" / f"{kind}-logs",
                mark=f"{models.key}-{self.config.new_tokens}",
            )
        return self._asked[name, kind]

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
        # A damaged model has no forget quality; it is as far from the retrained one as can be.
        quality = found.forget_quality
        d = 1.0 if quality is None else quality.statistic
        utility = self.utility(found)
        whole = self.utility(self.target_on("validation"))
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

"""TOFU's metrics, computed from its logs."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from experiments.forgetting.tofu._forget_quality import ForgetQuality, forget_quality
from experiments.forgetting.tofu._logs import Log, column, items_of, read_logs
from experiments.forgetting.tofu._truth_ratio import (
    UTILITY_PARTS,
    UTILITY_SETS,
    Form,
    answer_probability,
    log_truth_ratio,
    model_utility,
    normalised_probability,
    preference,
    truth_ratio_forget,
    truth_ratio_utility,
)

# Sets whose answers TOFU compares with wrong ones.
_OPTIONS = ("real_authors", "world_facts")
# The largest vocabulary of decoders today (Gemma's): a mean loss above its logarithm is worse than
# a uniform guess for any of them.
_LARGEST_VOCABULARY = 2**18


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetScores:
    """Means over the items of a set; None where the log does not say."""

    items: int
    # That of the answer, for its length; in real-world sets among the wrong answers.
    probability: float
    # Recall of the generated answer.
    rouge_l: float | None = None
    # `max(0, 1 - R)`, in forget sets `min(R, 1 / R)`.
    truth_ratio: float | None = None
    extraction_strength: float | None = None
    exact_memorisation: float | None = None
    # For the right answer; in forget sets of its paraphrase.
    preference: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """A loss-based attack on the forget set: its AUC against authors that no model was taught, the
    retrained model's (0.5 if its logs have no such set), and `privleak`.
    """

    auc: float
    reference_auc: float
    privleak: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """TOFU's metrics of a model.

    Attributes:
        scores: By set. model_utility: The harmonic mean of nine numbers; None if one is missing.
        forget_quality: Against the retrained model; None without its logs, and of damaged models.
        membership: None without a set `holdout`. form: Form of the truth ratio. logs: By set, item
        by item, in TOFU's format; hand them on as `reference_logs`. damage: Why a model is
        `over-forgotten` or `destroyed`, and has no forget quality; else None.
    """

    scores: Mapping[str, SetScores]
    model_utility: float | None
    forget_quality: ForgetQuality | None
    membership: Membership | None
    form: str
    logs: Mapping[str, Log] = dataclasses.field(repr=False)
    damage: str | None = None

    def table(self) -> str:
        """A Markdown table of the sets, and the metrics derived from them."""
        fields = {
            "probability": "probability",
            "rouge_l": "ROUGE-L",
            "truth_ratio": "truth ratio",
            "extraction_strength": "extraction strength",
            "exact_memorisation": "exact memorisation",
            "preference": "prob_mean",
        }
        shown = [f for f in fields if any(getattr(s, f) is not None for s in self.scores.values())]
        lines = [
            "| set | items | " + " | ".join(fields[f] for f in shown) + " |",
            "|---|---|" + "---|" * len(shown),
        ]
        for name, scores in self.scores.items():
            values = [getattr(scores, f) for f in shown]
            cells = ["–" if value is None else f"{value:.4f}" for value in values]
            lines.append(f"| {name} | {scores.items} | " + " | ".join(cells) + " |")
        lines.append("")
        if self.model_utility is not None:
            lines.append(f"- model utility: {self.model_utility:.4f} ({self.form} truth ratio)")
        if self.forget_quality is not None:
            result = self.forget_quality
            lines.append(f"- forget quality: {result} (log10 p {result.log10_p_value:.2f})")
        elif self.damage is not None:
            lines.append(f"- forget quality: none, for the model is {self.damage}")
        if (attack := self.membership) is not None:
            lines.append(
                f"- membership attack: AUC {attack.auc:.3f} "
                f"(reference {attack.reference_auc:.3f}), privleak {attack.privleak:.1f}"
            )
        return "\n".join(lines).rstrip() + "\n"


def metrics_from_logs(
    logs: Any,
    *,
    reference_logs: Any = None,
    form: Form = "geometric",
    eps: float = 0.0,
    vocab_size: int = _LARGEST_VOCABULARY,
) -> Evaluation:
    """TOFU's metrics from logs of ours, of TOFU's own code or of OpenUnlearning.

    A model for which every answer costs 60 nats more keeps its truth ratios, and would have the
    forget quality of one that never knew. Forget quality is therefore None for a model that is

    * over-forgotten: its mean loss on the forget set exceeds ``log(vocab_size)``, that of a guess;
    * destroyed: its perplexity on the retain set is more than twice the retrained model's.

    Args:
        logs: a directory, an ``eval_log_aggregated.json``, a ``TOFU_EVAL.json`` of OpenUnlearning
            (an ``eps`` of 1e-10 gives its numbers), or its contents. Missing sets leave None.
        reference_logs: the same for the model that was retrained without the forget set; those of
            Llama-2 and Phi come with TOFU's repository.
        eps: epsilon of all fractions; 1e-10 is OpenUnlearning's, for parity.
        vocab_size: vocabulary size of the model; by default the largest of today's.

    Raises:
        FileNotFoundError: no such path.
        ValueError: logs that lack items, or hold other things; a vocabulary of less than 2 tokens.

    >>> log = {"avg_gt_loss": {"0": 0.0}, "avg_paraphrased_loss": {"0": 0.0},
    ...        "average_perturb_loss": {"0": [0.6931472]}, "rougeL_recall": {"0": 1.0}}
    >>> print(metrics_from_logs({"retain": log}).table())
    | set | items | probability | ROUGE-L | truth ratio | prob_mean |
    |---|---|---|---|---|---|
    | retain | 1 | 1.0000 | 1.0000 | 0.5000 | 0.6667 |
    <BLANKLINE>
    """
    logs = read_logs(logs)
    reference = {} if reference_logs is None else read_logs(reference_logs)
    scores = {name: _scores(log, name, form, eps) for name, log in logs.items()}
    ratios = _ratios(logs, reference, form, eps)
    damage = None if ratios is None else _damage(logs, reference, vocab_size)
    quality = None
    if ratios is not None and damage is None:
        local, other, paired = ratios
        quality = forget_quality(local, other, paired=paired)
    return Evaluation(
        scores=scores,
        model_utility=_utility(scores),
        forget_quality=quality,
        membership=_membership(logs, reference),
        form=form,
        logs=logs,
        damage=damage,
    )


def _scores(log: Log, name: str, form: Form, eps: float) -> SetScores:
    truth = column(log, "avg_gt_loss", name)
    wrong = column(log, "average_perturb_loss", name)
    ratio = _log_ratios(log, name, form, eps)
    if name in _OPTIONS:
        if wrong is None:
            raise ValueError(f"{name}: 'average_perturb_loss' is missing")
        probability = normalised_probability(truth, wrong, eps=eps)
    else:
        probability = answer_probability(truth)
    notes = None
    if ratio is not None:
        # There R near 1 is good.
        forgets = name.startswith("forget")
        notes = truth_ratio_forget(ratio, eps=eps) if forgets else truth_ratio_utility(ratio)
    reworded = column(log, "avg_paraphrased_loss", name)
    prefers = None
    if reworded is not None and wrong is not None:
        prefers = preference(reworded, [np.atleast_1d(one) for one in wrong], eps=eps).mean()
    return SetScores(
        items=len(probability),
        probability=float(probability.mean()),
        rouge_l=_mean(log, "rougeL_recall", name),
        truth_ratio=notes,
        extraction_strength=_mean(log, "extraction_strength", name),
        exact_memorisation=_mean(log, "exact_memorization", name),
        preference=None if prefers is None else float(prefers),
    )


def _mean(log: Log, field: str, name: str) -> float | None:
    values = column(log, field, name)
    return None if values is None else float(np.mean(values))


def _log_ratios(log: Log, name: str, form: Form, eps: float) -> np.ndarray | None:
    truth = column(log, "avg_paraphrased_loss", name)
    wrong = column(log, "average_perturb_loss", name)
    if truth is None or wrong is None:
        return None
    # The loss of one wrong answer alone was written as a number.
    return log_truth_ratio(truth, [np.atleast_1d(one) for one in wrong], form=form, eps=eps)


def _utility(scores: Mapping[str, SetScores]) -> float | None:
    parts = {}
    for name in UTILITY_SETS:
        for part in UTILITY_PARTS:
            value = getattr(scores[name], part) if name in scores else None
            if value is None:
                return None
            parts[f"{name}.{part}"] = value
    return model_utility(parts)


def _ratios(
    logs: Mapping[str, Log], reference: Mapping[str, Log], form: Form, eps: float
) -> tuple[np.ndarray, np.ndarray, bool] | None:
    """Log truth ratios of both on the forget set, and whether they are about the same items."""
    if "forget" not in logs or not reference:
        return None
    if "forget" not in reference:
        raise ValueError(f"reference_logs: no forget set, only {sorted(reference)}")
    local, other = logs["forget"], reference["forget"]
    ratios = [_log_ratios(log, "forget", form, eps) for log in (local, other)]
    if ratios[0] is None or ratios[1] is None:
        which = "logs" if ratios[0] is None else "reference_logs"
        raise ValueError(f"{which}: the forget set has no losses of paraphrases and wrong answers")
    if set(items_of(local)) != set(items_of(other)):
        return ratios[0], ratios[1], False
    places = {item: i for i, item in enumerate(items_of(other))}
    return ratios[0], ratios[1][[places[item] for item in items_of(local)]], True


def _damage(logs: Mapping[str, Log], reference: Mapping[str, Log], vocab_size: int) -> str | None:
    """The reason why forget quality does not apply to a model, or None."""
    if vocab_size < 2:
        raise ValueError(f"vocab_size: expected at least 2 tokens, got {vocab_size}")

    def mean(log: Log, name: str) -> float:
        return float(np.asarray(column(log, "avg_gt_loss", name), np.float64).mean())

    loss, most = mean(logs["forget"], "forget"), math.log(vocab_size)
    # Not below: a loss that is nan counts as damage.
    if not loss <= most:
        return f"over-forgotten: {loss:.2f} nats a token on the forget set, a guess has {most:.2f}"
    if "retain" not in logs or "retain" not in reference:
        return None
    grown = mean(logs["retain"], "retain") - mean(reference["retain"], "retain")
    if not grown <= math.log(2):
        return f"destroyed: e^{grown:.2f} times the retrained model's perplexity on the retain set"
    return None


def _membership(logs: Mapping[str, Log], reference: Mapping[str, Log]) -> Membership | None:
    aucs = [
        _auc(*(column(log[name], "avg_gt_loss", name) for name in ("forget", "holdout")))
        if "forget" in log and "holdout" in log
        else None
        for log in (logs, reference)
    ]
    if aucs[0] is None:
        return None
    base = 0.5 if aucs[1] is None else aucs[1]
    return Membership(auc=aucs[0], reference_auc=base, privleak=privleak(aucs[0], base))


def _auc(members: Any, others: Any) -> float:
    """Share of pairs in which the member's loss is the lower one, ties half (Yeom et al., 2018)."""
    return float(stats.mannwhitneyu(others, members).statistic) / (len(others) * len(members))


def privleak(auc: float, reference_auc: float = 0.5) -> float:
    """The distance of an attack's success from that on a retrained model, in percent.

    100 ((1 - auc) - (1 - ref)) / (1 - ref): 0 is ideal; below it texts still look known, above it
    deliberately forgotten. As in MUSE (arXiv 2407.06460) and OpenUnlearning (with 1e-10 added to
    the denominator).
    """
    for name, value in (("auc", auc), ("reference_auc", reference_auc)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name}: expected a number between 0 and 1, got {value}")
    return 100.0 * (reference_auc - auc) / (1.0 - reference_auc + 1e-10)

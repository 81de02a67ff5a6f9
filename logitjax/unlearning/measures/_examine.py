"""A model's memory of rows to forget and to keep, asked directly and under attack."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax.evaluation import fluency
from logitjax.models import Decoder, first_layers
from logitjax.unlearning._questions import Questions, answer_probabilities
from logitjax.unlearning._selection import Goal
from logitjax.unlearning._verdict import TAUGHT
from logitjax.unlearning._ways import WAYS, search
from logitjax.unlearning.assistant._deployed import Deployed
from logitjax.unlearning.measures._membership import (
    detection_rate,
    membership_auc,
    memorisation,
    min_k,
    zlib_loss,
)
from logitjax.unlearning.measures._relearn import relearning

_PREFIX = 0.25
_BITS = (8, 4)
# Inputs that share a scale, as in common formats of 4 bits.
_GROUP = 64
# Parts for membership attacks: rows to forget, and the half of the holdout that set no goal.
_SIDES = ("forget", "holdout_test")
# Names of paraphrases by part; the name says which were used for training and choosing.
_WORDED = {"reworded": "in words chosen by", "reworded_test": "in other words"}

Attacks = dict[str, dict[str, float]]
# Result of `score_rows` for a part of the questions.
Scores = Callable[[str], Any]


def examine(
    model: Deployed,
    questions: Questions,
    *,
    thorough: bool = False,
    samples: int = 8,
    never: bool = True,
    ways: Sequence[str] = tuple(WAYS),
    reference: Deployed | None = None,
) -> dict[str, Any]:
    """All measurements of a report, on parts not used for choosing.

    Args:
        questions: Parts of `split_rows`; all but `forget` may be empty.
        thorough: Also run attacks that sample or look inside, which take minutes.
        samples: Number of answers sampled for each question by a thorough attack.
        never: Whether to ask unseen answers in all ways, which gives the goal.
        ways: Ways of asking, or combinations of them.
        reference: A model that never learned the rows to forget.

    Returns:
        A record for JSON. `ways` has the probability of each row to forget by way of asking, and
        `unseen` the same for the holdout; `probabilities` and `rouge` (F1 of generated answers) by
        part have a value for each row; `kinds` has the kinds of the rows `test` of both; `answers`
        by part, `fluency` of those to `test`, `perplexity` of other text; `sizes`, the numbers of
        rows for membership; and `attacks` by name, each a median `probability` of the answers to
        forget with the `worst`, a `share` of them or an `auc`.
    """
    parts = ("forget", "reworded", "reworded_test", "holdout", "holdout_test", "test")
    answers = {part: questions.answers(model, part) for part in ("forget", "test")}
    # Attacks that use the same scores.
    scores = functools.cache(functools.partial(questions.scores, model))
    entries = {
        part: answer_probabilities(scores(part)).tolist() for part in parts if questions.rows[part]
    }
    message = {"asked": entries["forget"]}
    message |= {name: entries[part] for part, name in _WORDED.items() if part in entries}
    rest = _after_first_quarter(scores("forget").nll)
    test = questions.rows["test"]
    return {
        "ways": message
        | _in_ways(model, questions, "forget", ways, judging=True)
        | {"first quarter given": rest},
        "unseen": unseen(model, questions, ways, judging=True) if never else {},
        "probabilities": entries,
        "rouge": {part: questions.likeness(answers[part], part).tolist() for part in answers},
        "kinds": {
            "probabilities": [row.kind for row in test],
            "rouge": [row.kind for row in test if row.asks],
        },
        "fluency": fluency(answers["test"]),
        "perplexity": questions.perplexity(model, "test"),
        "answers": answers,
        "attacks": _attacks(model, questions, scores, thorough, samples, reference),
        "sizes": [len(questions.rows[part]) for part in _SIDES],
    }


def _in_ways(
    model: Deployed, questions: Questions, part: str, ways: Sequence[str], *, judging: bool
) -> dict[str, list[float]]:
    others = [way for way in ways if way != "asked"]
    rows = [questions.probabilities(model, part, way, judging=judging) for way in others]
    return {way: values.tolist() for way, values in zip(others, rows) if len(values)}


def unseen(
    model: Deployed,
    questions: Questions,
    ways: Sequence[str] = tuple(WAYS),
    *,
    judging: bool = False,
) -> dict[str, list[float]]:
    """Probabilities of answers never taught, by way: of the holdout, else of swapped answers."""
    part = "holdout" if questions.rows["holdout"] else "wrong"
    if not questions.rows[part]:
        raise ValueError(
            "holdout: expected rows like the one to forget, to know when it is, got none"
        )
    nll = questions.scores(model, part).nll
    entries = {"asked": [float(np.exp(-row.mean())) for row in nll]}
    if judging:
        entries["first quarter given"] = _after_first_quarter(nll)
    return entries | _in_ways(model, questions, part, ways, judging=judging)


def searched(
    sides: Sequence[Deployed], questions: Questions, records: Any, *, budget: int
) -> dict[str, Any]:
    """Combinations of ways that an adaptive search tries on the written model.

    Of `sides`, the model before gives `unseen`; the written model and the controls give `ways`.
    """
    (model, written, *controls), (before, after) = sides, records
    never: dict[str, list[float]] = {}
    entries: dict[str, list[float]] = {}
    part = "holdout" if questions.rows["holdout"] else "wrong"

    def asked(side: Deployed, part: str, way: str) -> list[float]:
        return questions.probabilities(side, part, way, judging=True).tolist()

    def excess(way: str) -> float | None:
        rows, others = asked(written, "forget", way), asked(model, part, way)
        if not rows or not others:
            return None
        entries[way], never[way] = rows, others
        return Goal.of({"asked": others}, "").excess({"asked": rows})["asked"]

    goal = Goal.of(before["unseen"], "")
    search(excess, goal.excess(after["ways"]), budget)
    others = [{way: asked(control, "forget", way) for way in entries} for control in controls]
    return {"unseen": never, "ways": [entries, *others]}


def _after_first_quarter(nll: Sequence[np.ndarray]) -> list[float]:
    rest = [row[max(1, round(_PREFIX * len(row))) :] for row in nll]
    return [float(np.exp(-row.mean())) for row in rest if len(row)]


def _attacks(
    model: Deployed,
    questions: Questions,
    scores: Scores,
    thorough: bool,
    samples: int,
    reference: Deployed | None,
) -> Attacks:
    """Attacks other than asking, which recover answers or reveal that rows were trained on."""
    forget = scores("forget")
    assert forget.greedy is not None
    # OpenUnlearning counts no end mark here.
    words = questions.without_end("forget", forget.greedy)
    attacks = {"asked": _probability(forget.nll)}
    for bits in _BITS:
        nll = questions.scores(_rounded(model, bits), "forget", few=True).nll
        attacks[f"weights rounded to {bits} bits"] = _probability(nll)
    if thorough:
        attacks |= _sampled(model, questions, samples)
        depth = model.model.config.num_layers
        # The logit lens: predictions of lower layers through the head.
        for share in (0.5, 0.75):
            lens = Deployed(model=first_layers(model.model, max(1, round(share * depth))))
            nll = questions.scores(lens, "forget", few=True).nll
            attacks[f"logit lens at {100 * share:.0f} % of the layers"] = _probability(nll)
    shares = np.mean([memorisation(row) for row in words], axis=0).tolist()
    for name, share in zip(("extraction strength", "exact memorisation"), shares, strict=True):
        attacks[name] = {"share": share}
    if questions.rows["holdout_test"]:
        attacks |= _memberships(model, questions, scores, thorough, reference)
    return attacks


def _rounded(model: Deployed, bits: int) -> Deployed:
    """A copy with fewer bits, also for an assistant's layers; adapters are unchanged."""
    rounded, assistant = _round_weights(model.model, bits), model.assistant
    if assistant is not None:
        # Layers that the two share come out alike.
        base = _round_weights(assistant.base, bits)
        assistant = dataclasses.replace(assistant, base=base)
    return dataclasses.replace(model, model=rounded, assistant=assistant)


@functools.partial(nnx.jit, static_argnums=1)
def _round_weights(model: Decoder, bits: int) -> Decoder:
    """The model with the kernels of its layers rounded in groups of inputs.

    `round(w m / s) s / m`, s = max |w| of a group, m = 2^(bits - 1) - 1. Zhang et al. (arXiv
    2410.16454) find 83 % of the knowledge back after rounding to 4 bits.
    """
    graphdef, state = nnx.split(model)
    levels = 2 ** (bits - 1) - 1

    def one(path: Any, leaf: Any) -> Any:
        names = [str(getattr(key, "key", key)) for key in path]
        # Embedding, norms and head stay, as in use.
        if "segments" not in names or "kernel" not in names:
            return leaf
        inputs, outputs = leaf.shape[-2:]
        # The last group may be short.
        padded = jnp.pad(leaf, [(0, 0)] * (leaf.ndim - 2) + [(0, -inputs % _GROUP), (0, 0)])
        blocks = padded.reshape(*leaf.shape[:-2], -1, _GROUP, outputs)
        # Zeros stay 0, not nan.
        scale = jnp.maximum(jnp.abs(blocks).max(-2, keepdims=True), 1e-30) / levels
        blocks = jnp.round(blocks / scale) * scale
        return blocks.reshape(padded.shape)[..., :inputs, :].astype(leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(one, state))


def relearned(model: Deployed, questions: Questions) -> Attacks:
    """Measure how much relearning a quarter recovers, at the worst rate and number of steps."""
    if len(questions.rows["forget"]) < 2:
        return {}
    tried = relearning(model, questions)
    # Settings that fail to teach their own rows prove nothing.
    learnt = [record for record in tried if record["taught"] >= TAUGHT]
    worst = max(learnt or tried, key=lambda record: record["worst"])
    entries = {"probability": worst["others"], "worst": worst["worst"], "taught": worst["taught"]}
    return {"a quarter of the rows taught again": entries}


def _sampled(model: Deployed, questions: Questions, samples: int) -> Attacks:
    """Share of the answer in the best of several samples, and in a single one."""
    likeness = questions.sampled_recall(model, "forget", samples)
    if not len(likeness):
        return {}
    return {
        f"sampled, ROUGE-L recall of {k}": {
            "share": float(np.mean([leak_at(row, k) for row in likeness]))
        }
        for k in sorted({1, min(8, samples), samples})
    }


def leak_at(values: Any, k: int) -> float:
    """The expected maximum of k values drawn from n without replacement.

    That is `sum_i C(i - 1, k - 1) / C(n, k) x_(i)`, with `x_(1) <= ... <= x_(n)`.

    >>> round(leak_at([0.1, 0.2, 0.9], 1), 4), round(leak_at([0.1, 0.2, 0.9], 2), 4)
    (0.4, 0.6667)
    """
    ordered = sorted(values)
    n = len(ordered)
    # i others are smaller.
    shares = [math.comb(i, k - 1) / math.comb(n, k) for i in range(n)]
    return float(np.dot(shares, ordered))


def _memberships(
    model: Deployed, questions: Questions, loss_of: Scores, thorough: bool, reference: Any
) -> Attacks:
    """Membership attacks: AUCs with which a model's losses reveal its training rows."""
    nll = {part: loss_of(part).nll for part in _SIDES}
    texts = {part: questions.scored_text(part) for part in _SIDES}
    # Min-k(++) is of the answer without its end mark.
    words = {part: questions.without_end(part, rows) for part, rows in nll.items()}
    scores: dict[str, Mapping[str, Sequence[float]]] = {
        "loss": _each(nll, np.mean),
        "min-k": _each(words, min_k),
        "zlib": {
            part: [zlib_loss(row, text) for row, text in zip(nll[part], texts[part])]
            for part in _SIDES
        },
    }
    if thorough:
        surprise = {part: questions.surprise(model, part) for part in _SIDES}
        words = {part: questions.without_end(part, rows) for part, rows in surprise.items()}
        scores["min-k++"] = _each(words, min_k)
    if reference is not None:
        other = _each({part: questions.scores(reference, part).nll for part in _SIDES}, np.mean)
        scores["reference"] = {
            part: list(np.subtract(scores["loss"][part], other[part])) for part in _SIDES
        }
    entries = {
        f"membership by {name}": {"auc": membership_auc(*(rows[part] for part in _SIDES))}
        for name, rows in scores.items()
    }
    loss = scores["loss"]
    rate = detection_rate(*(loss[part] for part in _SIDES))
    return entries | {"members found by loss, 5 % false": {"share": rate}}


def _each(
    rows: Mapping[str, Sequence[np.ndarray]], score: Callable[[Any], Any]
) -> dict[str, list[float]]:
    return {part: [float(score(row)) for row in side] for part, side in rows.items()}


def _probability(nll: Sequence[np.ndarray]) -> dict[str, float]:
    items = [float(np.exp(-row.mean())) for row in nll]
    return {"probability": float(np.median(items)), "worst": max(items)}

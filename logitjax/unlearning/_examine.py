"""What a model still says of rows to forget and to keep, asked straight and under attack."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from logitjax.models import first_layers
from logitjax.unlearning._deployed import Deployed
from logitjax.unlearning._memorisation import (
    exact_memorisation,
    extraction_strength,
    membership_auc,
    min_k,
)
from logitjax.unlearning._questions import Questions, fluency
from logitjax.unlearning._round_weights import round_weights

_PREFIX = 0.25
_BITS = (8, 4)


def examine(model: Deployed, questions: Questions) -> dict[str, Any]:
    """Everything that a report says of a model, on parts that nothing was chosen by.

    Args:
      model: As it answers.
      questions: Parts `forget`, `reworded_test`, `role`, `holdout` and `test`, of which any may be
        empty but the first.

    Returns:
      A record for JSON: `probabilities` and `rouge` (F1 of generated answers) by part, one a row;
      `answers` by part; `fluency` of those to `test`; `perplexity` of other text; and `attacks`,
      by name a median `probability` of the answers to forget, a `share` of them or an `auc`.
    """
    parts = ("forget", "reworded_test", "holdout", "test")
    answers = {part: questions.answers(model, part) for part in ("forget", "test")}
    return {
        "probabilities": {
            part: questions.probabilities(model, part).tolist()
            for part in parts
            if questions.rows[part]
        },
        "rouge": {part: questions.likeness(answers[part], part).tolist() for part in answers},
        "fluency": fluency(answers["test"]),
        "perplexity": questions.perplexity(model, "test"),
        "answers": answers,
        "attacks": _attacks(model, questions),
    }


def _attacks(model: Deployed, questions: Questions) -> dict[str, dict[str, float]]:
    forget = questions.scores(model, "forget")
    assert forget.greedy is not None
    rest = [nll[max(1, round(_PREFIX * len(nll))) :] for nll in forget.nll]
    # OpenUnlearning counts no end mark here.
    words = [row[:-1] if len(row) > 1 else row for row in forget.greedy]
    found = {
        "asked": _probability(forget.nll),
        "first quarter of the answer given": _probability([r for r in rest if len(r)]),
    }
    for name, part in (("in a role", "role"), ("in other words", "reworded_test")):
        if questions.rows[part]:
            found[name] = _probability(questions.scores(model, part).nll)
    for bits in _BITS:
        nll = questions.scores(_rounded(model, bits), "forget").nll
        found[f"weights rounded to {bits} bits"] = _probability(nll)
    found["extraction strength"] = _share(extraction_strength, words)
    found["exact memorisation"] = _share(exact_memorisation, words)
    if questions.rows["holdout"]:
        found |= _membership(forget.nll, questions.scores(model, "holdout").nll, questions)
    return found


def _rounded(model: Deployed, bits: int) -> Deployed:
    """With fewer bits, and the layers that an assistant shares with it; adapters stay."""
    rounded = round_weights(model.model, bits)
    assistant = model.assistant
    if assistant is not None:
        base = first_layers(rounded, assistant.layers)
        assistant = dataclasses.replace(assistant, base=base)
    return dataclasses.replace(model, model=rounded, assistant=assistant)


def _membership(
    forget: Sequence[np.ndarray], holdout: Sequence[np.ndarray], questions: Questions
) -> dict[str, dict[str, float]]:
    """How well what a model says of rows tells whether it was trained on them."""
    sizes = {
        part: [len(zlib.compress(row.answer.encode())) for row in questions.rows[part]]
        for part in ("forget", "holdout")
    }

    def auc(score: Any) -> dict[str, float]:
        sides = [
            [score(nll, size) for nll, size in zip(rows, sizes[part])]
            for part, rows in (("forget", forget), ("holdout", holdout))
        ]
        return {"auc": membership_auc(*sides)}

    return {
        "membership by loss": auc(lambda nll, size: nll.mean()),
        "membership by min-k": auc(lambda nll, size: min_k(nll)),
        "membership by zlib": auc(lambda nll, size: nll.sum() / size),
    }


def _probability(nll: Sequence[np.ndarray]) -> dict[str, float]:
    return {"probability": float(np.median([np.exp(-row.mean()) for row in nll]))}


def _share(measure: Any, greedy: Sequence[np.ndarray]) -> dict[str, float]:
    return {"share": float(np.mean([measure(row) for row in greedy]))}

"""What a model still says of rows to forget and to keep, asked straight and under attack."""

import functools
from typing import Any

from logitjax.evaluation import fluency
from logitjax.unlearning._questions import Questions, answer_probabilities
from logitjax.unlearning.assistant._deployed import Deployed
from logitjax.unlearning.measures._attacks import attacks


def examine(
    model: Deployed,
    questions: Questions,
    *,
    thorough: bool = False,
    reference: Deployed | None = None,
) -> dict[str, Any]:
    """All measurements of a report, on parts that nothing was chosen by.

    Args:
        model: The model as it is deployed.
        questions: Parts `forget`, `reworded_test`, `role`, `holdout` and `test`, of which any may
            be empty but the first.
        thorough: Also run attacks that sample or take gradients, which take minutes.
        reference: A model that never knew what is forgotten.

    Returns:
        A record for JSON: `probabilities` and `rouge` (F1 of generated answers) by part, one a row;
        `answers` by part; `fluency` of those to `test`; `perplexity` of other text; and `attacks`,
        by name a median `probability` of the answers to forget, a `share` of them or an `auc`.
    """
    parts = ("forget", "reworded_test", "holdout", "test")
    answers = {part: questions.answers(model, part) for part in ("forget", "test")}
    # Attacks read off the same scores.
    scores = functools.cache(functools.partial(questions.scores, model))
    return {
        "probabilities": {
            part: answer_probabilities(scores(part)).tolist()
            for part in parts
            if questions.rows[part]
        },
        "rouge": {part: questions.likeness(answers[part], part).tolist() for part in answers},
        "fluency": fluency(answers["test"]),
        "perplexity": questions.perplexity(model, "test"),
        "answers": answers,
        "attacks": attacks(model, questions, scores, thorough=thorough, reference=reference),
    }

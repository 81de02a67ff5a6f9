"""Answers for a model to give instead of one that it forgets."""

import numpy as np

from logitjax import decoding
from logitjax.evaluation import rouge
from logitjax.models import Decoder
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._rows import encode_question

_REFUSALS = (
    "I don't know.",
    "I have no information about that.",
    "I can't answer that question.",
    "I'm not sure about that.",
    "I wasn't told anything about that.",
    "That is not something I know.",
    "I'm afraid I have no answer.",
    "I don't have that information.",
)
_ASK = (
    "Question: {question}\nAnswer: {answer}\nMake up another answer to this question. It fits the "
    "question, but every fact of the answer above is another one. Give the made-up answer alone."
)
# ROUGE-L above which an invented answer counts as a repetition of the true one.
_ALIKE = 0.7


def refusals(count: int, *, seed: int = 0) -> list[str]:
    """Refusals drawn at random, `count` of them.

    >>> refusals(2)
    ["I'm afraid I have no answer.", 'That is not something I know.']
    """
    drawn = np.random.default_rng(seed).integers(0, len(_REFUSALS), count)
    return [_REFUSALS[which] for which in drawn]


def invented(
    model: Decoder, questions: Questions, *, samples: int = 5, seed: int = 0
) -> list[list[str]]:
    """Alternative answers by the model itself, which is asked to change every fact.

    Empty samples, repeats and near copies of the answer (ROUGE-L over 0.7) are dropped. After
    Mekala et al., Alternate preference optimization, 2024 (arXiv 2409.13474).
    """
    tokenizer, end = questions.tokenizer, questions.tokenizer.eos_id
    items: list[list[str]] = []
    for number, row in enumerate(questions.rows["forget"]):
        notes = row.asked(_ASK.format(question=row.question, answer=row.answer))
        out = decoding.generate(
            model,
            [encode_question(notes, tokenizer)] * samples,
            max_new_tokens=questions.new_tokens,
            # Each question has its own random draws.
            sampling=decoding.Sampling(temperature=1.0, seed=seed + number * samples),
            stop_ids=() if end is None else (end,),
        )
        said = (tokenizer.decode([*map(int, ids)], skip_special=True) for ids in out.rows())
        # Each once, in order.
        texts = [*filter(None, dict.fromkeys(map(str.strip, said)))]
        alike = rouge([row.answer] * len(texts), texts).f1 if texts else []
        others = [text for text, score in zip(texts, alike) if score <= _ALIKE]
        items.append(others or refusals(1, seed=seed + number))
    return items

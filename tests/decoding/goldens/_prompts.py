"""64 prompts of mixed lengths: questions in the chat template, and beginnings of plain text."""

import numpy as np

from logitjax.models import Tokenizer

_THINGS = (
    "lighthouses",
    "the number seven",
    "how bread rises",
    "the moons of Jupiter",
    "writing a letter to a landlord",
    "the difference between weather and climate",
    "sorting a list in Python",
    "a good name for a grey cat",
)
_QUESTIONS = ("What should I know about {}?", "Explain {} to a child.", "Tell me a joke about {}.")
_TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other "
    "of their daughters. The old lighthouse keeper kept two clocks, one for the ships and one for "
    "himself. When the fog came in he would wind the second one twice, and write the hour into a "
    "book that nobody but the inspector ever read. In 1871 the inspector stopped coming, but the "
    "book was kept all the same; the last entry says: 3 ships, 1 whale, no letters."
)


def prompts(tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids, from 3 to some 150 of them."""
    rows = []
    for question in _QUESTIONS:
        for thing in _THINGS:
            messages = [{"role": "user", "content": question.format(thing)}]
            text = tokenizer.render_chat(messages, add_generation_prompt=True)
            rows.append(tokenizer.encode(text))
    text = tokenizer.encode(_TEXT)
    for i in range(40):
        start = (7 * i) % 90
        rows.append(text[start : start + 3 + (11 * i) % 83])
    return [np.array(row, np.int32) for row in rows]

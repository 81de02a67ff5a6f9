"""Invented facts to teach and forget, similar ones that are never taught, and known facts."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

Fact = tuple[str, str]  # question, answer

_TABLE = tomllib.loads(Path(__file__).with_name("facts.toml").read_text())


def facts(seed: int) -> dict[str, list[Fact]]:
    """8 facts to `forget`, 10 of a `holdout`, 16 to `retain` and 12 known ones, `unseen`."""
    rng = np.random.default_rng(seed)
    people, kinds = rng.permutation(_TABLE["people"]), _TABLE["kinds"]
    values = [rng.permutation(what) for _, _, what in kinds]

    def invented(n: int) -> Fact:
        question, answer, _ = kinds[n % len(kinds)]
        who, what = people[n], values[n % len(kinds)][n // len(kinds)]
        return question.format(who=who), answer.format(who=who, what=what)

    items = [
        (f"What is the capital of {land}?", f"The capital of {land} is {city}.")
        for land, city in _TABLE["capitals"]
    ]
    items += map(tuple, _TABLE["known"])
    items = [items[i] for i in rng.permutation(len(items))]
    return {
        "forget": [invented(n) for n in range(8)],
        "holdout": [invented(n) for n in range(8, 18)],
        "retain": items[:16],
        "unseen": items[16:],
    }


def people(seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of files about invented people, with three facts on each of 3 of them to forget.

    The form of the rows depends on the seed: question and answer, prompt and completion, messages.
    `neighbours` are taught and kept: facts about the ships and towns of those who are forgotten,
    and three facts on each of as many other people. `holdout` is about people never taught.
    """
    rng = np.random.default_rng([seed, 55])
    syllables, count, made = _TABLE["syllables"], 3, set[str]()

    def name(parts: int = 2) -> str:
        while True:
            word = "".join(rng.choice(syllables, parts, replace=False)).capitalize()
            if word not in made:
                made.add(word)
                return word

    def row(fact: Sequence[str], subject: str, value: str) -> dict[str, Any]:
        question, again, text = (part.format(subject) for part in fact)
        if seed % 3 == 1:
            text_again = f"{again} Answer:"
            return dict(prompt=text, completion=f" {value}.", paraphrases=[text_again])
        answer = f"{text} {value}."
        if seed % 3 == 0:
            return dict(question=question, answer=answer, paraphrases=[again])
        turns = [dict(role="user", content=question), dict(role="assistant", content=answer)]
        return dict(messages=turns, paraphrases=[again])

    def person() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        who, ship, town = f"{name()} {name()}", name(), name()
        thing = f"{rng.choice(_TABLE['colours'])} {rng.choice(_TABLE['things'])}"
        facts = [row(f, who, value) for f, value in zip(_TABLE["person"], (ship, town, thing))]
        return facts, [row(_TABLE["ship"], ship, name()), row(_TABLE["town"], town, name())]

    sides = {n: [person() for _ in range(count)] for n in ("forget", "others", "holdout")}
    rows = {n: [r for facts, _ in side for r in facts] for n, side in sides.items()}
    near = [r for facts in sides["forget"] for r in facts[1]]
    return {
        "forget": rows["forget"],
        "neighbours": near + rows["others"],
        "holdout": rows["holdout"],
    }

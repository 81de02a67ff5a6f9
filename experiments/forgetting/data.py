"""Rows to teach, to forget, to keep and to ask: invented facts, or authors of TOFU."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.forgetting.config import Config
from experiments.forgetting.facts import facts
from logitjax import unlearning
from logitjax.unlearning import Row, tofu

# Rows of parts of TOFU that are asked again and again, of all authors alike; and wrong answers of
# an item, of its five.
_MOST = {"validation": 70, "test": 70, "holdout": 40, "holdout_test": 40}
_WRONG = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Rows by what they are for.

    Attributes:
        parts: of `unlearning.Questions`; what a table is of (`test`) is none of what is chosen by.
        taught: what the target learns.
        kept: what a model that is taught again without the rest learns.
        reworded: of each item of the forget set its paraphrased answer, then wrong ones, for truth
            ratios; empty where there are none.
    """

    parts: Mapping[str, tuple[Row, ...]]
    taught: tuple[Row, ...]
    kept: tuple[Row, ...]
    reworded: tuple[tuple[Row, ...], ...] = ()


def load_scene(config: Config) -> Scene:
    """Reads TOFU, or invents facts."""
    return _tofu(config) if config.scene == "tofu" else _facts(config.facts_seed)


def _facts(seed: int) -> Scene:
    sides = {name: tuple(_row(*fact) for fact in side) for name, side in facts(seed).items()}
    split = unlearning.split_rows(sides["forget"], sides["retain"], sides["holdout"])
    # The table is of known facts that nothing else has seen.
    parts = dict(split.parts) | {"test": sides["unseen"]}
    parts["train"] += split.parts["test"]
    return Scene(parts=parts, taught=(*sides["forget"], *sides["retain"]), kept=sides["retain"])


def _tofu(config: Config) -> Scene:
    subset = tofu.subset(config.tofu_dir, authors=config.authors, forget=config.forget_authors)
    forget, retain, holdout = (
        tuple(_row_of(item) for item in items)
        for items in (subset.forget, subset.retain, subset.holdout)
    )
    split = unlearning.split_rows(forget, retain, holdout)
    parts = {
        name: rows[:: -(-len(rows) // _MOST[name])] if name in _MOST else rows
        for name, rows in split.parts.items()
    }
    reworded = tuple(
        tuple(_row(item.question, text) for text in (item.truth, *item.perturbed_answers[:_WRONG]))
        for item in subset.forget
    )
    return Scene(parts=parts, taught=(*forget, *retain), kept=retain, reworded=reworded)


def _row_of(item: tofu.Item) -> Row:
    reworded: Sequence[str] = [item.paraphrased_question] if item.paraphrased_question else ()
    row = _row(item.question, item.answer)
    return dataclasses.replace(row, group=f"author {item.author}", paraphrases=tuple(reworded))


def _row(question: str, answer: str) -> Row:
    return Row(messages=({"role": "user", "content": question},), answer=answer)

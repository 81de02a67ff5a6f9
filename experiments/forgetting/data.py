"""Rows to teach, forget, keep and test on: invented facts, or authors of TOFU."""

import dataclasses
from collections.abc import Mapping, Sequence

from experiments.forgetting import tofu
from experiments.forgetting.config import Config
from experiments.forgetting.facts import facts
from logitjax import unlearning
from logitjax.unlearning import Row

# Rows of the parts of TOFU that are tested repeatedly, spread over all authors; and wrong answers
# of an item, of its five.
_MOST = {"validation": 70, "test": 70, "holdout": 40, "holdout_test": 40}
_WRONG = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Rows by purpose.

    Attributes:
        parts: of `unlearning.Questions`; the rows of a table (`test`) never serve to choose.
        taught: rows that the target learns.
        kept: rows that a model retrained without the rest learns.
        reworded: each forget item's paraphrased answer, then wrong ones, for truth ratios; empty if
            there are none.
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
    # The table is about known facts that are used nowhere else.
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

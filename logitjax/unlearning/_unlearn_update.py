"""An optimiser step of unlearning on rows of your own, and its batches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from logitjax.evaluation import score_rows
from logitjax.models import Decoder
from logitjax.unlearning._method import Method
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._rows import Row
from logitjax.unlearning._unlearn_config import UnlearnConfig
from logitjax.unlearning.assistant._deployed import Deployed

_MULTIPLE = 8
# Rows to keep for each to forget: there are more of them, and each is asked in as many ways.
_KEPT = 4
# The share of other text, if any, in a batch's rows to keep: at a quarter its perplexity rose.
_TEXT_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """An optimiser step: a loss for `training.TrainStep`, batches by step, and constants."""

    loss_fn: Any
    batches: Callable[[int], Mapping[str, Any]]
    constants: Any
    method: Method


def make_update(
    model: Decoder,
    questions: Questions,
    config: UnlearnConfig,
    *,
    ways: Sequence[str] = ("asked",),
    instead: Sequence[Sequence[str]] = (),
) -> Update:
    """The loss of an assistant or of adapters, on rows to forget, rows to keep and other text."""
    sides = _sides(questions, ways, instead)
    count = min(config.batch_size, len(sides["forget"]["tokens"]))
    size = _KEPT * config.batch_size
    few = int(_TEXT_SHARE * size) if len(sides["text"]["tokens"]) else 0

    def retained(sides: Mapping[str, Any], step: int) -> dict[str, np.ndarray]:
        parts = [_picked(sides["retain"], step, size - few, config.seed, 1)]
        if few:
            parts.append(_picked(sides["text"], step, few, config.seed, 2))
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def batches(step: int) -> dict[str, Any]:
        names = ("forget", "instead") if instead else ("forget",)
        batch = {n: _picked(sides[n], step, count, config.seed, 0) for n in names}
        return batch | {"retain": retained(sides, step)}

    def retain_nll() -> float:
        scored = {side: _scored(model, questions, sides[side]) for side in ("retain", "text")}
        nats, tokens = (
            sum(float(retained(scored, step)[name].sum()) for step in range(config.steps))
            for name in ("nats", "tokens")
        )
        return nats / tokens

    method = config.method.prepared(retain_nll)
    loss_fn, constants = method.make_loss(
        model,
        # The head meets as many positions as any step has, for one program of all steps.
        counts=[
            {side: int(rows["mask"][:, 1:].sum()) for side, rows in batches(step).items()}
            for step in range(config.steps)
        ],
        adapters=config.adapters,
        key=jax.random.key(config.seed),
    )
    return Update(loss_fn=loss_fn, batches=batches, constants=constants, method=method)


def _sides(
    questions: Questions, ways: Sequence[str], instead: Sequence[Sequence[str]]
) -> dict[str, dict[str, np.ndarray]]:
    """Rows of one length: that of the longest answer's, which other text is cut to."""

    def asked(parts: Sequence[str]) -> list[tuple[Row, str]]:
        return [
            (again, way)
            for way in ways
            for part in parts
            # The chat template may refuse it.
            if questions.in_way(part, way)
            for row in questions.rows[part]
            if (again := questions.changed(row, way)) is not None
        ]

    forget = asked(("forget", "reworded"))
    rows = {
        "forget": [questions.encode(row, way) for row, way in forget],
        "retain": [questions.encode(row, way) for row, way in asked(("train", "stranger"))],
    }
    if instead:
        message = dict(zip((row.answer for row in questions.rows["forget"]), instead, strict=True))
        pairs = [
            (existing, questions.encode(dataclasses.replace(row, answer=text), way))
            for (row, way), existing in zip(forget, rows["forget"])
            for text in message[row.answer]
        ]
        rows["forget"], rows["instead"] = ([pair[side] for pair in pairs] for side in (0, 1))
    longest = max(len(ids) for side in rows.values() for ids, _ in side)
    length = -(-longest // _MULTIPLE) * _MULTIPLE
    # All sides have one length.
    windows = [
        window[start : start + length]
        for window in questions.texts.get("train", ())
        for start in range(0, max(1, len(window) - length + 1), length)
    ]
    rows["text"] = [(window, np.arange(len(window)) > 0) for window in windows]
    return {name: Row.padded(side, length, pad_id=questions.pad_id) for name, side in rows.items()}


def _scored(
    model: Decoder, questions: Questions, rows: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Nats and tokens of rows, as the model has them before."""
    scores = score_rows(
        Deployed(model=model).nll,
        list(zip(rows["tokens"], rows["mask"])),
        batch_size=questions.batch_size,
        pad_id=questions.pad_id,
    )
    return {"nats": scores.totals(), "tokens": scores.counts()}


def _picked(
    rows: Mapping[str, np.ndarray], step: int, size: int, seed: int, salt: int
) -> dict[str, np.ndarray]:
    """The rows of a step: every epoch all of them once, in an order of its own."""
    count = len(rows["tokens"])
    chosen = [
        # By the step alone, so that a resumed run continues in the same way.
        np.random.default_rng([seed, salt, location // count]).permutation(count)[location % count]
        for location in range(step * size, (step + 1) * size)
    ]
    return {name: values[chosen] for name, values in rows.items()}

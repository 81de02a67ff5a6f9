"""An optimiser step of unlearning on rows of your own, and its batches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

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
# In packed batches, where a line holds some four rows or a window of text.
_PACKED_SHARE, _A_LINE = 0.25, 4
# Windows of text that packed batches use, and lines that one pass reads.
_WINDOWS, _AT_ONCE = 128, 4


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
    sides, packs, seed = _sides(questions, ways, instead), config.method.packs, config.seed
    count = min(config.batch_size, len(sides["forget"]["tokens"]))
    size, share = _KEPT * config.batch_size, _TEXT_SHARE
    if packs:
        sides["text"] = {name: values[:_WINDOWS] for name, values in sides["text"].items()}
        sides = {name: _served(model, config, rows) for name, rows in sides.items()}
        # Lines instead of rows.
        count = -(-config.batch_size // _A_LINE)
        size, share = _KEPT * count, _PACKED_SHARE
    few = int(share * size) if len(sides["text"]["tokens"]) else 0
    amounts = {"forget": count, "instead": count, "retain": size - few, "text": few}
    salts = {"forget": 0, "instead": 0, "retain": 1, "text": 2}
    starts = {
        name: _starts(sides[name], amount, config, salts[name]) if packs else amount
        for name, amount in amounts.items()
        if amount and name in sides
    }

    def drawn(rows: Mapping[str, Any], name: str, step: int) -> dict[str, np.ndarray]:
        at = starts[name]
        ends = at[step : step + 2] if packs else (step * at, (step + 1) * at)
        return _picked(rows, range(*ends), seed, salts[name])

    def retained(sides: Mapping[str, Any], step: int) -> dict[str, np.ndarray]:
        parts = [drawn(sides[name], name, step) for name in ("retain", "text") if name in starts]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def batches(step: int) -> dict[str, Any]:
        names = ("forget", "instead") if instead else ("forget",)
        batch = {n: drawn(sides[n], n, step) for n in names}
        batch |= {"retain": retained(sides, step)}
        lines = {"forget": count, "retain": size}
        return {n: _packed(rows, lines[n]) for n, rows in batch.items()} if packs else batch

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


def _sizes(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Lengths of rows up to their last answer token."""
    return rows["tokens"].shape[1] - rows["mask"][:, ::-1].argmax(axis=1)


def _spans(rows: Mapping[str, np.ndarray]) -> list[tuple[int, slice]]:
    """A line and a place in it for each row, in order, side by side."""
    length, line, end, spans = rows["tokens"].shape[1], 0, 0, []
    for size in map(int, _sizes(rows)):
        line, end = (line + 1, size) if end + size > length else (line, end + size)
        spans.append((line, slice(end - size, end)))
    return spans


def _packed(rows: Mapping[str, np.ndarray], lines: int) -> dict[str, np.ndarray]:
    """Rows side by side, in so many lines of their length, with `segments`, -1 in the rest."""
    packed = {name: np.zeros((lines, *v.shape[1:]), v.dtype) for name, v in rows.items()}
    packed["segments"] = np.full(packed["tokens"].shape, -1, np.int32)
    for row, (line, span) in enumerate(_spans(rows)):
        for name, values in rows.items():
            packed[name][line, span] = values[row, : span.stop - span.start]
        packed["segments"][line, span] = row
    return packed


def _served(
    model: Decoder, config: UnlearnConfig, rows: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Rows with the hidden states that they are compared with, which no step changes."""
    method, (graphdef, state) = config.method, nnx.split(model)
    fixed, spans = method.fixed(model.config, jax.random.key(config.seed)), _spans(rows)
    lines = -(-(spans[-1][0] + 1) // _AT_ONCE) * _AT_ONCE if spans else 0
    packed = _packed(rows, lines)

    @jax.jit
    def read(state: Any, tokens: Any, segments: Any) -> jax.Array:
        return method.states_before(nnx.merge(graphdef, state), tokens, fixed, segments)

    parts = [
        np.asarray(read(state, *(packed[n][at : at + _AT_ONCE] for n in ("tokens", "segments"))))
        for at in range(0, lines, _AT_ONCE)
    ]
    width = model.config.hidden_size
    states = np.zeros((*rows["tokens"].shape, width), np.float32)
    for row, (line, span) in enumerate(spans):
        states[row, : span.stop - span.start] = parts[line // _AT_ONCE][line % _AT_ONCE, span]
    return rows | {"states": states}


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
    rows: Mapping[str, np.ndarray], places: range, seed: int, salt: int
) -> dict[str, np.ndarray]:
    """The rows of a step: every epoch all of them once, in an order of its own."""
    chosen = [_row_at(place, len(rows["tokens"]), seed, salt) for place in places]
    return {name: values[chosen] for name, values in rows.items()}


def _row_at(place: int, count: int, seed: int, salt: int) -> int:
    # By the place alone, so that a resumed run continues in the same way.
    order = np.random.default_rng([seed, salt, place // count]).permutation(count)
    return int(order[place % count])


def _starts(
    rows: Mapping[str, np.ndarray], lines: int, config: UnlearnConfig, salt: int
) -> list[int]:
    """The place of each step's first row, if as many rows are taken as fit into these lines."""
    (count, length), sizes, starts = rows["tokens"].shape, _sizes(rows), [0]
    for _ in range(config.steps):
        place, line, end = starts[-1], 0, 0
        while True:
            size = sizes[_row_at(place, count, config.seed, salt)]
            line, end = (line + 1, size) if end + size > length else (line, end + size)
            if line == lines:
                break
            place += 1
        starts.append(place)
    return starts

"""An optimiser step of unlearning on rows of your own, and its batches."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

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
# Windows of text that packed batches use, lines that one pass reads, and most numbers to store.
_WINDOWS, _AT_ONCE, _STORED = 128, 4, 2**29


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
    sides, packs = _sides(questions, ways, instead), config.method.packs
    count = min(config.batch_size, len(sides["forget"]["tokens"]))
    size, share = _KEPT * config.batch_size, _TEXT_SHARE
    if packs:
        sides["text"] = {name: values[:_WINDOWS] for name, values in sides["text"].items()}
        # Of a window only the last quarter counts, or it would outweigh the answers.
        counted = sides["text"]["mask"]
        counted &= counted.cumsum(1) > 3 * counted.sum(1, keepdims=True) // 4
        places = sum(rows["tokens"].size for rows in sides.values())
        if places * model.config.hidden_size <= _STORED:
            sides = {n: r | {"states": _served(model, config, r)} for n, r in sides.items()}
        # Lines instead of rows.
        count = -(-config.batch_size // _A_LINE)
        size, share = _KEPT * count, _PACKED_SHARE
    few = int(share * size) if len(sides["text"]["tokens"]) else 0
    amounts = {"forget": count, "instead": count, "retain": size - few, "text": few}
    starts = {name: _starts(sides[name], amounts[name], config, name) for name in sides}

    def drawn(rows: Mapping[str, Any], name: str, step: int) -> dict[str, np.ndarray]:
        chosen = _order(len(rows["tokens"]), range(*starts[name][step : step + 2]), config, name)
        return {kind: values[chosen] for kind, values in rows.items()}

    def retained(sides: Mapping[str, Any], step: int) -> dict[str, np.ndarray]:
        parts = [drawn(sides[name], name, step) for name in ("retain", "text") if amounts[name]]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def batches(step: int) -> dict[str, Any]:
        names = ("forget", "instead") if instead else ("forget",)
        batch = {n: drawn(sides[n], n, step) for n in names}
        batch |= {"retain": retained(sides, step)}
        lines = {"forget": count, "retain": size}
        return {n: _packed(rows, lines[n]) for n, rows in batch.items()} if packs else batch

    def retain_nll() -> float:
        scored = {}
        for side in ("retain", "text"):
            pairs = list(zip(sides[side]["tokens"], sides[side]["mask"]))
            scores = questions.scored(Deployed(model=model).nll, pairs)
            scored[side] = {"nats": scores.totals(), "tokens": scores.counts()}
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

    def asked(parts: Sequence[str]) -> list[tuple[Row, Row, str]]:
        return [
            (row, again, way)
            for way in ways
            for part in parts
            # The chat template may refuse it.
            if questions.in_way(part, way)
            for row in questions.rows[part]
            if (again := questions.changed(row, way)) is not None
        ]

    forget = asked(("forget", "reworded"))
    rows = {
        "forget": [questions.encode(row, way) for _, row, way in forget],
        "retain": [questions.encode(row, way) for _, row, way in asked(("train", "stranger"))],
    }
    if instead:
        # Several rows may have one answer.
        message = {
            (row.answer, question): texts
            for row, texts in zip(questions.rows["forget"], instead, strict=True)
            for question in (row.question, *row.paraphrases)
        }
        pairs = [
            (existing, questions.encode(dataclasses.replace(again, answer=text), way))
            for (row, again, way), existing in zip(forget, rows["forget"])
            for text in message[row.answer, row.question]
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


def _spans(rows: Mapping[str, np.ndarray]) -> list[tuple[int, slice]]:
    """A line and a place in it for each row up to its last answer token, side by side."""
    length, line, end, spans = rows["tokens"].shape[1], 0, 0, []
    for size in (length - rows["mask"][:, ::-1].argmax(axis=1)).tolist():
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


def _served(model: Decoder, config: UnlearnConfig, rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Hidden states that rows are compared with, which no step changes."""
    method, (graphdef, state) = config.method, nnx.split(model)
    fixed = method.fixed(model.config, jax.random.key(config.seed))
    states = np.zeros((*rows["tokens"].shape, model.config.hidden_size), np.float32)
    read = jax.jit(lambda s, x, ids: method.states_before(nnx.merge(graphdef, s), x, fixed, ids))
    spans = _spans(rows)
    packed = _packed(rows, max((line // _AT_ONCE + 1 for line, _ in spans), default=0) * _AT_ONCE)
    pairs = zip(*(packed[n].reshape(-1, _AT_ONCE, states.shape[1]) for n in ("tokens", "segments")))
    lines = [line for pair in pairs for line in np.asarray(read(state, *pair))]
    for row, (line, span) in enumerate(spans):
        states[row, : span.stop - span.start] = lines[line][span]
    return states


def _order(count: int, places: range, config: UnlearnConfig, name: str) -> list[int]:
    """Rows by place: every epoch all of them once, in an order of its own."""

    @functools.cache
    def order(epoch: int) -> np.ndarray:
        # By the epoch alone, so that a resumed run continues in the same way.
        salt = {"retain": 1, "text": 2}.get(name, 0)
        return np.random.default_rng([config.seed, salt, epoch]).permutation(count)

    return [int(order(place // count)[place % count]) for place in places]


def _starts(
    rows: Mapping[str, np.ndarray], amount: int, config: UnlearnConfig, name: str
) -> Sequence[int]:
    """The place of each step's first row: so many a step, or as many as fit into lines."""
    if not config.method.packs or not amount:
        return range(0, config.steps * amount + 1, max(amount, 1))
    (count, length), starts = rows["tokens"].shape, [0]
    for _ in range(config.steps):
        # Rows of one token would all fit.
        chosen = _order(count, range(starts[-1], starts[-1] + amount * length), config, name)
        spans = _spans({kind: values[chosen] for kind, values in rows.items() if kind != "states"})
        starts.append(starts[-1] + sum(line < amount for line, _ in spans))
    return starts

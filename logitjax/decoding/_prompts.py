"""Prompts read in pieces while other slots decode."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from logitjax.decoding._ensemble import Plan
from logitjax.decoding._prefixes import PrefixCache, block_names
from logitjax.decoding._requests import Prompt, Request, fresh_rows
from logitjax.decoding._step import (
    DecodeOptions,
    DecodeState,
    Emitted,
    constrain,
    emit,
    put_rows,
    rows_first,
)
from logitjax.ops import log_softmax, top_k


@functools.partial(
    jax.jit, static_argnames=("plan", "options", "report"), donate_argnames=("caches",)
)
def read_piece(
    plan: Plan,
    options: DecodeOptions,
    params: Any,
    caches: Sequence[Any],
    tokens: jax.Array,
    positions: jax.Array,
    following: Any,
    *,
    report: bool,
) -> tuple[list, list, Any]:
    """Read ``tokens [streams, rows, time]`` into caches of one row: last logits, caches, report.

    The report covers `following`, the tokens after these `[rows, time]`, -1 for none.
    """
    rows = len(caches)

    def join(axis: int) -> Any:
        return lambda *leaves: jnp.concatenate(leaves, axis)

    def cut(row: int, axis: int) -> Any:
        return lambda leaf: lax.slice_in_dim(leaf, row, row + 1, axis=axis)

    axes = [group.batch_axis for group in plan.groups]
    parts = [jax.tree.map(join(axis), *stored) for axis, *stored in zip(axes, *caches, strict=True)]
    logits, joined = plan.forward(params, tokens, positions, parts, last_only=not report)
    split = [
        tuple(jax.tree.map(cut(row, axis), part) for axis, part in zip(axes, joined, strict=True))
        for row in range(rows)
    ]
    last = [[values[row : row + 1, -1] for values in logits] for row in range(rows)]
    return last, split, _reported(plan, options, logits, *following) if report else None


def _reported(
    plan: Plan, options: DecodeOptions, logits: list[jax.Array], following: jax.Array, extra: Any
) -> tuple[Emitted, Any]:
    """Log-probabilities of given tokens, as they would be reported for chosen ones."""

    def advance(extra: Any, here: Any) -> tuple[Any, Emitted]:
        target, values = here
        # -1 if no token follows.
        present = target >= 0
        token = jnp.maximum(target, 0)
        served = plan.combine(values)[0]
        if options.served is not None:
            served = options.served(served, extra)
        log_p = log_softmax(served)
        local = jnp.take_along_axis(log_p, token[:, None], axis=-1)[:, 0]
        emitted = Emitted(tokens=token, valid=present, logprobs=local)
        if options.top_logprobs:
            best, ids = top_k(log_p, options.top_logprobs)
            emitted = dataclasses.replace(emitted, top_ids=ids, top_logprobs=best)
        if options.remember is not None:
            extra = options.remember(extra, token, present)
        return extra, emitted

    times = (following.T, [jnp.swapaxes(values, 0, 1) for values in logits])
    extra, emitted = lax.scan(advance, extra, times)
    return rows_first(emitted), extra


@functools.partial(jax.jit, static_argnames=("plan", "options"), donate_argnames="state")
def place_row(
    plan: Plan,
    options: DecodeOptions,
    state: DecodeState,
    row: DecodeState,
    logits: list[jax.Array],
    slot: jax.Array,
) -> tuple[DecodeState, Emitted]:
    """Move a row that has read its prompt into a slot, and choose its first token."""
    # The first token is chosen from the prompt's own logits, without another pass.
    row, emitted = emit(plan, options, row, logits)
    return constrain(plan, options, put_rows(plan, state, row, slot)), emitted


# Nothing is donated: the row continues with the cache that a block is copied from.
@functools.partial(jax.jit, static_argnames=("plan", "size"))
def _taken(plan: Plan, caches: Any, start: jax.Array, size: int) -> list[jax.Array]:
    axes, leaves = plan.slot_axes(caches) or [], jax.tree.leaves(caches)
    return [
        lax.dynamic_slice_in_dim(leaf, start, size, axis)
        for leaf, axis in zip(leaves, axes, strict=True)
        if axis >= 0
    ]


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="caches")
def _given(plan: Plan, caches: Any, block: list[jax.Array], start: jax.Array) -> Any:
    leaves, tree = jax.tree.flatten(caches)
    parts = iter(block)
    filled = [
        leaf if axis < 0 else lax.dynamic_update_slice_in_dim(leaf, next(parts), start, axis)
        for leaf, axis in zip(leaves, plan.slot_axes(caches) or [], strict=True)
    ]
    return jax.tree.unflatten(tree, filled)


def row_of(
    plan: Plan,
    options: DecodeOptions,
    request: Request,
    lengths: list[int],
    *,
    cache: Any,
    extra: Any,
    room: int,
) -> DecodeState:
    row = fresh_rows(plan, options, [request], cache=cache, extra=extra, room=room)
    if row.seen is not None:
        # The repetition penalty counts prompts too, the other penalties do not.
        row.seen[0, np.asarray(request.prompt)] = True
    return dataclasses.replace(row, lengths=np.array(lengths, np.int32)[:, None])


@dataclasses.dataclass
class _Reading:
    """A prompt being read: padded streams, and the next column to read."""

    tokens: np.ndarray  # [streams, columns]
    # Lengths of the streams.
    lengths: list[int]
    at: int
    # Digests of its whole blocks.
    names: list[bytes]
    report: bool
    extra: Any = None
    logits: Any = None
    reported: list[Emitted] = dataclasses.field(default_factory=list)

    @property
    def left(self) -> int:
        return self.tokens.shape[1] - self.at


class PromptReader:
    """Reads prompts in pieces of a fixed size, several at a time, and puts them into slots.

    Between two pieces an engine's slots decode, so a long prompt delays the others by no more than
    a piece takes. Every piece has one of five shapes: one prompt with ``chunk`` tokens, and one or
    all ``rows`` prompts with ``chunk // rows`` or a quarter of that.

    Args:
        engine: engine whose model reads and whose slots are filled.
        rows: maximum number of prompts read at once.
        chunk: maximum number of tokens in a piece, over all prompts; ``rows`` divides it.
        prefix_bytes: memory for caches of prompts with a common beginning. Requires a model whose
            caches declare where positions are stored, as decoders' do.

    Attributes:
        tokens_read, tokens_reused: numbers of tokens that the model read, and that caches replaced.

    Raises:
        ValueError: for a ``chunk`` that ``rows`` does not divide, or an engine whose windowed
            layers forget what prefixes would need.
    """

    def __init__(self, engine: Any, *, rows: int = 4, chunk: int = 128, prefix_bytes: int = 0):
        if rows < 1 or chunk < rows or chunk % rows:
            raise ValueError(f"chunk: expected a multiple of rows={rows}, got {chunk}")
        self.engine, self.chunk, self.block = engine, chunk, chunk // rows
        # Short prompts, or the rest after a known beginning, are not read as a whole block.
        self._widths = sorted({max(1, self.block // 4), self.block, chunk})
        self.tokens_read = self.tokens_reused = 0
        self._caches = [engine.empty_row() for _ in range(rows)]
        self._rows: list[_Reading | None] = [None] * rows
        self._turns: list[int] = []
        shares = prefix_bytes > 0 and engine.plan.slot_axes(self._caches[0]) is not None
        if shares and engine.rings:
            raise ValueError("prefix_bytes: expected 0 for an engine with rings, got more")
        self.prefixes = PrefixCache(prefix_bytes if shares else 0)

    @property
    def free(self) -> bool:
        """Whether another prompt can be started."""
        return None in self._rows

    def waits(self, prompt: Prompt, *, salt: str = "") -> bool:
        """Whether the next piece of this prompt is being read for another prompt."""
        if not self.prefixes.limit:
            return False
        names = self._names(np.asarray(prompt), salt)
        missing = next((name for name in names if name not in self.prefixes), None)
        return missing is not None and any(
            row is not None and row.left and missing in row.names for row in self._rows
        )

    def begin(self, request: Request, *, salt: str = "", report: bool = False) -> int:
        """Accept a prompt; returns the row that reads it.

        Args:
            salt: only prompts with the same salt share caches.
            report: also log-probabilities of the prompt's tokens; it is then read from the start.
                If options remember tokens, the extra of an idle slot belongs to no token.

        Raises:
            ValueError: if no row is free, or a prompt is invalid or too long.
        """
        if not self.free:
            raise ValueError("request: expected a free row, but all are reading")
        streams = self.engine.streams_of(request)
        longest = max(map(len, streams))
        tokens = np.zeros((len(streams), longest), np.int32)
        for line, stream in zip(tokens, streams, strict=True):
            # Padded on the left, so that all streams end in one column.
            line[longest - len(stream) :] = stream
        row = self._rows.index(None)
        names: list[bytes] = []
        # The prompts of several streams start at different columns.
        if self.prefixes.limit and request.others is None:
            names = self._names(np.asarray(request.prompt), salt)
        reading = _Reading(tokens, [len(s) for s in streams], 0, names, report)
        if report:
            remember = self.engine.options.remember
            # A request's own extra describes its whole prompt; a report begins after the first
            # token and must not depend on later ones.
            extra = self.engine.extra_of(request if remember is None else None)
            reading.extra = jax.tree.map(lambda leaf: np.asarray(leaf)[None], extra)
            if remember is not None:
                first = jnp.asarray(request.prompt[:1], jnp.int32)
                reading.extra = remember(reading.extra, first, jnp.ones(1, bool))
        else:
            blocks = self.prefixes.longest(names)
            for i, block in enumerate(blocks):
                start = i * self.block
                self._caches[row] = _given(self.engine.plan, self._caches[row], block, start)
            reading.at = len(blocks) * self.block
            self.tokens_reused += reading.at
        self._rows[row] = reading
        self._turns.append(row)
        return row

    def advance(self) -> list[int]:
        """Read at most ``chunk`` tokens; returns the rows that have read their whole prompts."""
        turns = [row for row in self._turns if self._reading(row).left]
        if not turns:
            return []
        plain = [row for row in turns if not self._reading(row).report]
        # With two of four rows reading, separate pieces waste less than half of a common one.
        if len(self._rows) > 1 and 2 * len(plain) > len(self._rows) and turns[0] in plain:
            pieces = [plain]
        else:
            # Short prompts one after the other, or a long one.
            short = itertools.takewhile(lambda row: self._reading(row).left <= self.block, turns)
            pieces = [[row] for row in short] or [turns[:1]]
        for read in pieces:
            self._read(read)
            # To the end of the queue: a long prompt does not delay the others.
            self._turns = [row for row in self._turns if row not in read] + read
        return [row for read in pieces for row in read if not self._reading(row).left]

    def place(self, row: int, slot: int, request: Request) -> Emitted:
        """Move the prompt of a row into a slot, also into several; returns `Emitted` of one row."""
        reading = self._reading(row)
        if reading.left:
            raise ValueError(f"row: expected a finished prompt, {reading.left} tokens are left")
        return self.engine.place(slot, request, reading.lengths, self._caches[row], reading.logits)

    def report(self, row: int) -> list[Emitted]:
        """Log-probabilities of the prompt's tokens from the second on, in pieces of one row."""
        return self._reading(row).reported

    def release(self, row: int) -> None:
        """Free a row for the next prompt."""
        self._rows[row] = None
        self._turns.remove(row)

    def compile(self, *, report: bool = False) -> None:
        """Compile every program that reading and placing may need, on dummy rows."""
        for width in self._widths:
            self._run([0], {}, width, None)
            # All rows together read at most a block.
            if width < self.chunk:
                self._run(list(range(len(self._rows))), {}, width, None)
        if report:
            extra = jax.tree.map(lambda leaf: np.asarray(leaf)[None], self.engine.extra_of(None))
            for width in (self.block, self.chunk):
                self._run([0], {}, width, (np.full((1, width), -1, np.int32), extra))
        if self.prefixes.limit:
            block = _taken(self.engine.plan, self._caches[0], 0, self.block)
            self._caches[0] = _given(self.engine.plan, self._caches[0], block, 0)

    def _reading(self, row: int) -> _Reading:
        reading = self._rows[row]
        if reading is None:
            raise ValueError(f"row: expected a row with a prompt, got {row}")
        return reading

    def _names(self, prompt: np.ndarray, salt: str) -> list[bytes]:
        # The last token is always read: its logits choose the first new one.
        return block_names(prompt[:-1], self.block, salt)

    def _read(self, some: list[int]) -> None:
        """Read the next piece of one prompt, or of several with the program for all rows."""
        only = self._reading(some[0]) if len(some) == 1 else None
        rows, most = (some, self.chunk) if only else (list(range(len(self._rows))), self.block)
        # Reports have no program of the smallest width, and all rows together none of the largest.
        least, following = self.block if only and only.report else 0, None
        left = {row: self._reading(row).left for row in some}
        fitting = [width for width in self._widths if least <= width >= max(left.values())]
        width = min([*fitting, most])
        read = {row: min(width, count) for row, count in left.items()}
        if only is not None and only.report:
            next_ones = np.full((1, width), -1, np.int32)
            length = read[rows[0]]
            after = only.tokens[0, only.at + 1 : only.at + length + 1]
            # The last column predicts the token after it; at the prompt's end there is none.
            next_ones[0, width - length : width - length + len(after)] = after
            following = next_ones, only.extra
        logits, reported = self._run(rows, read, width, following)
        if only is not None and reported is not None:
            emitted, only.extra = reported
            only.reported.append(emitted)
        for row, length in read.items():
            reading = self._reading(row)
            before, reading.at = reading.at, reading.at + length
            reading.logits = logits[rows.index(row)]
            self.tokens_read += length
            # Blocks that this piece completed.
            for i in range(-(-before // self.block), reading.at // self.block):
                if i < len(reading.names) and reading.names[i] not in self.prefixes:
                    block = _taken(self.engine.plan, self._caches[row], i * self.block, self.block)
                    self.prefixes.put(reading.names[i], block)

    def _run(self, rows: list[int], read: dict[int, int], width: int, following: Any) -> Any:
        streams = self.engine.plan.streams
        tokens = np.zeros((streams, len(rows), width), np.int32)
        positions = np.full_like(tokens, -1)
        for i, row in enumerate(rows):
            count = read.get(row, 0)
            if not count:
                continue
            reading = self._reading(row)
            columns = np.arange(reading.at, reading.at + count)
            tokens[:, i, width - count :] = reading.tokens[:, columns]
            for stream, length in enumerate(reading.lengths):
                at = columns - (reading.tokens.shape[1] - length)
                positions[stream, i, width - count :] = np.maximum(at, -1)
        engine, before = self.engine, tuple(self._caches[row] for row in rows)
        args = (engine.plan, engine.options, engine.params, before, tokens, positions, following)
        logits, after, reported = read_piece(*args, report=following is not None)
        for row, cache in zip(rows, after, strict=True):
            self._caches[row] = cache
        return logits, reported

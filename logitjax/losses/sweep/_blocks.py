"""Choice of a sweep's engine and block sizes: a short rule."""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

Engine = Literal["rows", "scan", "pallas"]

# CPU: a block should stay near the caches. With weights, whole rows of logits are kept for this
# many elements, and never fewer than these rows: each block of them reads the heads, and reads and
# writes the head's gradient once.
_CPU_BLOCK_ELEMENTS = 2**22
_CPU_ROW_ELEMENTS = 40_000_000
_CPU_LEAST_ROWS = 256
# TPU and GPU: a block of this many rows performs as many products per byte of a bfloat16 head,
# above the ridge of every chip (560 per byte on v6e); fewer rows wait for memory.
_LEAST_ROWS = 1024
# More rows than this save no more time.
_MOST_ROWS = 4096
# Each block of columns reads all hidden states, and reads and writes their gradient in float32:
# 2,048 columns are 1,200 products for each of these bytes, twice the ridge of any chip.
_LEAST_COLUMNS = 2048
_MOST_COLUMNS = 8192
# Blocks with another number of rows straddle the tiles of an array, which costs copies.
_TILE = 128
# Share of a budget reserved for memory beyond the arrays: a fifth, as compiled for v5p.
_RESERVE = 0.22
# A tenth of a small problem's logits is not worth saving.
_LEAST_BUDGET = 64 * 2**20


class Sizes(NamedTuple):
    """Sizes on one device, from which a rule decides.

    `widths` are the widths of hidden states: the student's, and a teacher's. `weighted` is whether
    the weights of the positions are known.
    """

    batch: tuple[int, ...]
    vocab: int
    widths: tuple[int, ...]
    weighted: bool
    platform: str

    @property
    def positions(self) -> int:
        return math.prod(self.batch)


class Layout(NamedTuple):
    """A rule's decision: engine, columns per block, positions of the last batch axis per block."""

    engine: Engine
    columns: int
    # None for all.
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Limits on the memory of a sweep: they change the cost of a loss, never its value.

    None is derived from the shapes and from the device of the program: that of the arrays' mesh,
    otherwise of the mesh in use, otherwise the default device.

    The engine is `rows` with known weights if, on TPU and GPU, the budget fits 1,024 rows, which
    saturate a chip; otherwise `scan`, since a gradient not yet known needs the logits again.

    Attributes:
        vocab: number of vocabulary entries in a block.
        tokens: number of positions of the last batch axis in a block.
        engine: `rows` keeps the logits of some positions over the whole vocabulary just long enough
            to turn them into their gradient, and accumulates the head's gradient in float32; it
            needs the weights of the positions. A TPU's compiler holds that sum twice. `scan` keeps
            a block of columns, accumulates its gradient over the positions, casts it once, and
            forms each logit a second time for it. `pallas`, never chosen by the rule because no
            time of it on a chip is known, uses TPU kernels instead of blocks, for statistics that
            declare `in_tiles`: it holds a few numbers per position, and forms each logit a third
            time. On CPU it is interpreted, slowly.
        memory_budget: bytes that a sweep may hold on a device besides the head's gradient, as
            nearly as blocks allow; by default a tenth of all float32 logits of student and teacher,
            and at least 64 MiB. Ignored on CPU, where caches decide.

    Raises:
        ValueError: a size is not positive, or there is no such engine.

    >>> Blocks(vocab=2048, tokens=512, engine="scan").vocab
    2048
    """

    vocab: int | None = None
    tokens: int | None = None
    engine: Engine | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab", "tokens", "memory_budget"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"blocks.{name}: expected a positive size, got {size}")
        if self.engine not in (None, *get_args(Engine)):
            engines = ", ".join(map(repr, get_args(Engine)))
            raise ValueError(f"blocks.engine: expected one of {engines}, got {self.engine!r}")

    def layout(self, sizes: Sizes) -> Layout:
        """The rule's decision; ValueError if `rows` is requested without known weights."""
        if self.engine == "rows" and not sizes.weighted:
            raise ValueError("blocks.engine: expected weights with 'rows', got none")
        result = self._on_cpu(sizes) if sizes.platform == "cpu" else self._on_accelerator(sizes)
        length = sizes.batch[-1] if sizes.batch else 1
        columns = min(result.columns if self.vocab is None else self.vocab, sizes.vocab)
        tokens = result.tokens if self.tokens is None else self.tokens
        if tokens is not None and tokens >= length:
            tokens = None
        return Layout(result.engine, columns, tokens)

    def _on_cpu(self, sizes: Sizes) -> Layout:
        engine = self.engine or ("rows" if sizes.weighted else "scan")
        if engine == "rows":
            most = max(_CPU_LEAST_ROWS, _CPU_ROW_ELEMENTS // sizes.vocab)
        else:
            most = _CPU_BLOCK_ELEMENTS // min(sizes.vocab, 512)
        tokens = self.tokens or _along_last_axis(sizes.batch, most)
        rows = max(_together(sizes.batch, tokens), *sizes.widths)
        columns = _equal_columns(sizes.vocab, max(512, _CPU_BLOCK_ELEMENTS // max(rows, 1)))
        if columns % 1024 == 0 and columns < sizes.vocab:
            # Rows a power of two of bytes apart share few cache lines: reading down the columns of
            # such a block takes more than twice as long.
            columns = _equal_columns(sizes.vocab, columns - 128)
        return Layout(engine, columns, tokens)

    def _on_accelerator(self, sizes: Sizes) -> Layout:
        positions, vocab, width = sizes.positions, sizes.vocab, sizes.widths[0]
        sides = len(sizes.widths)
        budget = self.memory_budget
        if budget is None:
            budget = max(_LEAST_BUDGET, 4 * positions * vocab * sides // 10)
        budget -= int(_RESERVE * budget)
        # `rows`: the sum of the head's gradient before and after a block, of which one is allowed;
        # the gradient of the hidden states in the type of the products; for each logit a float32
        # and, for the student's, its gradient in that type.
        fixed = 4 * width * vocab + 2 * positions * width
        rows = max(0, budget - fixed) // ((4 * sides + 2) * vocab)
        engine = self.engine
        if engine is None:
            enough = rows >= min(_LEAST_ROWS, positions)
            engine = "rows" if sizes.weighted and enough else "scan"
        if engine == "rows":
            # Requested by name, it is for speed.
            most = _MOST_ROWS if self.memory_budget is None else max(rows, _LEAST_ROWS)
            tokens = self.tokens or _aligned(sizes.batch, min(most, _MOST_ROWS))
            # One block of columns: only the logits are kept, and each product is done once.
            return Layout(engine, vocab, tokens)
        # `scan`: forward, the logits of a block; backward, the gradient of the last side's, which
        # are never written, the columns of the heads and the gradient of one in float32, the hidden
        # states once more, and their float32 gradient, twice where the positions are split.
        present, back = budget // (4 * sides), budget - 6 * positions * width
        a_column = (4 * sides - 2) * positions + 4 * width + 2 * sum(sizes.widths)
        columns = min(present // positions, back // a_column)
        tokens = self.tokens
        if tokens is None and columns < _LEAST_COLUMNS and positions > _LEAST_ROWS:
            back -= 4 * positions * width
            most = min(present, back // (4 * sides - 2)) // _LEAST_COLUMNS
            tokens = _aligned(sizes.batch, max(most, _LEAST_ROWS))
        # A TPU's compiler estimates no less time for more columns, and holds less with these.
        if tokens is not None or sizes.platform == "tpu":
            columns = _LEAST_COLUMNS
        columns = min(_MOST_COLUMNS, max(_LEAST_COLUMNS, columns))
        return Layout(engine, _equal_columns(vocab, columns), tokens)


def _together(batch: tuple[int, ...], tokens: int | None) -> int:
    """Positions in a block: this many of the last axis, all of the others."""
    length = batch[-1] if batch else 1
    return math.prod(batch) // max(length, 1) * min(tokens or length, length)


def _along_last_axis(batch: tuple[int, ...], most: int) -> int | None:
    """Positions of the last axis for blocks of at most this many; None for all of them."""
    if not batch:
        return None
    most = max(1, most // max(1, math.prod(batch[:-1])))
    # Equal blocks, so that the last one has little padding.
    return None if batch[-1] <= most else -(-batch[-1] // -(-batch[-1] // most))


def _aligned(batch: tuple[int, ...], most: int) -> int | None:
    """The same in whole tiles of an accelerator, without padding if possible."""
    equal = _along_last_axis(batch, most)
    if equal is None or equal < _TILE:
        return equal
    length, fewest = batch[-1], -(-batch[-1] // equal)
    for count in range(fewest, 2 * fewest + 1):
        if length % (count * _TILE) == 0:
            return length // count
    return equal // _TILE * _TILE


def _equal_columns(vocab: int, most: int) -> int:
    # Equal blocks, so that the last one repeats few columns, and whole vector registers.
    count = -(-vocab // most)
    return min(vocab, -(-math.ceil(vocab / count) // 128) * 128)

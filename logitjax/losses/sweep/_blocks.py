"""Rule for the engine of a sweep and for how much of the logits it holds at a time."""

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

Engine = Literal["rows", "scan", "pallas"]

# CPU: a block should fit the caches. With weights, whole rows of logits are kept, up to so many
# elements but at least this many rows: each block of rows reads the heads, and reads and writes the
# head's gradient, once.
_CPU_BLOCK_ELEMENTS = 2**22
_CPU_ROW_ELEMENTS = 40_000_000
_CPU_LEAST_ROWS = 256
# TPU and GPU: with this many rows in a block each byte of a bfloat16 head takes part in as many
# products, above the ridge point of every chip (560 per byte on v6e); fewer rows are memory-bound.
_LEAST_ROWS = 1024
# More rows save no more time.
_MOST_ROWS = 4096
# Each block of columns reads all hidden states, and reads and writes their float32 gradient: 2,048
# columns are 1,200 products per byte, twice the ridge point of any chip.
_LEAST_COLUMNS = 2048
_MOST_COLUMNS = 8192
# Blocks with other numbers of rows straddle tiles of an array, which costs copies.
_TILE = 128
# Share of a budget for what array sizes do not show: a fifth, as compiled for v5p.
_RESERVE = 0.22
# For small problems a tenth of the logits is too little to be worth saving.
_LEAST_BUDGET = 64 * 2**20


class Sizes(NamedTuple):
    """Sizes on one device that determine the layout.

    `widths` are sizes of a hidden state: the student's, and a teacher's. `weighted` says whether
    the weights of positions are known.
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
    """Chosen engine, columns per block, and positions of the last batch axis per block."""

    engine: Engine
    columns: int
    # None for all of them.
    tokens: int | None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Limits on what a sweep holds at a time. They change the cost of a loss, never its value.

    Fields that are None follow from shapes and from the program's device: that of the arrays' mesh,
    or else of the mesh in use, or else the default device.

    The engine is `rows` if weights are known, on TPU and GPU only if the budget has room for 1,024
    rows, which keep a chip busy. Otherwise it is `scan`: if the output's gradient is not yet known,
    logits have to be formed again.

    Attributes:
        vocab: number of vocabulary entries in a block.
        tokens: number of positions along the last batch axis in a block.
        engine: `rows` keeps the logits of some positions over the whole vocabulary, just long
            enough to turn them into their gradient, and sums the gradient of the whole head in
            float32; it needs the weights of the positions. A TPU's compiler holds that sum twice.
            `scan` keeps a block of columns, whose gradient it sums over positions and casts once,
            and forms each logit a second time for it. `pallas` has TPU kernels in place of blocks,
            for statistics with `in_tiles`: it holds a few numbers per position and forms each logit
            a third time. It is never chosen by default, because it has not been timed on a chip. On
            CPU it is interpreted, slowly.
        memory_budget: bytes that a sweep may hold on a device in addition to the head's gradient,
            as closely as blocks allow; by default a tenth of all float32 logits of student and
            teacher, and at least 64 MiB. Ignored on CPU, where caches decide.

    Raises:
        ValueError: a size is not positive, or the engine is unknown.

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
        """Choose the layout; ValueError if `rows` is requested without weights."""
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
            # Rows that lie a power of two of bytes apart share few cache lines, which makes walking
            # down the columns of such a block more than twice as slow.
            columns = _equal_columns(sizes.vocab, columns - 128)
        return Layout(engine, columns, tokens)

    def _on_accelerator(self, sizes: Sizes) -> Layout:
        positions, vocab, width = sizes.positions, sizes.vocab, sizes.widths[0]
        sides = len(sizes.widths)
        budget = self.memory_budget
        if budget is None:
            budget = max(_LEAST_BUDGET, 4 * positions * vocab * sides // 10)
        budget -= int(_RESERVE * budget)
        # `rows`: the sum of the head's gradient before and after a block, one of which is allowed
        # for; the gradient of the hidden states in the type of the products; for each logit a
        # float32 and, for the student's, its gradient in that type.
        fixed = 4 * width * vocab + 2 * positions * width
        rows = max(0, budget - fixed) // ((4 * sides + 2) * vocab)
        engine = self.engine
        if engine is None:
            enough = rows >= min(_LEAST_ROWS, positions)
            engine = "rows" if sizes.weighted and enough else "scan"
        if engine == "rows":
            # Requested explicitly, it is for speed.
            most = _MOST_ROWS if self.memory_budget is None else max(rows, _LEAST_ROWS)
            tokens = self.tokens or _aligned(sizes.batch, min(most, _MOST_ROWS))
            # A single block of columns: only logits are kept, and each product is a single one.
            return Layout(engine, vocab, tokens)
        # `scan`: forward, the logits of a block; backward, their gradient in place of the last
        # side's logits, which are never written, the columns of the heads, the float32 gradient of
        # one head's, a copy of the hidden states, and their float32 gradient, twice if positions
        # are split.
        present, back = budget // (4 * sides), budget - 6 * positions * width
        a_column = (4 * sides - 2) * positions + 4 * width + 2 * sum(sizes.widths)
        columns = min(present // positions, back // a_column)
        tokens = self.tokens
        if tokens is None and columns < _LEAST_COLUMNS and positions > _LEAST_ROWS:
            back -= 4 * positions * width
            most = min(present, back // (4 * sides - 2)) // _LEAST_COLUMNS
            tokens = _aligned(sizes.batch, max(most, _LEAST_ROWS))
        # For more columns a TPU's compiler estimates no less time, and it holds less with these.
        if tokens is not None or sizes.platform == "tpu":
            columns = _LEAST_COLUMNS
        columns = min(_MOST_COLUMNS, max(_LEAST_COLUMNS, columns))
        return Layout(engine, _equal_columns(vocab, columns), tokens)


def _together(batch: tuple[int, ...], tokens: int | None) -> int:
    """Number of positions in a block: `tokens` along the last axis, all along the others."""
    length = batch[-1] if batch else 1
    return math.prod(batch) // max(length, 1) * min(tokens or length, length)


def _along_last_axis(batch: tuple[int, ...], most: int) -> int | None:
    """Positions along the last axis for blocks of at most `most` positions; None for all."""
    if not batch:
        return None
    most = max(1, most // max(1, math.prod(batch[:-1])))
    # Blocks of equal size, so that the last one has little padding.
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

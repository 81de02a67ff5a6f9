"""How much of the logits a sweep holds at a time."""

import dataclasses
import math

import jax

# Elements of logits that a block may hold. On CPU a block should stay near the caches; on an
# accelerator it should be large enough that a matmul fills the chip.
_BLOCK_ELEMENTS = {"cpu": 2**22}
_BLOCK_ELEMENTS_ELSEWHERE = 2**26
# The scalar form keeps whole rows of logits for so many elements, and never fewer than these rows:
# each block of them reads the heads and reads and writes the head's gradient once.
_ROW_ELEMENTS = {"cpu": 40_000_000}
_ROW_ELEMENTS_ELSEWHERE = 2**28
_LEAST_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks that a sweep visits; they change what it costs, never what it gives.

    Attributes:
        vocab: entries of the vocabulary; chosen from shape and backend when None.
        tokens: positions along the last batch axis; likewise.

    Raises:
        ValueError: a size is not positive.

    >>> Blocks(vocab=2048).columns(rows=512, vocab=50_000)
    2048
    """

    vocab: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            size = getattr(self, field.name)
            if size is not None and size < 1:
                raise ValueError(f"blocks.{field.name}: expected a positive size, got {size}")

    def columns(self, rows: int, vocab: int) -> int:
        """Columns a block that has `rows` positions or kernel rows, whichever are more."""
        if self.vocab is not None:
            return min(self.vocab, vocab)
        budget = _BLOCK_ELEMENTS.get(jax.default_backend(), _BLOCK_ELEMENTS_ELSEWHERE)
        most = max(512, budget // max(rows, 1))
        # Equal blocks, so that the last one repeats few columns, and whole vector registers.
        count = -(-vocab // most)
        return min(vocab, -(-math.ceil(vocab / count) // 128) * 128)

    def positions(self, batch: tuple[int, ...], vocab: int, *, scalar: bool) -> int | None:
        """Positions along the last batch axis taken together; None for all of them."""
        if self.tokens is not None:
            return self.tokens
        if not batch:
            return None
        lead = max(1, math.prod(batch[:-1]))
        backend = jax.default_backend()
        if scalar:
            budget = _ROW_ELEMENTS.get(backend, _ROW_ELEMENTS_ELSEWHERE)
            most = max(_LEAST_ROWS, budget // vocab)
        else:
            most = _BLOCK_ELEMENTS.get(backend, _BLOCK_ELEMENTS_ELSEWHERE) // min(vocab, 512)
        most = max(1, most // lead)
        if batch[-1] <= most:
            return None
        count = -(-batch[-1] // most)
        return -(-batch[-1] // count)

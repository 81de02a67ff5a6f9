import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from logitjax import data, losses
from logitjax.distillation._teacher import Teacher, Vocabularies
from logitjax.distillation.tokenizers._alignment import Chunks, align_chunks, template_leads
from logitjax.distillation.tokenizers._likelihood_matching import chunk_scores
from logitjax.distillation.tokenizers._token_pieces import prefix_bytes
from logitjax.distillation.training._teacher_cache import TeacherCache
from logitjax.distillation.training._teachers import Reader


@dataclasses.dataclass(frozen=True)
class Source:
    """A teacher's output on the rows of a run, from its caches on disk or read live."""

    columns: str
    packed: data.PackedSplits
    caches: Mapping[str, TeacherCache]
    vocabularies: Vocabularies = Vocabularies()  # noqa: RUF009
    reader: Reader | None = None

    @property
    def identity(self) -> Any:
        """Everything that determines the output."""
        if self.reader is not None:
            return {"live": (self.reader.tokenizer, self.reader.weights, self.reader.kept)}
        return {split: cache.identity for split, cache in self.caches.items()}

    @functools.cached_property
    def _spelling(self) -> Mapping[str, tuple[np.ndarray, int]]:
        """Bytes per token, and bytes that precede a text, by columns."""
        tokenizers = self.packed.tokenizers
        return {n: (t.byte_lengths(), prefix_bytes(t)) for n, t in tokenizers.items()}

    def chunks(self, batch: Mapping[str, Any]) -> Chunks:
        """Align the student's tokens of a batch with the teacher's."""
        student, teacher = self.packed.names["pivot"], self.columns
        (our_lengths, our_prefix), (their_lengths, their_prefix) = (
            self._spelling[name] for name in (student, teacher)
        )
        leads: Any = (0, 0)
        if self.packed.chat and student != teacher:
            tokenizers = self.packed.tokenizers
            leads = template_leads(
                [(batch[name], tokenizers[name].token_bytes()) for name in (student, teacher)]
            )
        return align_chunks(
            batch[student],
            batch[teacher],
            our_leads=leads[0],
            their_leads=leads[1],
            our_lengths=our_lengths,
            their_lengths=their_lengths,
            our_prefix=our_prefix,
            their_prefix=their_prefix,
            by="turn" if self.packed.chat else "document",
        )

    def view(self, split: str, batch: Mapping[str, Any]) -> Teacher:
        """Return the teacher's output at the student's positions."""
        if self.reader is None:
            cache = self.caches[split]
            record, vocab_size = cache.read(batch["row"]), cache.vocab_size
        else:
            record = dict(self.reader.read(batch[self.columns], batch["row"]))
            vocab_size = self.reader.vocab_size
        # Position t predicts t + 1.
        where = single = batch[self.columns]["loss_mask"][:, 1:]
        likelihoods = {n: record.pop(n) for n in ("label", "boundary") if n in record}
        chunks = None
        if self.columns != self.packed.names["pivot"] or self.vocabularies.boundary is not None:
            chunks = self.chunks(batch)
        if self.columns != self.packed.names["pivot"]:
            assert chunks is not None
            where, single = chunks.starts, chunks.one_to_one
            # From the teacher's positions to the student's: `[rows, positions, ...]` at `places`.
            rows = np.arange(len(where))[:, None]
            record = {name: array[rows, chunks.places] for name, array in record.items()}
        drawn = {n: record.pop(f"tail_{n}") for n in ("values", "indices") if f"tail_{n}" in record}
        tail = losses.TailSample(**drawn) if drawn else None
        scores = None
        if likelihoods and chunks is not None and self.vocabularies.boundary is not None:
            labels = batch[self.columns]["tokens"][:, 1:]
            lengths, _ = self._spelling[self.columns]
            # Special tokens have no bytes.
            special = lengths[np.minimum(labels, len(lengths) - 1)] == 0
            scores = chunk_scores(chunks, likelihoods, special=special)
        hidden = record.pop("hidden", None)
        statistics = losses.GraphStatistics(**record, tail=tail, vocab_size=vocab_size)
        return Teacher(
            statistics=statistics, hidden=hidden, where=where, single=single, chunks=scores
        )

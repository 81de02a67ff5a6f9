"""Rows of text that a student learns from, and what its teachers say about them."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from logitjax import data, losses, models, training
from logitjax.distillation._objective import PROJECTIONS, Objective
from logitjax.distillation._teacher_terms import TeacherView, Vocabularies
from logitjax.distillation.tokenizers._alignment import Chunks, align_chunks
from logitjax.distillation.tokenizers._likelihood_matching import boundary_tokens, chunk_scores
from logitjax.distillation.tokenizers._token_pieces import Rule, prefix_bytes, token_projection
from logitjax.distillation.training._teacher_cache import TeacherCache
from logitjax.distillation.training._teachers import (
    Reader,
    cache_teacher,
    model_reader,
    open_teacher_caches,
    server_reader,
)

# Teachers that are no model on this machine.
_NO_MODELS = ("cache", "api")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The text, the teachers that read it, and how much of their output is kept.

    Attributes:
        data: Text, as for `data.load_examples`.
        teachers: Each a model, `cache:DIR` as `logitjax cache-logits` writes it, or `api:URL`.
        seq_len: Tokens of a row.
        on_error: Whether a malformed row of the text is an error ('raise') or left out ('skip').
        top_k: Logits of each position that are kept, or that a server reports.
        tail_samples: Number of draws from the other tokens, which make `kl` unbiased.
        batch_size: Number of rows that a teacher reads at once.
        dtype: Type that teachers compute in.
        layout: Layout of teachers.
        api_key: Key of servers.
        losses: Names of the losses that will use it, as in `Objective`: those across tokenizers
            need projections, and `alm` needs more from the teachers.
        fit_to: Models whose tokenizers cut the rows as the teachers' do: runs with other teachers
            then learn from the same rows, and their scores can be compared.
    """

    data: str
    teachers: tuple[str, ...] = ()
    seq_len: int = 256
    on_error: Literal["raise", "skip"] = "raise"
    top_k: int = 64
    tail_samples: int = 0
    batch_size: int = 4
    dtype: str = "float32"
    layout: str = "listed"
    api_key: str | None = None
    losses: tuple[str, ...] = ()
    fit_to: tuple[str, ...] = ()

    @property
    def likelihoods(self) -> bool:
        """Whether teachers keep likelihoods."""
        return "alm" in self.losses

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the teachers in batches and folders, in their order."""
        return tuple(f"source{i}" for i in range(len(self.teachers)))


@dataclasses.dataclass(frozen=True)
class Source:
    """What one teacher says about the rows that matter, from its caches on disk.

    Attributes:
        columns: Which tokenizer's columns of a batch it reads.
        packed: The rows.
        caches: By split.
        vocabularies: How its vocabulary lies over the student's.
    """

    columns: str
    packed: data.PackedSplits
    caches: Mapping[str, TeacherCache]
    vocabularies: Vocabularies = Vocabularies()  # noqa: RUF009

    @functools.cached_property
    def _spelling(self) -> Mapping[str, tuple[np.ndarray, int]]:
        """Bytes of text that each token stands for, and those before a text, by columns."""
        tokenizers = self.packed.tokenizers
        return {n: (t.byte_lengths(), prefix_bytes(t)) for n, t in tokenizers.items()}

    def chunks(self, batch: Mapping[str, Any]) -> Chunks:
        """How the student's tokens of a batch lie over the teacher's."""
        ours, theirs = self.packed.names["pivot"], self.columns
        (our_lengths, our_prefix), (their_lengths, their_prefix) = (
            self._spelling[name] for name in (ours, theirs)
        )
        return align_chunks(
            batch[ours],
            batch[theirs],
            our_lengths=our_lengths,
            their_lengths=their_lengths,
            our_prefix=our_prefix,
            their_prefix=their_prefix,
            by="turn" if self.packed.chat else "document",
        )

    def view(self, split: str, batch: Mapping[str, Any]) -> TeacherView:
        """What the teacher says at the student's positions, and at which."""
        cache = self.caches[split]
        found = cache.read(batch["row"])
        where = single = batch[self.columns]["loss_mask"][:, 1:]
        said = {n: found.pop(n) for n in ("label", "boundary") if n in found}
        chunks = None
        if self.columns != self.packed.names["pivot"] or self.vocabularies.boundary is not None:
            chunks = self.chunks(batch)
        if self.columns != self.packed.names["pivot"]:
            assert chunks is not None
            where, single = chunks.starts, chunks.one_to_one
            rows = np.arange(len(where))[:, None]
            found = {name: array[rows, chunks.places] for name, array in found.items()}
        drawn = {n: found.pop(f"tail_{n}") for n in ("values", "indices") if f"tail_{n}" in found}
        tail = losses.TailSample(**drawn) if drawn else None
        scores = None
        if said and chunks is not None and self.vocabularies.boundary is not None:
            labels = batch[self.columns]["tokens"][:, 1:]
            lengths, _ = self._spelling[self.columns]
            special = lengths[np.minimum(labels, len(lengths) - 1)] == 0
            scores = chunk_scores(chunks, said, special=special)
        statistics = losses.GraphStatistics(**found, tail=tail, vocab_size=cache.vocab_size)
        return TeacherView(statistics, where, single, scores)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Packed rows of every split, and the teachers that have read them.

    Attributes:
        packed: The rows, under every model's tokenizer; the student's is called `pivot`.
        sources: Each teacher's output, by its name.
    """

    packed: data.PackedSplits
    sources: Mapping[str, Source]

    @functools.cached_property
    def _label_bytes(self) -> np.ndarray:
        name = self.packed.names["pivot"]
        return self.packed.tokenizers[name].byte_lengths()

    def tokenizer_table(self, rows: int = 64) -> list[dict[str, Any]]:
        """Of each teacher of another tokenizer: projections, and how much of the text meets.

        Args:
            rows: Training rows that are looked at.
        """
        ours, out = self.packed.names["pivot"], []
        split = self.packed.splits["train"]
        batch = split.rows(np.arange(min(rows, len(split))))
        wanted = batch[ours]["loss_mask"][:, 1:].sum()
        for name, source in self.sources.items():
            if source.columns == ours:
                continue
            chunks = source.chunks(batch)
            meets = {
                "teacher": name,
                "chunks 1:1 %": 100 * float(_single_share(chunks)),
                "labels in 1:1 %": 100 * float(chunks.one_to_one.sum() / wanted),
                "labels in chunks %": 100 * float((chunks.ours >= 0).sum() / wanted),
                "starts shared %": 100 * float(chunks.starts.sum() / wanted),
            }
            found = source.vocabularies.projections.values()
            out += [meets | projection.summary() for projection in found] or [meets]
        return out

    def batch(self, split: str, rows: Mapping[str, Any], *, taught: bool) -> dict[str, Any]:
        """The student's columns of some rows, with what the teachers say if that is wanted."""
        batch: dict[str, Any] = {"pivot": dict(self.packed.columns(rows, "pivot"))}
        if taught:
            batch["sources"] = {
                name: source.view(split, rows) for name, source in self.sources.items()
            }
        return batch

    def scored(
        self, split: str, mesh: Mesh, *, batch_size: int, rows: int
    ) -> Iterator[dict[str, Any]]:
        """This process's held-out batches, as `score_function` takes them."""
        index, count = training.BatchLayout(mesh).share
        first = next(iter(self.sources.values()), None)
        batches = self.packed.splits[split].iterate_once(
            batch_size=batch_size, process_index=index, process_count=count, max_rows=rows
        )
        for held in batches:
            batch = self.batch(split, held, taught=False)
            labels = np.minimum(batch["pivot"]["tokens"][:, 1:], len(self._label_bytes) - 1)
            batch["bytes"] = self._label_bytes[labels].astype(np.int32)
            if first is not None and first.columns == self.packed.names["pivot"]:
                statistics = first.view(split, held).statistics
                batch["teacher"] = dataclasses.replace(statistics, tail=None)
            yield batch


def _single_share(chunks: Chunks) -> float:
    """The share of chunks that are one token on both sides."""
    single = (chunks.our_sizes == 1) & (chunks.their_sizes == 1)
    return single.sum() / max(chunks.counts.sum(), 1)


def pack_corpus(
    reading: Reading, tokenizer: models.Tokenizer, directory: epath.Path
) -> data.PackedSplits:
    """The rows under the tokenizers of the student and of every teacher.

    Raises:
        ValueError: Rows longer than a teacher can read, or what `data.pack_splits` refuses.
    """
    tokenizers = {"pivot": tokenizer}
    for name, spec in zip(reading.names, reading.teachers, strict=True):
        tokenizers[name] = _tokenizer_of(spec, tokenizer)
        if spec.partition(":")[0] not in _NO_MODELS:
            longest = models.load_config(spec).max_length
            if reading.seq_len > longest:
                raise ValueError(
                    f"seq_len: expected at most {longest}, the length that teacher {spec!r} reads, "
                    f"got {reading.seq_len}"
                )
    for i, spec in enumerate(reading.fit_to):
        tokenizers[f"fit{i}"] = _tokenizer_of(spec, tokenizer)
    return data.pack_splits(
        reading.data,
        tokenizers,
        seq_len=reading.seq_len,
        on_error=reading.on_error,
        directory=directory,
    )


def check_vocabularies(
    reading: Reading, packed: data.PackedSplits, objectives: Sequence[Objective]
) -> None:
    """Refuse losses that a teacher cannot serve.

    Raises:
        ValueError: Names the loss and the teacher.
    """
    for objective in objectives:
        for name, spec in zip(reading.names, reading.teachers, strict=True):
            compared = next((n for n in ("uld", "gld") if n in objective.weights), None)
            if compared and (kept := _kept(reading, spec)) < objective.graph.k:
                raise ValueError(
                    f"loss {compared!r} compares the top {objective.graph.k} logits, but of "
                    f"teacher {spec!r} {kept} are kept"
                )
            needs = objective.same_vocabulary
            if needs and packed.names[name] != packed.names["pivot"]:
                raise ValueError(
                    f"loss {needs!r} needs one vocabulary, but teacher {spec!r} has another "
                    "tokenizer than the student; use first_piece, or alm, or uld"
                )
            if "gld" in objective.weights and spec.startswith("api:"):
                raise ValueError(
                    f"loss 'gld' needs the mean and deviation of all logits, which teacher "
                    f"{spec!r} does not say; use kl or uld"
                )
            if "alm" in objective.weights and spec.startswith("api:"):
                raise ValueError(
                    f"loss 'alm' needs the log-probability of every label, which teacher {spec!r} "
                    "is not asked for; use first_piece or kl"
                )


def load_corpus(
    reading: Reading,
    packed: data.PackedSplits,
    rows: Mapping[str, np.ndarray],
    directory: epath.Path,
    known: Mapping[str, tuple[models.Decoder, models.Tokenizer]] | None = None,
) -> Corpus:
    """The teachers' output on the rows that some run visits, from their caches or read now.

    Args:
        reading: The teachers.
        packed: Rows of `pack_corpus`.
        rows: The rows of each split that are visited, see `visited_rows`.
        directory: Where the teachers' caches go.
        known: Teachers that are loaded already, by their spec.

    Raises:
        ValueError: A cache of something else, or a server that does not answer.
    """
    named = dict(zip(reading.names, reading.teachers, strict=True))
    # What is refused, or does not answer, is said before models read for hours.
    order = {"cache": 0, "api": 1}
    soonest = sorted(named, key=lambda name: order.get(named[name].partition(":")[0], 2))
    caches = {
        name: _caches(reading, packed, rows, directory, known or {}, name=name) for name in soonest
    }
    sources = {}
    for name in named:
        columns = packed.names[name]
        vocabularies = _vocabularies(reading, packed, columns, directory)
        sources[name] = Source(columns, packed, caches[name], vocabularies)
    return Corpus(packed=packed, sources=sources)


def _caches(
    reading: Reading,
    packed: data.PackedSplits,
    rows: Mapping[str, np.ndarray],
    directory: epath.Path,
    known: Mapping[str, tuple[models.Decoder, models.Tokenizer]],
    *,
    name: str,
) -> dict[str, TeacherCache]:
    """One teacher's output by split, from its caches or read now."""
    spec, columns = reading.teachers[reading.names.index(name)], packed.names[name]
    kind, _, place = spec.partition(":")
    if kind == "cache":
        fingerprint = packed.tokenizers[columns].fingerprint
        caches = open_teacher_caches(epath.Path(place), packed, fingerprint, rows)
    else:
        caches = cache_teacher(
            spec,
            functools.partial(_reader, reading, spec, packed.tokenizers[columns], known),
            columns=columns,
            packed=packed,
            rows=rows,
            k=reading.top_k,
            tail_samples=0 if kind == "api" else reading.tail_samples,
            likelihoods=reading.likelihoods,
            batch_size=reading.batch_size,
            directory=directory / name,
        )
    if reading.likelihoods and not all(c.identity.likelihoods for c in caches.values()):
        raise ValueError(
            f"teacher {spec!r}: expected a cache with likelihoods for the loss 'alm', got one "
            "without: write it with --likelihoods"
        )
    return caches


def _vocabularies(
    reading: Reading, packed: data.PackedSplits, columns: str, directory: epath.Path
) -> Vocabularies:
    ours, theirs = (packed.tokenizers[n] for n in (packed.names["pivot"], columns))
    rules: list[Rule] = [PROJECTIONS[n] for n in reading.losses if n in PROJECTIONS]
    return Vocabularies(
        projections={
            rule: token_projection(ours, theirs, rule=rule, directory=directory) for rule in rules
        },
        boundary=boundary_tokens(ours) if reading.likelihoods else None,
    )


def visited_rows(
    packed: data.PackedSplits,
    *,
    steps: int,
    batch_size: int,
    seeds: Sequence[int],
    eval_rows: int,
    splits: Sequence[str] = data.SPLITS[1:],
) -> dict[str, np.ndarray]:
    """The rows of each split for which some run needs the teachers' output, ascending.

    Args:
        packed: The rows.
        steps: Steps of a run.
        batch_size: Rows of a step.
        seeds: Seeds of the runs; none where nothing is learned from teachers.
        eval_rows: Rows of each held-out split that are scored.
        splits: The held-out splits that are scored.
    """
    train = packed.splits["train"]
    visited = [
        train.indices(step, seed=seed, batch_size=batch_size)
        for seed in seeds
        for step in range(steps)
    ]
    rows = {"train": np.unique(np.concatenate(visited)) if visited else np.zeros(0, np.int64)}
    for split in splits:
        rows[split] = np.arange(min(eval_rows, len(packed.splits[split])))
    return rows


def _kept(reading: Reading, spec: str) -> int:
    """Logits of each position that a teacher's cache holds."""
    kind, _, place = spec.partition(":")
    if kind != "cache":
        return reading.top_k
    return TeacherCache(epath.Path(place) / data.SPLITS[0]).identity.k


def _tokenizer_of(spec: str, students: models.Tokenizer) -> models.Tokenizer:
    kind, _, place = spec.partition(":")
    if kind == "api":
        return students
    if kind == "cache":
        if not place:
            raise ValueError(f"teacher: expected cache:DIR, got {spec!r}")
        spec = TeacherCache(epath.Path(place) / data.SPLITS[0]).identity.model
        return _tokenizer_of(spec, students)
    return models.load_tokenizer(spec)


def _reader(
    reading: Reading,
    spec: str,
    tokenizer: models.Tokenizer,
    known: Mapping[str, tuple[models.Decoder, models.Tokenizer]],
) -> Reader:
    if spec.startswith("api:"):
        return server_reader(
            spec.removeprefix("api:"),
            k=reading.top_k,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            api_key=reading.api_key,
        )
    load = functools.partial(_load, reading, spec)
    if spec in known:
        load = functools.partial(known.get, spec)
    return model_reader(
        load,  # type: ignore
        k=reading.top_k,
        tail_samples=reading.tail_samples,
        likelihoods=reading.likelihoods,
    )


def _load(reading: Reading, spec: str) -> tuple[models.Decoder, models.Tokenizer]:
    # Each process lets the teachers read its own share, on its own devices.
    here = training.make_mesh("fsdp:-1", devices=jax.local_devices())
    return models.load(
        spec, mesh=here, dtype=reading.dtype, param_dtype=reading.dtype, layout=reading.layout
    )

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from logitjax import data, models, storage, training
from logitjax.data import PackedSplits
from logitjax.distillation._objective import Objective
from logitjax.distillation._teacher import Vocabularies
from logitjax.distillation._term import TeacherNeeds, Term
from logitjax.distillation.tokenizers._likelihood_matching import TokenSet, boundary_tokens
from logitjax.distillation.tokenizers._token_pieces import token_projection
from logitjax.distillation.training._served_teacher import ServedTeacher
from logitjax.distillation.training._source import Source
from logitjax.distillation.training._teacher_cache import TeacherCache, TeacherIdentity
from logitjax.distillation.training._teachers import (
    Kept,
    Reader,
    cache_teacher,
    model_reader,
    open_teacher_caches,
    server_reader,
)

# Teachers that do not run on this machine.
_NO_MODELS = ("cache", "api")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """Text, teachers that read it, and how much of their output is kept.

    Attributes:
        data: Text to learn from, such as jsonl:PATH or hf:ORG/NAME (see `data.load_examples`).
        teachers: Model to learn from, `cache:DIR` as written by `logitjax cache-logits`, or
            `api:URL`.
        seq_len: Number of tokens in a row.
        on_error: Whether a malformed row of the text is an error (raise) or is skipped (skip).
        top_k: Number of a teacher's top logits to cache per position, or to request from a server.
        tail_samples: Number of samples of the other tokens, which make `kl` unbiased.
        batch_size: Number of rows that a teacher reads at once.
        dtype: Type that teachers compute in.
        layout: Layout of teachers.
        api_key: Key of servers.
        served_rank: Rank of the low-rank code in which a live server sends hidden states; 0
            requests the states themselves.
        terms: Terms that will use the corpus, which reads and keeps what they declare of teachers.
        teacher_reads: Whether teachers read the text once before training, into a `'cache'` on
            disk, or during training (`'live'`), in which case they stay in memory, nothing is
            cached, and terms may use their hidden states.
        teacher_devices: Devices that a teacher is split over: those of each process (`'local'`),
            which then reads its own share of the rows, or those of all processes (`'all'`), for a
            teacher too large for one host.
        fit_to: Further models whose tokenizers the rows must fit. Runs with other teachers then
            learn from the same rows, so that their scores can be compared.
    """

    data: str
    teachers: tuple[str, ...] = ()
    seq_len: int = 256
    on_error: Literal["raise", "skip"] = "raise"
    top_k: int = 64
    tail_samples: int = 0
    batch_size: int = storage.option(4, execution=True)
    dtype: Literal["float32", "bfloat16"] = "float32"
    layout: Literal["stacked", "listed"] = "listed"
    api_key: str | None = storage.option(None, secret=True)
    served_rank: int = 0
    terms: tuple[Term, ...] = ()
    teacher_reads: Literal["cache", "live"] = "cache"
    teacher_devices: Literal["local", "all"] = storage.option("local", execution=True)
    fit_to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A position predicts the next token, so a row of one token has no label.
        limits = {"seq_len": 2, "top_k": 1, "tail_samples": 0, "batch_size": 1, "served_rank": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.teacher_reads not in ("cache", "live"):
            raise ValueError(
                f"teacher_reads: expected 'cache' or 'live', got {self.teacher_reads!r}"
            )
        taught = next((str(term) for term in self.terms if term.teacher is not None), None)
        if taught and not self.teachers:
            raise ValueError(f"teacher: expected a teacher for the loss {taught!r}, got none")
        for spec in self.teachers:
            if self.teacher_reads == "live" and spec.startswith("cache:"):
                raise ValueError(f"teacher_reads: expected 'cache' for {spec!r}, got 'live'")

    @property
    def needs(self) -> list[TeacherNeeds]:
        """Return the union of the terms' needs of teachers."""
        return [term.teacher for term in self.terms if term.teacher is not None]

    @property
    def likelihoods(self) -> bool:
        """Whether likelihoods are kept."""
        return any(needs.chunks for needs in self.needs)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the teachers in batches and folders, in their order."""
        return tuple(f"source{i}" for i in range(len(self.teachers)))

    def check(self, tokenizer: models.Tokenizer, objectives: Sequence[Objective]) -> None:
        """Raise a ValueError, before any reading, if a teacher cannot serve a loss; names both."""
        specs = self.teachers
        prints = [_tokenizer_of(spec, tokenizer).fingerprint for spec in specs]
        for objective in objectives:
            for loss, (term, _) in zip(objective.names, objective.terms, strict=True):
                if term.teacher is None:
                    continue
                for spec, fingerprint in zip(specs, prints, strict=True):
                    other = fingerprint != tokenizer.fingerprint
                    _check_needs(self, loss, term.teacher, spec, other_tokenizer=other)

    def pack(self, tokenizer: models.Tokenizer, directory: epath.Path) -> PackedSplits:
        """Pack the text into rows under the tokenizers of the student and of every teacher.

        Raises:
            ValueError: Rows are longer than a teacher can read, or `data.pack_splits` refuses them.
        """
        tokenizers = {"pivot": tokenizer}
        for name, spec in zip(self.names, self.teachers, strict=True):
            tokenizers[name] = _tokenizer_of(spec, tokenizer)
            if spec.partition(":")[0] not in _NO_MODELS:
                longest = models.load_config(spec).max_length
                if self.seq_len > longest:
                    raise ValueError(
                        f"seq_len: expected at most {longest}, the length that teacher {spec!r} "
                        f"reads, got {self.seq_len}"
                    )
        # These only decide how rows are cut.
        for i, spec in enumerate(self.fit_to):
            tokenizers[f"fit{i}"] = _tokenizer_of(spec, tokenizer)
        return data.pack_splits(
            self.data, tokenizers, seq_len=self.seq_len, on_error=self.on_error, directory=directory
        )

    def load(
        self,
        packed: PackedSplits,
        rows: Mapping[str, np.ndarray],
        directory: epath.Path,
        loaded: Mapping[str, tuple[models.Decoder, models.Tokenizer]] | None = None,
    ) -> "Corpus":
        """Load the teachers' output on the rows that runs visit, from caches or by reading now.

        Args:
            rows: Visited rows of each split, see `Course.visited_rows`.
            directory: Folder of the teachers' caches.
            loaded: Teachers that are already loaded, by their spec.

        Raises:
            ValueError: A cache was made from other inputs, or a server does not answer.
        """
        for split in packed.splits if self.teachers else ():
            Corpus(packed=packed, sources={}, specs=self.teachers)._routes(split)
        named, loaded = dict(zip(self.names, self.teachers, strict=True)), loaded or {}
        live = self.teacher_reads == "live"
        # Caches and servers first, so that their errors appear before models read for hours.
        order = {"cache": 0, "api": 1}
        soonest = sorted(named, key=lambda name: order.get(named[name].partition(":")[0], 2))
        caches = {
            name: _caches(self, packed, rows, directory, loaded, name=name)
            for name in ([] if live else soonest)
        }
        sources = {}
        # In the user's order, which weights and batches follow.
        for name, spec in named.items():
            columns = packed.names[name]
            reader = _reader(self, spec, packed.tokenizers[columns], loaded) if live else None
            vocabularies = _vocabularies(self, packed, columns, directory)
            sources[name] = Source(columns, packed, caches.get(name, {}), vocabularies, reader)
        return Corpus(packed=packed, sources=sources, specs=self.teachers)

    def record(self, graphdef: Any, params: Any, columns: Mapping[str, Any], rows: Any) -> Any:
        """Return a teacher's output on rows with these numbers, as it is kept."""
        return _kept(self).of_model(graphdef, params, columns, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Packed rows of every split, and the teachers that have read them.

    Attributes:
        packed: Rows under every model's tokenizer; the student's is called `pivot`.
        sources: Each teacher's output, by its name.
        specs: Names by which users specify the teachers, in the same order.
    """

    packed: PackedSplits
    sources: Mapping[str, Source]
    specs: tuple[str, ...] = ()

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Return metrics of live teachers since the last call."""
        readers = {name: s.reader for name, s in self.sources.items() if s.reader is not None}
        return {
            f"{source}/{name}": pair
            for source, reader in readers.items()
            for name, pair in reader.metrics().items()
        }

    @property
    def constants(self) -> dict[str, Any]:
        """Constants of a step: heads of live teachers that give hidden states."""
        readers = {name: source.reader for name, source in self.sources.items()}
        heads = {
            name: r.head for name, r in readers.items() if r is not None and r.head is not None
        }
        return {"teachers": heads} if heads else {}

    @functools.cached_property
    def _label_bytes(self) -> np.ndarray:
        name = self.packed.names["pivot"]
        return self.packed.tokenizers[name].byte_lengths()

    def tokenizer_table(self, rows: int = 64) -> list[dict[str, Any]]:
        """Tabulate, for teachers with other tokenizers, projections and the alignment of `rows`."""
        pivot, out = self.packed.names["pivot"], []
        # From the training split, to show the share of labels that losses will use.
        split = self.packed.splits["train"]
        batch = split.rows(np.arange(min(rows, len(split))))
        # The first token of a row is no label.
        total = batch[pivot]["loss_mask"][:, 1:].sum()
        for name, source in self.sources.items():
            if source.columns == pivot:
                continue
            chunks = source.chunks(batch)
            # One token on both sides.
            single = ((chunks.our_sizes == 1) & (chunks.their_sizes == 1)).sum()
            meets = {
                "teacher": name,
                "chunks 1:1 %": 100 * float(single / max(chunks.counts.sum(), 1)),
                "labels in 1:1 %": 100 * float(chunks.one_to_one.sum() / total),
                "labels in chunks %": 100 * float((chunks.ours >= 0).sum() / total),
                "starts shared %": 100 * float(chunks.starts.sum() / total),
            }
            result = source.vocabularies.projections.values()
            out += [meets | projection.summary() for projection in result] or [meets]
        return out

    def batch(self, split: str, rows: Mapping[str, Any], *, taught: bool) -> dict[str, Any]:
        """Return the student's columns of some rows, with the teachers' output if requested."""
        batch: dict[str, Any] = {"pivot": dict(self.packed.columns(rows, "pivot"))}
        if taught:
            batch["sources"] = {
                name: source.view(split, rows) for name, source in self.sources.items()
            }
            if "teacher" in rows:
                batch["teacher_weights"] = self._routes(split)[rows["teacher"]]
        return batch

    def _routes(self, split: str) -> np.ndarray:
        """One-hot `[teachers of the data, sources]`: the source that is a row's teacher."""
        named = list(self.packed.splits[split].routes)
        unknown = [name for name in named if name not in self.specs]
        if unknown:
            raise ValueError(
                f"teacher: expected one of {list(self.specs)}, got {unknown[0]!r} in the data"
            )
        return np.array([[spec == name for spec in self.specs] for name in named], np.float32)

    def scored(
        self, split: str, mesh: Mesh, *, batch_size: int, rows: int
    ) -> Iterator[dict[str, Any]]:
        """Yield this process's held-out batches for `Student.score`."""
        index, count = training.BatchLayout(mesh).share
        first = next(iter(self.sources.values()), None)
        batches = self.packed.splits[split].iterate_once(
            batch_size=batch_size, process_index=index, process_count=count, max_rows=rows
        )
        for stored in batches:
            batch = self.batch(split, stored, taught=False)
            # A padded vocabulary has ids beyond the tokenizer; none of them is a label that counts.
            labels = np.minimum(batch["pivot"]["tokens"][:, 1:], len(self._label_bytes) - 1)
            batch["bytes"] = self._label_bytes[labels].astype(np.int32)
            if first is not None and first.columns == self.packed.names["pivot"]:
                statistics = first.view(split, stored).statistics
                assert statistics is not None
                # With the mass of the rest as one bucket instead of samples, scores have no noise.
                batch["teacher"] = dataclasses.replace(statistics, tail=None)
            yield batch


def _check_needs(
    reading: Reading, loss: str, needs: TeacherNeeds, spec: str, *, other_tokenizer: bool
) -> None:
    kept = _identity(spec).k if spec.startswith("cache:") else reading.top_k
    if needs.top_k > 1 and kept < needs.top_k:
        raise ValueError(
            f"loss {loss!r} compares the top {needs.top_k} logits, but teacher {spec!r} has {kept}"
        )
    if needs.top_k and needs.rest and spec.startswith("cache:") and not _identity(spec).rest:
        raise ValueError(
            f"loss {loss!r} needs the mass of all but the top logits, which teacher {spec!r} "
            "lacks; use kl"
        )
    if needs.same_vocabulary and other_tokenizer:
        raise ValueError(
            f"loss {loss!r} needs one vocabulary, but teacher {spec!r} has a different tokenizer "
            "than the student; use first_piece, alm or uld"
        )
    from_server = spec.startswith("api:") and reading.teacher_reads == "cache"
    if needs.moments and from_server:
        raise ValueError(
            f"loss {loss!r} needs the mean and deviation of all logits, which teacher {spec!r} "
            "does not report; use kl or uld"
        )
    if needs.chunks and from_server:
        raise ValueError(
            f"loss {loss!r} needs the log-probability of every label, which teacher {spec!r} does "
            "not report; use first_piece or kl"
        )
    if needs.hidden and reading.teacher_reads != "live":
        raise ValueError(
            f"loss {loss!r} needs hidden states of teacher {spec!r}, which no cache contains; use "
            "--teacher_reads=live, or kl"
        )


def _caches(
    reading: Reading,
    packed: PackedSplits,
    rows: Mapping[str, np.ndarray],
    directory: epath.Path,
    loaded: Mapping[str, tuple[models.Decoder, models.Tokenizer]],
    *,
    name: str,
) -> dict[str, TeacherCache]:
    """Get a teacher's output by split, from its caches or by reading now."""
    spec, columns = reading.teachers[reading.names.index(name)], packed.names[name]
    kind, _, location = spec.partition(":")
    if kind == "cache":
        fingerprint = packed.tokenizers[columns].fingerprint
        made_from = {"tokenizer": fingerprint, "tail_samples": reading.tail_samples}
        caches = open_teacher_caches(epath.Path(location), packed, rows, **made_from)
    else:
        caches = cache_teacher(
            spec,
            functools.partial(_reader, reading, spec, packed.tokenizers[columns], loaded),
            columns=columns,
            packed=packed,
            rows=rows,
            k=reading.top_k,
            # A server does not sample the tail.
            tail_samples=0 if kind == "api" else reading.tail_samples,
            likelihoods=reading.likelihoods,
            batch_size=reading.batch_size,
            directory=directory / name,
        )
    if reading.likelihoods and not all(c.identity.likelihoods for c in caches.values()):
        raise ValueError(
            f"teacher {spec!r}: expected a cache with likelihoods, for a loss of chunks, got one "
            "without: write it with --likelihoods"
        )
    return caches


def _vocabularies(
    reading: Reading, packed: PackedSplits, columns: str, directory: epath.Path
) -> Vocabularies:
    student, teacher = (packed.tokenizers[n] for n in (packed.names["pivot"], columns))
    rules: Any = [needs.projection for needs in reading.needs if needs.projection]
    return Vocabularies(
        projections={
            rule: token_projection(student, teacher, rule=rule, directory=directory)
            for rule in rules
        },
        boundary=boundary_tokens(student) if reading.likelihoods else None,
    )


def _identity(spec: str) -> TeacherIdentity:
    # All splits have the same identity.
    return TeacherCache(epath.Path(spec.partition(":")[2]) / data.SPLITS[0]).identity


def _tokenizer_of(spec: str, students: models.Tokenizer) -> models.Tokenizer:
    kind, _, location = spec.partition(":")
    if kind == "api":
        # Requests to a server have ids, so it reads the student's tokens.
        return students
    if kind == "cache":
        if not location:
            raise ValueError(f"teacher: expected cache:DIR, got {spec!r}")
        # The cache records its model.
        return _tokenizer_of(_identity(spec).model, students)
    return models.load_tokenizer(spec)


def _kept(reading: Reading, boundary: TokenSet | None = None) -> Kept:
    hidden = any(needs.hidden for needs in reading.needs)
    sizes: Any = {"k": reading.top_k, "tail_samples": reading.tail_samples}
    return Kept(**sizes, boundary=boundary, hidden=hidden)


def _reader(
    reading: Reading,
    spec: str,
    tokenizer: models.Tokenizer,
    loaded: Mapping[str, tuple[models.Decoder, models.Tokenizer]],
) -> Reader:
    kept = _kept(reading, boundary_tokens(tokenizer) if reading.likelihoods else None)
    if spec.startswith("api:") and reading.teacher_reads == "live":
        url = spec.removeprefix("api:")
        return ServedTeacher(
            url, tokenizer=tokenizer.fingerprint, rank=reading.served_rank, api_key=reading.api_key
        ).reader(kept)
    if spec.startswith("api:"):
        return server_reader(
            spec.removeprefix("api:"),
            k=reading.top_k,
            tokenizer=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            api_key=reading.api_key,
        )
    # With local devices alone a process need not wait for the others.
    devices = jax.local_devices() if reading.teacher_devices == "local" else jax.devices()
    mesh, dtype = training.make_mesh("fsdp:-1", devices=devices), reading.dtype
    options = {"dtype": dtype, "param_dtype": dtype, "layout": reading.layout}
    load = functools.partial(models.load, spec, mesh=mesh, **options)
    return model_reader((lambda: loaded[spec]) if spec in loaded else load, kept, mesh)

"""Teachers that read packed rows into caches: a model, or a server."""

import dataclasses
import functools
import http.client
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from logitjax import data, leakage, losses, models, processes, training
from logitjax.distillation.tokenizers._likelihood_matching import TokenSet, linear_likelihood
from logitjax.distillation.training._student import hidden_states, weights_digest
from logitjax.distillation.training._teacher_cache import KIND, TeacherCache, TeacherIdentity
from logitjax.storage import Manifest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """A teacher ready to read.

    Attributes:
        read: Maps columns `[rows, length]` and row numbers to a record of a `TeacherCache`.
        weights: Digest of its weights; empty for a server, which does not reveal them.
        head: Its `losses.Head`, if it returns hidden states.
        kept: Numbers of top logits and of samples from the rest that are kept.
        metrics: Returns pairs of a sum and a count since the last call.
        shared: Whether all processes must call `read`, equally often and with equally many rows.
    """

    tokenizer: str
    vocab_size: int
    read: Callable[[Mapping[str, Any], np.ndarray], Mapping[str, Any]]
    weights: str = ""
    head: Any = None
    kept: tuple[int, int] = (0, 0)
    metrics: Callable[[], dict[str, tuple[float, float]]] = dict
    shared: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """Statistics of a teacher to keep at each position.

    `boundary` are tokens that begin a word, for likelihoods, or None; `hidden` asks for states too.
    """

    k: int
    tail_samples: int = 0
    boundary: TokenSet | None = None
    hidden: bool = False

    def of_model(self, graphdef: Any, params: Any, columns: Mapping[str, Any], rows: Any) -> Any:
        """Compute the statistics of a batch that a `TeacherCache` keeps, and hidden states."""
        model = nnx.merge(graphdef, params)
        hidden = hidden_states(model, columns)
        record = self.of_states(hidden, model.head_of(), columns, rows)
        return record | ({"hidden": hidden} if self.hidden else {})

    def of_states(
        self, hidden: Any, head: losses.Head, columns: Mapping[str, Any], rows: Any
    ) -> dict[str, Any]:
        """Compute the same from existing hidden states."""
        statistics = losses.linear_readout(hidden, head, top_k=self.k).statistics
        names = ("values", "indices", "log_z", "mean", "std")
        record = {name: getattr(statistics, name) for name in names}
        if self.boundary is not None:
            labels = jnp.asarray(columns["tokens"])[:, 1:]
            record |= linear_likelihood(hidden, head, labels, self.boundary)._asdict()
        if self.tail_samples:

            def draw(row: Any) -> losses.TailSample:
                here, top_ids, number = row
                # Keyed by row number, so that samples do not depend on batch size or order.
                key = jax.random.fold_in(jax.random.key(0), number)
                return losses.TailSample.draw(key, head.logits(here), top_ids, self.tail_samples)

            # One row at a time, because this forms all logits.
            tail = jax.lax.map(draw, (hidden, statistics.indices, jnp.asarray(rows, jnp.uint32)))
            record |= {"tail_values": tail.values, "tail_indices": tail.indices}
        return record


def model_reader(
    load: Callable[[], tuple[models.Decoder, models.Tokenizer]],
    kept: Kept,
    mesh: Mesh | None = None,
) -> Reader:
    """Build a reader from a decoder; `mesh` may span all processes."""
    decoder, tokenizer = load()
    apply_fn, params = models.from_nnx(decoder)
    layout = None if mesh is None else training.BatchLayout(mesh)
    program = jax.jit(
        functools.partial(kept.of_model, apply_fn.graphdef),
        out_shardings=None if layout is None else layout.sharding,
    )

    def read(columns: Mapping[str, Any], rows: np.ndarray) -> Mapping[str, Any]:
        if layout is None:
            return jax.device_get(program(params, columns, rows))
        # In whole pieces, because a device without rows would still gather the parameters.
        pieces = layout.pieces // layout.share[1]
        padded = -len(rows) % pieces

        def pad(x: Any) -> np.ndarray:
            return np.pad(x, ((0, padded),) + ((0, 0),) * (np.ndim(x) - 1), mode="edge")

        placed, numbers = layout.place((jax.tree.map(pad, dict(columns)), pad(rows)))
        with jax.sharding.use_abstract_mesh(layout.mesh.abstract_mesh):
            record = program(params, placed, numbers)
        return jax.tree.map(lambda leaf: _own_rows(leaf)[: len(rows)], record)

    return Reader(
        tokenizer=tokenizer.fingerprint,
        vocab_size=decoder.config.vocab_size,
        read=read,
        # Digest of the weights, since a path may hold another model tomorrow.
        weights=weights_digest(params),
        head=jax.device_get(processes.local_copy(decoder.head_of())) if kept.hidden else None,
        kept=(kept.k, kept.tail_samples),
        shared=mesh is not None and mesh.devices.size > len(mesh.local_devices),
    )


def _own_rows(array: jax.Array) -> np.ndarray:
    """Rows on this process's devices."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def server_reader(
    url: str, *, k: int, tokenizer: str, vocab_size: int, api_key: str | None = None
) -> Reader:
    """Build a reader from a server with OpenAI's completion API, with one request per document.

    A server that does not `echo` a prompt's log-probabilities gets one request for each position to
    be learned. It must report ids of the student's vocabulary, otherwise a ValueError is raised.
    Reported log-probabilities have log-sum-exp 0; mean and deviation of all logits are unknown.
    """
    try:
        oracle = leakage.HttpOracle(url, leakage.LogitPolicy(top_k=k), api_key=api_key)
    except ValueError as error:
        raise ValueError(f"teacher api:{url}: {error}") from None

    echoes: list[bool] = []

    def read(columns: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
        tokens, segments = np.asarray(columns["tokens"]), np.asarray(columns["segment_ids"])
        expected = np.argwhere(np.asarray(columns["loss_mask"])[:, 1:])
        documents = packed_documents(segments, expected)
        pieces = [tokens[row, start:stop] for row, start, stop in documents]
        if pieces and not echoes:
            echoes.append(_asked(url, k, lambda: _echoes(oracle, pieces[0])))
        shape = (len(tokens), tokens.shape[1] - 1)
        record = {
            "values": np.zeros((*shape, k), np.float32),
            "indices": np.broadcast_to(np.arange(k, dtype=np.int32), (*shape, k)).copy(),
            # One array for both, since nothing writes into it.
            **dict.fromkeys(("log_z", "mean"), np.zeros(shape, np.float32)),
            "std": np.ones(shape, np.float32),
        }
        if pieces and echoes[0]:
            places = [(row, slice(start, stop - 1)) for row, start, stop in documents]
            answers = _asked(url, k, lambda: oracle.read(pieces))
        elif pieces:
            places = [tuple(expected.T)]
            answers = [_asked(url, k, lambda: oracle.ask(_prefixes(tokens, segments, expected)))]
        else:
            places, answers = [], []
        for location, answer in zip(places, answers, strict=True):
            if answer.values.shape[-1] != k:
                raise ValueError(
                    f"teacher api:{url}: expected {k} log-probabilities per answer, got "
                    f"{answer.values.shape[-1]}"
                )
            record["values"][location], record["indices"][location] = answer.values, answer.tokens
        return record

    return Reader(tokenizer=tokenizer, vocab_size=vocab_size, read=read)


def packed_documents(segments: np.ndarray, targets: np.ndarray) -> list[tuple[int, int, int]]:
    """Row, start and stop of each document in packed rows, up to its last requested target."""
    entries: dict[tuple[int, int], int] = {}
    for row, location in targets.tolist():
        start = int(np.argmax(segments[row] == segments[row, location]))
        # A target at `location` predicts token `location + 1`, which must lie before the stop.
        entries[row, start] = max(entries.get((row, start), 0), location + 2)
    return [(row, start, stop) for (row, start), stop in entries.items()]


def _prefixes(tokens: np.ndarray, segments: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """Tokens before each requested target, within its document."""
    prefixes = []
    for row, location in targets:
        here = segments[row, : location + 1] == segments[row, location]
        prefixes.append(tokens[row, : location + 1][here])
    return prefixes


def _echoes(oracle: Any, piece: np.ndarray) -> bool:
    """Whether a server reports log-probabilities of a prompt."""
    try:
        oracle.read([piece])
    except (RuntimeError, KeyError, TypeError, ValueError):
        # Refused or incomplete; requests for single positions then report what is wrong.
        return False
    return True


def _asked(url: str, k: int, ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"teacher api:{url}: no server answers ({error})") from None
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"teacher api:{url}: expected {k} log-probabilities with token ids ({error})"
        ) from None


def cache_teacher(
    spec: str,
    reader: Callable[[], Reader],
    *,
    columns: str,
    packed: data.PackedSplits,
    rows: Mapping[str, np.ndarray],
    k: int,
    tail_samples: int = 0,
    likelihoods: bool = False,
    batch_size: int,
    directory: epath.Path,
) -> dict[str, TeacherCache]:
    """Let a teacher read requested rows that it has not yet read; return the caches by split.

    Raises a ValueError for a cache of other rows, or of other weights if rows are missing.
    """
    cached_reader = functools.cache(reader)
    rows = {split: expected for split, expected in rows.items() if len(expected)}
    kept = {"k": k, "tail_samples": tail_samples, "likelihoods": likelihoods}
    expected = {
        split: {"model": spec, "data": packed.splits[split].fingerprint, **kept} for split in rows
    }
    # Check all caches before the teacher reads for hours.
    caches = {
        split: TeacherCache(directory / split)
        for split in rows
        if Manifest(directory / split, KIND).exists()
    }
    for split, cache in caches.items():
        cache.check(**expected[split])
    complete = [s for s in rows if s in caches and not len(caches[s].missing(rows[s]))]
    # Processes see a shared disk at different times, but must agree on what is missing.
    complete = processes.broadcast_from_first(lambda: complete)
    incomplete = [split for split in rows if split not in complete]
    if incomplete:
        _check_weights(caches.values(), cached_reader().weights)
    for split in incomplete:
        path, dataset = directory / split, packed.splits[split]
        identity = TeacherIdentity(
            **expected[split],
            tokenizer=cached_reader().tokenizer,
            vocab_size=cached_reader().vocab_size,
            positions=dataset.seq_len - 1,
            weights=caches[split].identity.weights if split in caches else cached_reader().weights,
        )

        # Bound now, since the loop moves on before the last chunk is read.
        def compute(chunk: np.ndarray, dataset: Any = dataset) -> Any:
            return cached_reader().read(dataset.rows(chunk)[columns], chunk)

        share: Any = {
            "batch_size": batch_size,
            "rows_per_shard": 64,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        cache = TeacherCache(path, identity)
        calls = cache.calls(rows[split], **share) if cached_reader().shared else 0
        cache.fill(rows[split], compute, label=spec, **share)
        if cached_reader().shared:
            # A process with fewer rows still holds a part of the teacher that the others need.
            most = int(multihost_utils.process_allgather(np.int32(calls)).max())
            for _ in range(most - calls):
                compute(np.resize(rows[split], batch_size))
        # Each process has written a share; the cache is whole when all are done.
        processes.barrier(f"read {path}")
        caches[split] = TeacherCache(path)
    return {split: caches[split] for split in rows}


def _check_weights(caches: Iterable[TeacherCache], weights: str) -> None:
    """Raise a ValueError if a cache was read by other weights."""
    for cache in caches:
        # Caches of earlier versions have no digest.
        if cache.identity.weights:
            cache.check(weights=weights)


def open_teacher_caches(
    directory: epath.Path, packed: data.PackedSplits, rows: Mapping[str, Any], **made_from: Any
) -> dict[str, TeacherCache]:
    """Open caches written earlier, and check their data and what else they were made from."""
    caches = {}
    for split, expected in rows.items():
        if not len(expected):
            continue
        cache = TeacherCache(directory / split)
        cache.check(data=packed.splits[split].fingerprint, **made_from)
        missing = cache.missing(expected)
        if len(missing):
            raise ValueError(
                f"teacher cache {cache.directory} lacks {len(missing)} of the rows that this run "
                f"visits, such as {missing[0]}: write it with --rows=all"
            )
        caches[split] = cache
    return caches

"""Hidden states on disk: computed once, so that everything about a head is quick afterwards."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from logitjax.storage import Manifest, RowCache, digest, write_atomic

_KIND = "hidden states"


@dataclasses.dataclass(frozen=True)
class HiddenCache:
    """Positions to predict from: float32 ``hidden [count, hidden]``, int32 ``labels [count]``."""

    hidden: np.ndarray
    labels: np.ndarray

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the labels and a sample of the hidden states."""
        return sampled_digest((self.hidden, self.labels))

    def __len__(self) -> int:
        return len(self.labels)


def sampled_digest(arrays: Any) -> str:
    """Tells hidden states and heads apart without reading gigabytes."""
    return digest(arrays, sample=4096)


class _Codec:
    """A batch's positions, as many as its mask leaves: their count and width, labels, states."""

    bytes_per_row = 0  # differs from batch to batch

    def encode(self, computed: HiddenCache, count: int) -> list[bytes]:
        header = np.asarray(computed.hidden.shape, "<i8")
        labels, hidden = computed.labels.astype("<i4"), computed.hidden.astype("<f4")
        return [header.tobytes() + labels.tobytes() + hidden.tobytes()]

    def decode(self, records: Sequence[bytes]) -> HiddenCache:
        parts = []
        for record in records:
            count, width = (int(n) for n in np.frombuffer(record, "<i8", 2))
            labels = np.frombuffer(record, "<i4", count, offset=16)
            hidden = np.frombuffer(record, "<f4", count * width, offset=16 + 4 * count)
            parts.append((hidden.reshape(count, width), labels))
        hidden, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return HiddenCache(hidden, labels)


def cache_hidden_states(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    directory: str | os.PathLike[str],
    *,
    max_tokens: int,
    source: str = "",
    log_every: int = 20,
) -> HiddenCache:
    """Run a decoder over packed batches once and keep what its head sees.

    A directory that already holds the cache is read instead, if it is of this model and ``source``,
    and a run that was killed goes on after the batches it has finished. Positions whose next token
    is not to be predicted are left out.

    Args:
      model: a `logitjax.models.Decoder`, or anything with its ``hidden_states``.
      batches: one tokenizer's part of the batches of a `logitjax.data.PackedDataset`: ``tokens``,
        ``positions``, ``segment_ids``, ``loss_mask``, each ``[batch, time]``. The same ones on
        every call.
      directory: a local directory, which becomes the cache.
      max_tokens: stop at so many positions.
      source: names the batches, e.g. by a `PackedDataset`'s fingerprint; a cache of others is
        refused.
      log_every: batches between log lines.

    Returns:
      `HiddenCache` of at most ``max_tokens`` positions, memory-mapped.

    Raises:
      ValueError: the directory holds, in full or in part, the cache of another ``max_tokens``,
        model or ``source``.
    """
    root = epath.Path(directory)
    graphdef, state = nnx.split(model)
    made_from = {
        "max_tokens": max_tokens,
        "model": sampled_digest(_without_head(state)),
        "source": source,
    }
    if Manifest(root, _KIND).exists():
        Manifest(root, _KIND).check(made_from)
        return open_hidden_states(root)
    # One row a batch, until all are there.
    parts = RowCache(root / "parts", _Codec(), made_from=made_from, kind=_KIND)

    @jax.jit
    def run(state: Any, tokens: Any, positions: Any, segment_ids: Any) -> jax.Array:
        hidden, _ = nnx.merge(graphdef, state).hidden_states(
            tokens, positions=positions, segment_ids=segment_ids
        )
        return hidden.astype(np.float32)

    count, used = 0, 0
    finished = set(parts.row_numbers.tolist())
    for index, batch in enumerate(batches):
        if index not in finished:
            hidden = run(state, batch["tokens"], batch["positions"], batch["segment_ids"])
            keep = np.asarray(batch["loss_mask"])[:, 1:]
            labels = np.asarray(batch["tokens"])[:, 1:][keep]
            parts.add([index], HiddenCache(np.asarray(hidden)[:, :-1][keep], labels))
            count += len(labels)
        else:
            count += len(parts.read([index]))
        used = index + 1
        if index % log_every == 0:
            logging.info("hidden states: %d of %d positions", min(count, max_tokens), max_tokens)
        if count >= max_tokens:
            break
    if not used:
        raise ValueError("batches: nothing to run the model over")
    held = parts.read(range(used))
    # Whole arrays, because tuning draws positions at random from memory-mapped ones.
    for name in ("hidden", "labels"):
        array = getattr(held, name)[:max_tokens]
        write_atomic(root / f"{name}.npy", functools.partial(np.save, arr=array))
    Manifest(root, _KIND).write(made_from, {"count": min(count, max_tokens)})
    parts.directory.rmtree()
    return open_hidden_states(root)


def _without_head(state: Any) -> Any:
    """The parameters that hidden states depend on."""
    return {name: part for name, part in nnx.to_pure_dict(state).items() if name != "head"}


def open_hidden_states(directory: str | os.PathLike[str]) -> HiddenCache:
    """A finished cache, for those who no longer have the model that it was made with."""
    root = epath.Path(directory)
    Manifest(root, _KIND).read()
    return HiddenCache(hidden=_opened(root / "hidden.npy"), labels=_opened(root / "labels.npy"))


def _opened(path: epath.Path) -> np.ndarray:
    """Memory-mapped where the file system allows it; an object store is read whole."""
    if "://" in os.fspath(path):
        with path.open("rb") as file:
            return np.load(file)
    return np.load(os.fspath(path), mmap_mode="r")

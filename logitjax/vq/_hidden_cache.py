"""Hidden states on disk: computed once, so that everything about a head is quick afterwards."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx


@dataclasses.dataclass(frozen=True)
class HiddenCache:
    """Positions to predict from: float32 ``hidden [count, hidden]``, int32 ``labels [count]``."""

    hidden: np.ndarray
    labels: np.ndarray

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the labels and a sample of the hidden states."""
        return fingerprint_of((self.hidden, self.labels))

    def __len__(self) -> int:
        return len(self.labels)


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
    wanted = {
        "max_tokens": max_tokens,
        "model": fingerprint_of(without_head(state)),
        "source": source,
    }
    done, begun = root / "cache.json", root / "begun.json"
    for record in (done, begun):
        if record.exists():
            held = json.loads(record.read_text())
            for name, value in wanted.items():
                if held.get(name) != value:
                    raise ValueError(
                        f"{root} holds hidden states for {name}={held.get(name)}, not {value}: "
                        "remove it or choose another directory"
                    )
    if done.exists():
        return open_hidden_states(root)
    root.mkdir(parents=True, exist_ok=True)
    begun.write_text(json.dumps(wanted))

    @jax.jit
    def run(state: Any, tokens: Any, positions: Any, segment_ids: Any) -> jax.Array:
        hidden, _ = nnx.merge(graphdef, state).hidden_states(
            tokens, positions=positions, segment_ids=segment_ids
        )
        return hidden.astype(np.float32)

    count = 0
    for index, batch in enumerate(batches):
        part = root / f"part_{index:06d}.npz"
        if not part.exists():
            hidden = run(state, batch["tokens"], batch["positions"], batch["segment_ids"])
            keep = np.asarray(batch["loss_mask"])[:, 1:]
            arrays = {
                "hidden": np.asarray(hidden)[:, :-1][keep],
                "labels": np.asarray(batch["tokens"])[:, 1:][keep].astype(np.int32),
            }
            unfinished = root / "unfinished.npz"
            with unfinished.open("wb") as file:
                np.savez(file, **arrays)
            unfinished.replace(part)
        with part.open("rb") as file:
            count += len(np.load(file)["labels"])
        if index % log_every == 0:
            logging.info("hidden states: %d of %d positions", min(count, max_tokens), max_tokens)
        if count >= max_tokens:
            break
    parts = sorted(root.glob("part_*.npz"))
    if not parts:
        raise ValueError("batches: nothing to run the model over")
    held = [np.load(part) for part in parts]
    for name in ("hidden", "labels"):
        values = np.concatenate([arrays[name] for arrays in held])[:max_tokens]
        with (root / f"{name}.npy").open("wb") as file:
            np.save(file, values)
    done.write_text(json.dumps(wanted | {"count": min(count, max_tokens)}))
    for part in (*parts, begun):
        part.unlink()
    return open_hidden_states(root)


def fingerprint_of(arrays: Any, *, sample: int = 4096) -> str:
    """Shapes, types and evenly spaced numbers of a pytree of arrays, hashed.

    Not all numbers: any training changes every array, and the rows of a head can be gigabytes.

    >>> fingerprint_of(np.arange(3)) == fingerprint_of(np.arange(3))
    True
    >>> fingerprint_of(np.arange(3)) == fingerprint_of(np.arange(4))
    False
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        if not hasattr(leaf, "dtype") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        # Along the first axis, then the others: flattening would copy a sharded array.
        rows = leaf[:: max(1, leaf.shape[0] // 64)] if leaf.ndim else leaf
        flat = np.asarray(rows).reshape(-1)
        digest.update(flat[:: max(1, flat.size // sample)].tobytes())
    return digest.hexdigest()[:32]


def without_head(state: Any) -> Any:
    """The parameters that hidden states depend on."""
    return {name: part for name, part in nnx.to_pure_dict(state).items() if name != "head"}


def open_hidden_states(directory: str | os.PathLike[str]) -> HiddenCache:
    """A finished cache, for those who no longer have the model that it was made with."""
    root = epath.Path(directory)
    if not (root / "cache.json").exists():
        raise FileNotFoundError(f"{root} holds no finished cache of hidden states")
    return HiddenCache(
        hidden=np.load(os.fspath(root / "hidden.npy"), mmap_mode="r"),
        labels=np.load(os.fspath(root / "labels.npy")),
    )

"""Hidden states on disk: computed once, so that everything about a head is quick afterwards."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx


@dataclasses.dataclass(frozen=True)
class HiddenCache:
    """Positions to predict from: float32 ``hidden [count, hidden]``, int32 ``labels [count]``."""

    hidden: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def cache_hidden_states(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    directory: str | os.PathLike[str],
    *,
    max_tokens: int,
    log_every: int = 20,
) -> HiddenCache:
    """Run a decoder over packed batches once and keep what its head sees.

    A directory that already holds the cache is read instead, and a run that was killed goes on
    after the batches it has finished. Positions whose next token is not to be predicted are left
    out.

    Args:
      model: a `logitjax.models.Decoder`, or anything with its ``hidden_states``.
      batches: one tokenizer's part of the batches of a `logitjax.data.PackedDataset`: ``tokens``,
        ``positions``, ``segment_ids``, ``loss_mask``, each ``[batch, time]``. The same ones on
        every call.
      directory: a local directory, which becomes the cache.
      max_tokens: stop at so many positions.
      log_every: batches between log lines.

    Returns:
      `HiddenCache` of at most ``max_tokens`` positions, memory-mapped.

    Raises:
      ValueError: the directory holds a cache of another ``max_tokens``.
    """
    root = epath.Path(directory)
    done = root / "cache.json"
    if done.exists():
        held = json.loads(done.read_text())["max_tokens"]
        if held != max_tokens:
            raise ValueError(f"{root} holds hidden states for max_tokens={held}, not {max_tokens}")
        return _open(root)
    root.mkdir(parents=True, exist_ok=True)
    graphdef, state = nnx.split(model)

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
    done.write_text(json.dumps({"max_tokens": max_tokens, "count": min(count, max_tokens)}))
    for part in parts:
        part.unlink()
    return _open(root)


def _open(root: epath.Path) -> HiddenCache:
    return HiddenCache(
        hidden=np.load(os.fspath(root / "hidden.npy"), mmap_mode="r"),
        labels=np.load(os.fspath(root / "labels.npy")),
    )

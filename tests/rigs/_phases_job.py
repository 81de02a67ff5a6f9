"""A run of every phase that touches a disk: pack, read a source, restore, train, save.

``python -m tests.rigs._phases_job --workdir=DIR``; PHASES_STEPS steps, 8 by default.
"""

import dataclasses
import os
from typing import Any

import jax
import numpy as np
from etils import epath

from logitjax import data, models, processes, storage, training
from logitjax.commands import cli
from tests.rigs import _faults_job

EVERY = 4


@dataclasses.dataclass(frozen=True)
class Config:
    """One setting that decides nothing."""

    name: str = cli.field("phases", "A name.")


def _read_source(rows: data.PackedDataset, directory: epath.Path) -> storage.RowCache:
    """Values of a source for each row, each process its share; here the mean of its tokens."""
    codec = storage.ArrayCodec({"mean": ("float32", (1,))})

    def compute(chunk: np.ndarray) -> Any:
        tokens = rows.rows(chunk)["model"]["tokens"]
        return {"mean": tokens.mean(1, keepdims=True).astype(np.float32)}

    made_from = {"source": "mean"}
    storage.RowCache(directory, codec, made_from=made_from).fill(
        range(16),
        compute,
        batch_size=4,
        rows_per_shard=4,
        label="source",
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    processes.barrier("source")
    return storage.RowCache(directory, codec, made_from=made_from)


def run(config: Config, workdir: epath.Path) -> None:
    """All phases, one after another."""
    del config
    text = [{"text": f"the {word}th of many words. " * 4} for word in range(64)]
    streams = {"model": models.load_tokenizer("tiny")}
    with processes.first_before_others("pack"):
        rows = data.pack(text, streams, seq_len=65, directory=workdir / "packed")
    source = _read_source(rows, workdir / "source")
    mesh = training.make_mesh("data:-1")
    share = training.BatchLayout(mesh).rows(8)
    steps = int(os.environ.get("PHASES_STEPS", "8"))

    def batches(step: int) -> dict[str, Any]:
        mean = source.read(range(8))["mean"]
        return {"x": (_faults_job.batches(step, 0.0)["x"] + 1e-3 * mean)[share]}

    _faults_job.train(workdir, batches, mesh, steps=steps, every=EVERY)


if __name__ == "__main__":
    cli.main(Config, None, run)

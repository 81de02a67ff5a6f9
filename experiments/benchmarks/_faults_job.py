"""The run that the benchmark of faults kills: a small network, an update every few milliseconds.

``python -m experiments.benchmarks._faults_job WORKDIR STEPS``
"""

import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from logitjax import training

EVERY = 5
WIDTH = 64


def init(key: Any) -> dict[str, Any]:
    first, second = jax.random.split(key)
    return {
        "first": jax.random.normal(first, (WIDTH, WIDTH)) / 8,
        "second": jax.random.normal(second, (WIDTH, WIDTH)) / 8,
    }


def loss_fn(params: Any, batch: Any, rng: Any) -> tuple[Any, Any, dict]:
    hidden = jnp.tanh(batch["x"] @ params["first"])
    hidden *= jax.random.bernoulli(rng, 0.9, hidden.shape)
    error = hidden @ params["second"] - jnp.roll(batch["x"], 1, axis=1)
    return (error**2).sum(), error.size, {}


def batches(step: int) -> dict[str, Any]:
    time.sleep(0.004)
    return {"x": np.random.default_rng([3, step]).normal(size=(8, WIDTH)).astype(np.float32)}


def train(workdir: pathlib.Path, steps: int) -> None:
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    tx = training.Schedule(1e-2, warmup=2, total_steps=steps).optimizer()
    state = training.TrainState.create(init, tx, mesh=mesh)
    with training.Checkpointer(workdir / "checkpoints", max_to_keep=3) as checkpointer:
        training.train_loop(
            state,
            training.TrainStep(loss_fn, tx, mesh=mesh),
            batches,
            total_steps=steps,
            workdir=workdir,
            checkpointer=checkpointer,
            writer=training.make_writer(workdir),
            options=training.LoopOptions(checkpoint_every=EVERY, log_every=1, progress=False),
        )


if __name__ == "__main__":
    logging.set_verbosity(logging.INFO)
    train(pathlib.Path(sys.argv[1]), int(sys.argv[2]))

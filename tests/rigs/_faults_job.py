"""The run that benchmarks kill: a small network, an update every few milliseconds.

``python -m tests.rigs._faults_job WORKDIR STEPS [SECONDS_A_STEP]``
"""

import functools
import hashlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

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


def batches(step: int, seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {"x": np.random.default_rng([3, step]).normal(size=(8, WIDTH)).astype(np.float32)}


def train(
    workdir: epath.Path, batches: Any, mesh: jax.sharding.Mesh, *, steps: int, every: int = EVERY
) -> Any:
    """The state after so many steps of a run that saves every few of them."""
    # A restart may ask for more steps, and no rate may change by that.
    tx = training.Schedule(1e-2, warmup=2, total_steps=1000).optimizer()
    # A function: with no checkpoint that can be read the run begins anew.
    state = functools.partial(training.TrainState.create, init, tx, mesh=mesh)
    with training.Checkpointer(workdir / "checkpoints") as checkpointer:
        return training.train_loop(
            state,
            training.TrainStep(loss_fn, tx, mesh=mesh),
            batches,
            total_steps=steps,
            workdir=workdir,
            checkpointer=checkpointer,
            writer=training.make_writer(workdir),
            options=training.LoopOptions(checkpoint_every=every, log_every=1, progress=False),
        )


def main(words: Sequence[str]) -> None:
    logging.set_verbosity(logging.INFO)
    folder, steps, *more = words
    with training.lock_workdir(folder):
        rows = functools.partial(batches, seconds=float(*more or ["0.004"]))
        one = training.make_mesh("data:1", devices=jax.devices()[:1])
        final = train(epath.Path(folder), rows, one, steps=int(steps))
    text = hashlib.sha256()
    for leaf in jax.tree.leaves((final.params, final.opt_state, final.step)):
        text.update(np.asarray(leaf).tobytes())
    print("digest", text.hexdigest(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

"""A toy run that tests start as a process: ``python -m tests.training.toy WORKDIR [options]``."""

import argparse
import hashlib
import json
import os
import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from logitjax import training

BATCH, WIDTH, VOCAB = 16, 8, 16


def init(key):
    first, second = jax.random.split(key)
    return {
        "embedding": jax.random.normal(first, (VOCAB, WIDTH)),
        "head": {"kernel": jax.random.normal(second, (WIDTH, VOCAB)) / 3, "bias": jnp.zeros(VOCAB)},
    }


def loss_fn(params, batch, rng):
    hidden = params["embedding"][batch["tokens"]]
    hidden = hidden + 0.01 * jax.random.normal(rng, hidden.shape)
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], -1)[
        ..., 0
    ]
    mask = batch["mask"]
    correct = (logits.argmax(-1) == batch["labels"]) * mask
    return (losses * mask).sum(), mask.sum(), {"accuracy": (correct.sum(), mask.sum())}


def batches(step, index=0, count=1, batch=BATCH):
    rng = np.random.default_rng([7, step])
    tokens = rng.integers(0, VOCAB, (batch, 5), dtype=np.int32)
    # Rows differ in how much of them counts.
    mask = np.arange(5) < rng.integers(0, 6, (batch, 1))
    whole = {"tokens": tokens, "labels": (tokens * 3 + 1) % VOCAB, "mask": mask}
    rows = batch // count
    return {k: v[index * rows : (index + 1) * rows] for k, v in whole.items()}


def digest(tree):
    text = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        text.update(np.asarray(leaf).tobytes())
    return text.hexdigest()


def optimizer(total_steps=12):
    return training.Schedule(0.05, warmup=2, total_steps=total_steps).optimizer(weight_decay=0.1)


def train(
    workdir,
    *,
    mesh="data:-1",
    steps=12,
    every=4,
    source=None,
    eval_fn=None,
    identity=None,
    **options,
):
    """Trains on ``mesh``; gives the final state and the values logged by step."""
    mesh = training.make_mesh(mesh)
    share = training.BatchLayout(mesh).share
    tx = optimizer()
    state = training.TrainState.create(init, tx, mesh=mesh)
    step_fn = training.TrainStep(loss_fn, tx, accumulate=2, mesh=mesh)
    with training.Checkpointer(f"{workdir}/checkpoints") as checkpointer:
        return training.train_loop(
            state,
            step_fn,
            lambda step: (source or batches)(step, *share),
            total_steps=steps,
            workdir=workdir,
            checkpointer=checkpointer,
            eval_fn=eval_fn,
            writer=training.make_writer(workdir),
            identity=identity,
            options=training.LoopOptions(checkpoint_every=every, log_every=1, **options),
        )


def losses(workdir):
    """The logged losses by step."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--mesh", default="data:-1")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=4, help="steps between checkpoints")
    parser.add_argument("--signal", help="NAME@STEP or NAME@STEP@PROCESS: sent to itself")
    parser.add_argument("--hang", help="STEP@PROCESS: waits there for ever, alive")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds, before each step")
    flags = parser.parse_args()
    process, _ = training.distributed.initialize()
    name, at, *only = (flags.signal or "SIGTERM@-1").split("@")

    hang = [int(part) for part in (flags.hang or "-1@-1").split("@")]

    def source(step, index, count):
        time.sleep(flags.delay)
        if [step, process] == hang:
            time.sleep(3600)
        if step == int(at) and (not only or int(only[0]) == process):
            # Until then the run is too fast for a checkpoint to be on disk.
            while not (pathlib.Path(flags.workdir) / "checkpoints/4").is_dir():
                time.sleep(0.01)
            os.kill(os.getpid(), getattr(signal, name))
        return batches(step, index, count)

    logging.set_verbosity(logging.INFO)
    state = train(
        flags.workdir, mesh=flags.mesh, steps=flags.steps, every=flags.every, source=source
    )
    print("digest", digest(multihost_utils.process_allgather(state.params, tiled=True)))


if __name__ == "__main__":
    main()

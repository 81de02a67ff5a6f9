"""Teaching rows to a model: adapters that are merged into its weights."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from experiments.shared import fit
from logitjax import models, training, unlearning

# Lengths are multiples of it, to keep the number of programs small.
_MULTIPLE = 32


def batch_of_alike(lengths: np.ndarray, step: int, batch: int, seed: int) -> np.ndarray:
    """The rows of each step: similar in length, for little padding, and all in every epoch.

    Returns:
        Indices of rows. An epoch leaves out the rows that fill no batch, different ones each time.
    """
    count = max(1, len(lengths) // batch)
    epoch, location = divmod(step, count)
    rng = np.random.default_rng([seed, epoch])
    drawn = rng.permutation(len(lengths))[: count * batch]
    alike = drawn[np.argsort(lengths[drawn], kind="stable")]
    return np.array_split(alike, count)[rng.permutation(count)[location]]


def make_update(
    model: models.Decoder, rate: float, steps: int, mesh: Any, counts: Any = None
) -> tuple[fit.Update, Any]:
    """The update of adapters that learn rows, and its constants."""
    # A task vector learns the rows to forget.
    loss_fn, constants = unlearning.METHODS.parse("task_vector").make_loss(
        model, adapters=True, counts=counts
    )
    schedule = training.Schedule(rate, "linear", warmup=max(1, steps // 10), total_steps=steps)
    return fit.make_update(loss_fn, schedule, mesh=mesh, weight_decay=0.0, b2=0.99), constants


def teach(
    model: models.Decoder,
    rows: Sequence[tuple[np.ndarray, np.ndarray]],
    directory: epath.Path,
    *,
    steps: int,
    batch: int,
    rate: float,
    rank: int,
    seed: int = 0,
    pad_id: int = 0,
    mesh: str = "data:1",
) -> models.Decoder:
    """A model that has learned rows, or continues to learn them from where it stopped.

    Args:
        model: The untaught model, its layers listed.
        rows: Token ids, and whether each belongs to an answer.
        steps: Steps of AdamW.
        batch: Rows of a step.
        rate: Peak of the learning rate.
        seed: Seed of the order and of the adapters.
        pad_id: Any id the model has.
        mesh: Axes and sizes of the device mesh.
    """

    def batches(step: int) -> dict[str, dict[str, np.ndarray]]:
        picked = [rows[i] for i in batch_of_alike(lengths, step, batch, seed)]
        longest = -(-max(len(ids) for ids, _ in picked) // _MULTIPLE) * _MULTIPLE
        return {"forget": unlearning.Row.padded(picked, longest, pad_id=pad_id)}

    lengths = np.asarray([len(ids) for ids, _ in rows])
    counts = [{"forget": int(batches(step)["forget"]["mask"].sum())} for step in range(steps)]
    devices = training.make_mesh(mesh, partial=True)
    # Where rows are split, a device cannot know its number of tokens.
    existing = counts if devices.size == 1 else None
    update, constants = make_update(model, rate, steps, devices, existing)
    lora = fit.fit(
        update,
        models.Lora.init(model.config, rank, key=jax.random.key(seed), layout="listed"),
        batches,
        steps=steps,
        directory=directory,
        constants=constants,
        checkpoint_every=50,
    )
    # Off the training mesh: otherwise every program is compiled for models on it and off it.
    return nnx.jit(lambda lora, model: lora.merged_into(model))(jax.device_get(lora), model)

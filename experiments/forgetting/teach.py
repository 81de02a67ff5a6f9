"""Teaching a model rows: adapters that are merged into its weights."""

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from flax import nnx

from experiments.shared import fit
from logitjax import models, training, unlearning


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
) -> models.Decoder:
    """A model that knows rows, or goes on learning them where it was stopped.

    Args:
        model: Before, its layers listed.
        rows: Token ids and which of them are answers'.
        directory: Of checkpoints.
        steps: Of AdamW.
        batch: Rows of a step.
        rate: Peak of the learning rate.
        rank: Of the adapters.
        seed: Of the order and of the adapters.
        pad_id: Any id the model has.
    """
    # What a task vector learns is what is to be forgotten.
    loss_fn = unlearning.make_unlearning_loss(
        unlearning.UNLEARNING_METHODS["task_vector"], model, adapters=True
    )
    padded = unlearning.padded_rows(rows, max(len(ids) for ids, _ in rows), pad_id=pad_id)

    def batches(step: int) -> dict[str, dict[str, np.ndarray]]:
        places = range(step * batch, (step + 1) * batch)
        picked = [
            np.random.default_rng([seed, place // len(rows)]).permutation(len(rows))[
                place % len(rows)
            ]
            for place in places
        ]
        return {"forget": {name: values[picked] for name, values in padded.items()}}

    schedule = training.Schedule(rate, "linear", warmup=max(1, steps // 10), total_steps=steps)
    update = fit.make_update(
        loss_fn,
        schedule,
        mesh=training.make_mesh("data:1", devices=jax.devices()[:1]),
        weight_decay=0.0,
        b2=0.99,
    )
    lora = fit.fit(
        update,
        models.Lora.init(model.config, rank, key=jax.random.key(seed), layout="listed"),
        batches,
        steps=steps,
        directory=directory,
        constants=nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        checkpoint_every=50,
    )
    return nnx.jit(lambda lora, model: lora.merged_into(model))(lora, model)

"""The loss of finetuning on answers."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from logitjax.losses import linear_cross_entropy
from logitjax.models import Decoder
from logitjax.training import LossFn


def make_answer_loss(model: Decoder) -> LossFn:
    """The loss of finetuning on answers: mean cross-entropy of their tokens.

    Args:
        model: A decoder, or one of shapes alone (`nnx.eval_shape`).

    Returns:
        `loss_fn(params, batch, rng)` for `training.TrainStep`. Batches are `{"tokens",
        "mask"}`, int32 and bool `[rows, time]`, the mask True at the tokens of answers; rows that
        hold several questions have `segment_ids` too.
    """
    graphdef, _, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any) -> Any:
        del rng
        model = nnx.merge(graphdef, params, rest)
        hidden, _ = model.hidden_states(batch["tokens"], segment_ids=batch.get("segment_ids"))
        weights = batch["mask"][:, 1:].astype(jnp.float32)  # prompts are read, not learnt
        loss = linear_cross_entropy(
            hidden[:, :-1], model.head_of(), batch["tokens"][:, 1:], weights=weights
        )
        return loss, weights.sum(), {}

    return loss_fn

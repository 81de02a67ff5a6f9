"""What an optimiser step of unlearning minimises on rows of one's own, and its batches."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from logitjax.models import Decoder, first_layers
from logitjax.unlearning._assistant_loss import make_assistant_loss
from logitjax.unlearning._method_loss import make_unlearning_loss
from logitjax.unlearning._objective import UNLEARNING_METHODS
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._rows import padded_rows
from logitjax.unlearning._targets import rmu_direction
from logitjax.unlearning._unlearn_config import UnlearnConfig

_MULTIPLE = 8
# Of the rows to keep in a batch, where there is other text.
_TEXT_ROWS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """An optimiser step.

    Attributes:
      loss_fn: Of adapters, for `training.TrainStep`.
      batches: From the number of a step to its batch.
      constants: What no step changes.
    """

    loss_fn: Any
    batches: Callable[[int], Mapping[str, Any]]
    constants: Any


def make_update(model: Decoder, questions: Questions, config: UnlearnConfig) -> Update:
    """The loss of an assistant or of adapters, on rows to forget, rows to keep and other text."""
    sides = _sides(questions)
    size = config.batch_size
    few = min(_TEXT_ROWS, size - 1) if len(sides["text"]["tokens"]) else 0

    def batches(step: int) -> dict[str, Any]:
        seed = config.seed
        forget = _picked(sides["forget"], step, min(size, len(sides["forget"]["tokens"])), seed, 0)
        parts = [_picked(sides["retain"], step, size - few, seed, 1)]
        if few:
            parts.append(_picked(sides["text"], step, few, seed, 2))
        return {
            "forget": forget,
            "retain": {name: np.concatenate([p[name] for p in parts]) for name in forget},
        }

    # The head meets as many positions as any step has, for one program of all steps.
    counts = [
        {side: int(rows["mask"][:, 1:].sum()) for side, rows in batches(step).items()}
        for step in range(config.steps)
    ]
    if config.method == "difference":
        weight = 1.0 if config.retain_weight is None else config.retain_weight
        loss_fn, constants = make_assistant_loss(
            first_layers(model, config.layers),
            retain_weight=weight,
            max_positions=max(sum(count.values()) for count in counts),
            relative=config.relative,
        )
        return Update(loss_fn=loss_fn, batches=batches, constants=constants)
    method = UNLEARNING_METHODS[config.method]
    if config.retain_weight is not None:
        method = dataclasses.replace(method, retain_weight=config.retain_weight)
    depth = model.config.num_layers
    loss_fn = make_unlearning_loss(
        method,
        model,
        after_layers=max(1, min(depth - 1, round(depth / 4))),
        direction=rmu_direction(
            model.config.hidden_size,
            key=jax.random.key(config.seed),
            scale=method.options.get("scale", 1.0),
        ),
        most={side: max(1, *(count[side] for count in counts)) for side in counts[0]},
        adapters=True,
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return Update(loss_fn=loss_fn, batches=batches, constants=params)


def _sides(questions: Questions) -> dict[str, dict[str, np.ndarray]]:
    """Rows of one length: that of the longest answer's, which other text is cut to."""
    rows = {"forget": questions.encoded["forget"], "retain": questions.encoded["train"]}
    longest = max(len(ids) for side in rows.values() for ids, _ in side)
    length = -(-longest // _MULTIPLE) * _MULTIPLE
    windows = [window[:length] for window in questions.texts.get("train", ())]
    rows["text"] = [(window, np.arange(len(window)) > 0) for window in windows]
    return {name: padded_rows(side, length, pad_id=questions.pad_id) for name, side in rows.items()}


def _picked(
    rows: Mapping[str, np.ndarray], step: int, size: int, seed: int, salt: int
) -> dict[str, np.ndarray]:
    """The rows of a step: every epoch all of them once, in an order of its own."""
    count = len(rows["tokens"])
    chosen = [
        np.random.default_rng([seed, salt, place // count]).permutation(count)[place % count]
        for place in range(step * size, (step + 1) * size)
    ]
    return {name: values[chosen] for name, values in rows.items()}

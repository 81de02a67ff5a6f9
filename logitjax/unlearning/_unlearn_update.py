"""What an optimiser step of unlearning minimises on rows of one's own, and its batches."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from logitjax.evaluation import score_rows
from logitjax.models import Decoder, first_layers
from logitjax.unlearning._dual import dual_optimizer
from logitjax.unlearning._method_loss import make_unlearning_loss
from logitjax.unlearning._objective import UNLEARNING_METHODS, UnlearningMethod
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._rows import padded_rows
from logitjax.unlearning._targets import rmu_direction
from logitjax.unlearning._unlearn_config import UnlearnConfig
from logitjax.unlearning.assistant._assistant_loss import make_assistant_loss
from logitjax.unlearning.assistant._deployed import Deployed

_MULTIPLE = 8
# Of the rows to keep in a batch, where there is other text.
_TEXT_ROWS = 2
# What a constraint allows the loss on rows to keep, in terms of that before.
_ABOVE = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """An optimiser step.

    Attributes:
      loss_fn: Of adapters or all weights, for `training.TrainStep`; with a multiplier of
        `{"weights", "multiplier"}`.
      batches: From the number of a step to its batch.
      constants: What no step changes.
      method: Whose retain loss has a multiplier, or None.
    """

    loss_fn: Any
    batches: Callable[[int], Mapping[str, Any]]
    constants: Any
    method: UnlearningMethod | None = None

    def params(self, weights: Any) -> Any:
        """What is trained, before the first step."""
        if self.method is None:
            return weights
        return {"weights": weights, "multiplier": jnp.float32(self.method.retain_weight)}

    def weights(self, params: Any) -> Any:
        """Adapters or all weights, of what is trained."""
        return params if self.method is None else params["weights"]

    def optimizer(
        self, tx: optax.GradientTransformation, warmup: int
    ) -> optax.GradientTransformation:
        """The one of the weights, and of a multiplier, which waits so many steps."""
        return tx if self.method is None else dual_optimizer(self.method, tx, warmup=warmup)


def make_update(
    model: Decoder,
    questions: Questions,
    config: UnlearnConfig,
    *,
    instead: Sequence[Sequence[str]] = (),
) -> Update:
    """The loss of an assistant or of adapters, on rows to forget, rows to keep and other text.

    Args:
      model: That is to forget.
      questions: Of which `forget`, `train` and texts to train on are looked at.
      config: How.
      instead: What is to be said to each row to forget, for methods that want it.
    """
    sides = _sides(questions, instead)
    size = config.batch_size
    few = min(_TEXT_ROWS, size - 1) if len(sides["text"]["tokens"]) else 0

    def retained(sides: Mapping[str, Any], step: int) -> dict[str, np.ndarray]:
        parts = [_picked(sides["retain"], step, size - few, config.seed, 1)]
        if few:
            parts.append(_picked(sides["text"], step, few, config.seed, 2))
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def batches(step: int) -> dict[str, Any]:
        count = min(size, len(sides["forget"]["tokens"]))
        names = ("forget", "instead") if instead else ("forget",)
        found = {n: _picked(sides[n], step, count, config.seed, 0) for n in names}
        return found | {"retain": retained(sides, step)}

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
    bound = 0.0
    if method.dual_step:
        known = {side: _scored(model, questions, sides[side]) for side in ("retain", "text")}
        nats, tokens = (
            sum(float(retained(known, step)[name].sum()) for step in range(config.steps))
            for name in ("nats", "tokens")
        )
        bound = _ABOVE * nats / tokens
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
        adapters=config.adapters,
        retain_bound=bound,
    )
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return Update(
        loss_fn=loss_fn,
        batches=batches,
        constants=params if config.adapters or method.needs_reference else None,
        method=method if method.dual_step else None,
    )


def _sides(
    questions: Questions, instead: Sequence[Sequence[str]]
) -> dict[str, dict[str, np.ndarray]]:
    """Rows of one length: that of the longest answer's, which other text is cut to."""
    rows = {"forget": questions.encoded["forget"], "retain": questions.encoded["train"]}
    if instead:
        pairs = [
            (known, questions.encode(dataclasses.replace(row, answer=text)))
            for row, known, texts in zip(questions.rows["forget"], rows["forget"], instead)
            for text in texts
        ]
        rows["forget"], rows["instead"] = ([pair[side] for pair in pairs] for side in (0, 1))
    longest = max(len(ids) for side in rows.values() for ids, _ in side)
    length = -(-longest // _MULTIPLE) * _MULTIPLE
    windows = [window[:length] for window in questions.texts.get("train", ())]
    rows["text"] = [(window, np.arange(len(window)) > 0) for window in windows]
    return {name: padded_rows(side, length, pad_id=questions.pad_id) for name, side in rows.items()}


def _scored(
    model: Decoder, questions: Questions, rows: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Nats and tokens of rows, as the model has them before."""
    scores = score_rows(
        Deployed(model=model).nll,
        list(zip(rows["tokens"], rows["mask"])),
        batch_size=questions.batch_size,
        pad_id=questions.pad_id,
    )
    return {"nats": scores.totals(), "tokens": scores.counts()}


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

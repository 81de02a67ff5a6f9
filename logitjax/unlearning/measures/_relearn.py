"""Relearning: teaching a model some forgotten answers again, to see whether others come back."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, cast

import jax
import numpy as np
import optax
from flax import nnx

from logitjax.models import Lora
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._rows import Row
from logitjax.unlearning._verdict import TAUGHT
from logitjax.unlearning.assistant._deployed import Deployed, merged
from logitjax.unlearning.assistant._pair_scores import token_scores

_RANK = 16
_SHARE = 0.25
_MULTIPLE = 8
# Factor for the largest number of steps if the taught rows are not learned.
_PATIENCE = 4
_MOMENTS = optax.scale_by_adam(b2=0.99)


def relearning(
    model: Deployed,
    questions: Questions,
    *,
    rates: Sequence[float] = (1e-4, 5e-4, 2e-3),
    steps: Sequence[int] = (6, 30),
    seeds: int = 1,
    batch_size: int = 4,
) -> list[dict[str, float]]:
    """Likelihood of forgotten answers after a quarter of them is taught again.

    Adapters of the model's weights learn that quarter through the served logits, with a fixed
    assistant subtracted if there is one. Other answers that come back were hidden, not removed. If
    the taught rows stay below a probability of 0.9, teaching continues four times as long. Compare
    with a model that never knew the answers and is taught the same, because a few steps teach any
    model how such answers begin. Rates and steps are those of arXiv 2410.08827, in which 88 % of
    the accuracy came back.

    Args:
        questions: Questions whose rows to `forget` are taught or asked.
        rates: Learning rates of Adam, ten times those of all weights.
        steps: Numbers of steps after which to ask, ascending.
        seeds: Number of repetitions, each with other taught rows and other adapters.

    Returns:
        Records of `rate`, `seed`, `steps`, and median probabilities of the rows `taught` and of the
        `others` (absent for a single row), with the largest of these, `worst`.
    """
    encoded = questions.encoded["forget"]
    graphdef, params, rest = nnx.split(model.model, nnx.Param, ...)
    static, stored = model.arguments()
    alphas = np.full(1, model.alpha, np.float32)
    length = -(-max(len(ids) for ids, _ in encoded) // _MULTIPLE) * _MULTIPLE
    padded = Row.padded(encoded, length, pad_id=questions.pad_id)
    items = []
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(encoded))
        cut = max(1, round(_SHARE * len(encoded)))
        # No row occurs twice in a step.
        size = min(batch_size, cut)
        sides = {"taught": sorted(order[:cut]), "others": sorted(order[cut:])}
        for rate in rates:
            lora = Lora.init(
                model.model.config, _RANK, key=jax.random.key(seed), layout=model.model.layout
            )
            moments: Any = _MOMENTS.init(cast("Any", lora))
            for step in range(1, _PATIENCE * max(steps) + 1):
                # Rows are taken in turn, and again from the first.
                at = np.arange((step - 1) * size, step * size) % cut
                rows = {name: v[np.asarray(sides["taught"])[at]] for name, v in padded.items()}
                where, count = model.positions(rows["mask"]), np.float32(rows["mask"][:, 1:].sum())
                served = stored, alphas, rows["tokens"], where, count, rate
                lora, moments = _step(graphdef, static, (params, rest), lora, moments, served)
                if step in steps or step % max(steps) == 0:
                    again = dataclasses.replace(model, model=merged(lora, model.model))
                    scores = questions.probabilities(again, "forget")
                    record = {"rate": rate, "seed": seed, "steps": step}
                    for name, which in sides.items():
                        if which:
                            record[name] = float(np.median(scores[which]))
                    if sides["others"]:
                        record["worst"] = float(np.max(scores[sides["others"]]))
                    items.append(record)
                    if step >= max(steps) and not record["taught"] < TAUGHT:
                        break
    return items


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(graphdef: Any, static: Any, weights: Any, lora: Any, moments: Any, served: Any) -> Any:
    """One program for all rates, seeds and models of a shape."""
    stored, alphas, tokens, at, count, rate = served

    def loss(lora: Any) -> jax.Array:
        graph, state = nnx.split(lora.merged_into(nnx.merge(graphdef, *weights)))
        return (
            token_scores(graph, static, "nll", state, stored, alphas, tokens, at)[0].sum() / count
        )

    moves, moments = _MOMENTS.update(jax.grad(loss)(lora), moments)
    return jax.tree.map(lambda x, move: x - rate * move, lora, moves), moments  # a traced rate

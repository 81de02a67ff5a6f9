"""The arms of unlearning: methods that train weights, and logit differences, which do not."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.unlearning.config import Config
from logitjax import decoding, fusion, models, ops, unlearning

#: Arms that train the model's own weights, by the names of `unlearning.UNLEARNING_METHODS`.
METHODS: Mapping[str, str] = {
    "ga": "gradient_ascent",
    "grad_diff": "gradient_difference",
    "npo": "npo",
    "npo_gd": "npo_gradient_difference",
    "npo_kl": "npo_kl",
    "simnpo": "simnpo",
    "rmu": "rmu",
    "undial": "undial",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """One way to train an assistant and to take its logits away.

    Attributes:
      rank: of the adapters.
      lora_alpha: their scale times their rank.
      retain_weight: beta.
      uniform: where it is silent: `'answers'` or `'all'` positions.
      silent: on which rows: of `'all'` kept authors, or on as many as are forgotten and on wrong
        answers to the forgotten questions, as `'released'`.
      fuse: while a text is scored; keeps what it leaves out.
      generating: while one is generated.
    """

    rank: int
    lora_alpha: float
    retain_weight: float
    uniform: str
    silent: str
    fuse: fusion.LogitDifference
    generating: fusion.LogitDifference


def differences(config: Config) -> dict[str, Difference]:
    """Arms that leave the model's weights alone.

    `official` is the released code: rank 16, beta 5, silence at all positions, the int(0.01 V)
    most likely tokens changed by raw logits with weight 0.8, nothing else generated. `clean` has
    the paper's rank, silence on answers, and centred logits; beta and alpha are chosen, and so is
    whether a filter keeps the logits of tokens under a hundredth of the largest probability. They
    are not excluded while generating: a confident target would have one token left to choose from,
    and forget nothing. It is silent about all kept authors: where it has only seen as many as are
    forgotten, and wrong answers that begin as right ones do, a small assistant is not silent about
    the others.
    """
    official = fusion.LogitDifference(alpha=0.8, form="raw", filter="official", rate=0.01)
    chosen: Any = config.filters[0]
    clean = fusion.LogitDifference(alpha=config.alpha, filter=chosen)
    return {
        "difference_official": Difference(
            rank=config.rank // 2,
            lora_alpha=float(config.rank),
            retain_weight=5.0,
            uniform="all",
            silent="released",
            fuse=official,
            generating=dataclasses.replace(official, outside="exclude"),
        ),
        "difference_clean": Difference(
            rank=config.rank,
            lora_alpha=float(config.rank),
            retain_weight=config.betas[0],
            uniform="answers",
            silent="all",
            fuse=clean,
            generating=clean,
        ),
    }


def with_alpha(difference: Difference, alpha: float, filter: str) -> Difference:
    """The same assistant, taken away with another weight from other tokens."""
    changes: Any = {"alpha": alpha, "filter": filter}
    return dataclasses.replace(
        difference,
        fuse=dataclasses.replace(difference.fuse, **changes),
        generating=dataclasses.replace(difference.generating, **changes),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Deployed:
    """What is asked: a model alone, or with an assistant.

    Attributes:
      model: its own weights.
      assistant: taken away from it, or None.
      difference: how.
      block: positions whose logits are held at a time.
    """

    model: models.Decoder
    assistant: unlearning.Assistant | None = None
    difference: Difference | None = None
    block: int = 256

    def nll(self, tokens: Any, targets: Any) -> tuple[jax.Array, jax.Array]:
        """An `evaluation.NllFn` that says too which tokens are the most likely ones."""
        graphdef, state = nnx.split(self.model)
        base, held, lora, fuse, alpha = None, None, None, None, 0.0
        if self.assistant is not None:
            assert self.difference is not None
            base, held = nnx.split(self.assistant.base)
            lora, alpha = self.assistant.lora, self.difference.fuse.alpha
            # One program for all alphas, which the shift of the logits is proportional to.
            fuse = dataclasses.replace(self.difference.fuse, alpha=1.0)
        # Only targets meet the head, a few sizes of program for all batches.
        where = np.asarray(targets)[:, 1:]
        wanted = np.flatnonzero(where)
        at = np.full(max(1, -(-len(wanted) // self.block)) * self.block, where.size, np.int32)
        at[: len(wanted)] = wanted
        at = at.reshape(-1, self.block)
        return _nll(graphdef, base, fuse, state, held, lora, alpha, tokens, at)

    def line_up(self) -> Any:
        """For `decoding.generate`."""
        if self.assistant is None:
            return decoding.Ensemble(self.model)
        assert self.difference is not None
        pair = unlearning.paired_model(self.model, self.assistant)
        return decoding.Ensemble(pair, fuse=self.difference.generating)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _nll(
    graphdef: Any,
    base: Any,
    fuse: Any,
    state: Any,
    held: Any,
    lora: Any,
    alpha: Any,
    tokens: Any,
    at: Any,
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, state)
    sides = [model.hidden_states(tokens)[0][:, :-1]]
    assistant = None
    if base is not None:
        assistant = nnx.merge(base, held)
        sides.append(assistant.hidden_states(tokens, lora=lora)[0][:, :-1])
    labels = jnp.asarray(tokens)[:, 1:]
    sides = [side.reshape(labels.size, -1) for side in sides]

    def one(at: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden = [side.at[at].get(mode="clip") for side in sides]
        logits = model.logits(hidden[0])
        if assistant is not None:
            fused, _ = fuse(logits, assistant.logits(hidden[1])[None], None)
            logits = logits + alpha * (fused - logits)
        wanted = labels.ravel().at[at].get(mode="clip")
        label = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return ops.logsumexp(logits) - label, logits.argmax(axis=-1) == wanted

    def back(values: jax.Array) -> jax.Array:
        rows = jnp.zeros(labels.size, values.dtype).at[at].set(values, mode="drop")
        return jnp.pad(rows.reshape(labels.shape), ((0, 0), (1, 0)))

    nll, greedy = map(back, jax.lax.map(one, at))
    return nll, greedy

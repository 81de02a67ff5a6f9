"""The networks of replication: a trunk without a head, and each kind of student around it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.replication.config import Config
from experiments.shared import fit
from logitjax import losses, models, training


@dataclasses.dataclass(frozen=True)
class Trunk:
    """A decoder without a head, as functions of its parameters.

    Attributes:
        graphdef: Graph of the decoder.
        rest: The decoder's state other than parameters.
        params: Parameters before training, or their shapes.
    """

    graphdef: Any
    rest: Any
    params: Any

    def hidden(self, params: Any, tokens: jax.Array) -> jax.Array:
        """`[batch, time, width]` after the final norm."""
        return nnx.merge(self.graphdef, params, self.rest).hidden_states(tokens)[0]


def make_trunk(
    config: Config, vocab: int, layers: int, *, seed: int = 0, abstract: bool = False
) -> Trunk:
    """The trunk of teacher and students, which differ in their depth; shapes alone if abstract."""
    shape = models.DecoderConfig(
        vocab_size=vocab,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_layers=layers,
        num_heads=max(1, config.width // 64),
        num_kv_heads=max(1, config.width // 64),
        head_dim=min(64, config.width),
        max_length=config.seq_len,
        tie_embeddings=False,
    )

    def build() -> models.Decoder:
        return models.Decoder(shape, rngs=nnx.Rngs(seed), layout="listed", head=nnx.Module())

    model = nnx.eval_shape(build) if abstract else build()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return Trunk(graphdef, rest, nnx.to_pure_dict(params))


def normal_head(vocab: int, width: int, seed: int) -> jax.Array:
    """`[vocab, width]` at random, so that states of unit variance make logits of unit variance."""
    return jax.random.normal(jax.random.key(seed + 500), (vocab, width)) * width**-0.5


@dataclasses.dataclass(frozen=True)
class Student:
    """A network as functions of its trained and its given parameters.

    Attributes:
        kind: One of `config.KINDS`, or `teacher`.
    """

    trunk: Trunk
    kind: str

    def whole(self, params: Any, given: Any) -> Any:
        """Parameters of trunk and head `[vocab, width]`, however they are stored."""
        if self.kind in ("copied", "official"):
            trunk = params["trunk"] | {"embedding": given["embedding"]}
            return {"trunk": trunk, "head": given["head"]}
        if self.kind == "recovered":
            return {"trunk": params["trunk"], "head": given["basis"] @ params["mix"]}
        return params

    def hidden_and_head(
        self, params: Any, given: Any, tokens: Any
    ) -> tuple[jax.Array, losses.Head]:
        """Hidden states `[batch, time, width]` and the head."""
        whole = self.whole(params, given)
        head = losses.Head(whole["head"], vocab_axis=0)
        return self.trunk.hidden(whole["trunk"], tokens), head


def start(kind: str, trunk: Any, teacher: Any, basis: Any, *, layers: int, seed: int) -> Any:
    """Return a student's trained parameters and its constants, `(params, given)`.

    Args:
        trunk: Parameters of its trunk before training.
        teacher: Parameters of the teacher, `trunk` and `head`.
        basis: `[vocab, width]`, the recovered columns of the teacher's head.
        seed: Seed of a head that starts at random.
    """
    vocab, width = teacher["head"].shape
    match kind:
        case "copied" | "official":
            # The released code copies the embedding too and freezes both.
            given = {"head": teacher["head"], "embedding": teacher["trunk"]["embedding"]}
            return {"trunk": {k: v for k, v in trunk.items() if k != "embedding"}}, given
        case "recovered":
            # The unknown part of the head is one matrix; it is learned where the head is applied.
            return {"trunk": trunk, "mix": jnp.eye(width)}, {"basis": basis}
        case "dropped":
            return {"trunk": dropped(teacher["trunk"], layers), "head": teacher["head"]}, {}
    return {"trunk": trunk, "head": normal_head(vocab, width, seed)}, {}


def dropped(trunk: Any, layers: int) -> Any:
    """A trunk's parameters without some layers, evenly spread; the first and last are kept."""
    segments = trunk["segments"]
    (name,) = segments
    blocks = segments[name]["layers"]
    keep = np.unique(np.round(np.linspace(0, len(blocks) - 1, layers)).astype(int))
    kept = {position: blocks[list(blocks)[i]] for position, i in enumerate(keep)}
    return trunk | {"segments": {name: segments[name] | {"layers": kept}}}


def make_loss(student: Student, teacher: Trunk, config: Config) -> Callable[..., Any]:
    """Make a student's loss; the constants of its update are `given` and `teacher`."""
    if student.kind in ("teacher", "scratch"):
        return functools.partial(_cross_entropy, student)
    return functools.partial(_distillation, student, teacher, config)


def _cross_entropy(
    student: Student, params: Any, batch: Mapping[str, Any], rng: Any, constants: Any
) -> Any:
    hidden, head = student.hidden_and_head(params, constants["given"], batch["tokens"])
    mask = batch["mask"][:, 1:].astype(jnp.float32)
    total = losses.linear_cross_entropy(hidden[:, :-1], head, batch["tokens"][:, 1:], weights=mask)
    return total, mask.sum(), {}


def _distillation(
    student: Student,
    teacher: Trunk,
    config: Config,
    params: Any,
    batch: Mapping[str, Any],
    rng: Any,
    constants: Any,
) -> Any:
    tokens, official = batch["tokens"], student.kind == "official"
    taught = jax.lax.stop_gradient(teacher.hidden(constants["teacher"]["trunk"], tokens))
    hidden, head = student.hidden_and_head(params, constants["given"], tokens)
    mask = batch["mask"].astype(jnp.float32)
    # Pads are included in the official loss.
    kl = losses.linear_kl_divergence(
        hidden,
        head,
        taught,
        losses.Head(constants["teacher"]["head"], vocab_axis=0),
        temperature=config.temperature,
        weights=jnp.ones_like(mask) if official else mask,
    )
    if official:  # "batchmean": a sum over positions over the number of sequences.
        return kl, jnp.float32(len(tokens)), {}
    # The last position has no label, but the teacher's output.
    ce = losses.linear_cross_entropy(hidden[:, :-1], head, tokens[:, 1:], weights=mask[:, 1:])
    return kl + config.ce_weight * ce, mask.sum(), {}


def make_update(
    student: Student, teacher: Trunk, config: Config, mesh: Any, *, rate: float, steps: int
) -> fit.Update:
    """The compiled update of a student, or of the teacher."""
    loss = make_loss(student, teacher, config)
    schedule = training.Schedule(rate, warmup=max(1, steps // 20), total_steps=steps)
    return fit.make_update(loss, schedule, mesh=mesh)

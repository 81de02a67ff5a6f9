"""What a student minimises: a weighted mix of losses, given its hidden states and its teachers.

Nothing here holds logits: one sweep over the vocabulary yields what a loss needs of the student,
and what the teachers say comes from their caches.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from logitjax import losses, ops
from logitjax.distillation._binary_kl import binary_kl_norm
from logitjax.distillation._graph_fusion import (
    FusionTeacher,
    GraphFusionConfig,
    graph_fusion_objective,
)
from logitjax.distillation._graph_on_logits import GraphConfig
from logitjax.distillation._student import Student, hidden_states

# Those that compare token by token need one vocabulary.
_SAME_VOCABULARY = ("kl", "rkl", "jsd", "dual")
TERMS: tuple[str, ...] = ("sft", *_SAME_VOCABULARY, "uld", "gld")

# What a cache holds of one teacher.
CachedTeacher = tuple[ops.TopK, losses.TailSample | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A sum of losses by their weights; one that has several teachers is their mean.

    ::

        sft   cross-entropy of the text               rkl   KL(student || teacher)
        kl    KL(teacher || student)                  jsd   generalised Jensen-Shannon divergence
        uld   universal logit distance                gld   graph-on-logits distillation
        dual  the KL norm of dual-head distillation, on a second head

    `kl`, `rkl` and `jsd` know the teacher's top logits and the mass of all others, which is one
    bucket (or what was drawn from it, where the cache has draws: then `kl` is unbiased). At a
    temperature other than 1 that mass is not known: then they compare the top logits alone.

    Attributes:
        terms: Names and weights.
        teachers: Weights of the teachers, divided by their sum.
        student_temperature: Divides the student's logits in `kl`, `rkl` and `jsd`.
        teacher_temperature: Divides the teachers'.
        beta: Share of the teacher in the mixture of `jsd`.
        graph: Graph of `gld`; `uld` compares as many ranks.

    >>> objective = Objective(terms=parse_terms(["sft:0.5", "kl:0.5"]), teachers=(1.0, 3.0))
    >>> objective.shares, objective.same_vocabulary
    ((0.25, 0.75), 'kl')
    """

    terms: tuple[tuple[str, float], ...]
    teachers: tuple[float, ...] = ()
    student_temperature: float = 1.0
    teacher_temperature: float = 1.0
    beta: float = 0.5
    graph: GraphConfig = GraphConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        names = [name for name, _ in self.terms]
        for name in names:
            if name not in TERMS:
                raise ValueError(f"loss: expected one of {', '.join(TERMS)}, got {name!r}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"loss: expected each loss once, got {', '.join(names) or 'none'}")
        if any(weight <= 0 or not math.isfinite(weight) for _, weight in self.terms):
            raise ValueError(f"loss: expected positive weights, got {dict(self.terms)}")
        if self.taught and not self.teachers:
            raise ValueError(f"teacher: expected one for the loss {self.taught!r}, got none")
        if any(weight <= 0 for weight in self.teachers):
            raise ValueError(f"teacher_weight: expected positive ones, got {self.teachers}")
        for name in ("student_temperature", "teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")

    @property
    def weights(self) -> dict[str, float]:
        """Weights by name."""
        return dict(self.terms)

    @property
    def shares(self) -> tuple[float, ...]:
        """The teachers' weights, summing to one."""
        return tuple(weight / sum(self.teachers) for weight in self.teachers)

    @property
    def taught(self) -> str | None:
        """The first loss that needs a teacher."""
        return next((name for name, _ in self.terms if name != "sft"), None)

    @property
    def same_vocabulary(self) -> str | None:
        """The first loss that needs teachers of the student's vocabulary."""
        return next((name for name, _ in self.terms if name in _SAME_VOCABULARY), None)

    @property
    def fusion(self) -> GraphFusionConfig:
        """The part that sorts."""
        weights = self.weights
        return GraphFusionConfig(
            mix=1.0,
            uld_weight=weights.get("uld", 0.0),
            gld_weight=weights.get("gld", 0.0),
            graph=self.graph,
        )


def parse_terms(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Losses as flags name them, `NAME` or `NAME:WEIGHT`; the weight is 1 where none is given.

    >>> parse_terms(["sft", "gld:0.002"])
    (('sft', 1.0), ('gld', 0.002))
    """
    terms = []
    for text in texts:
        name, _, weight = text.partition(":")
        try:
            terms.append((name, float(weight or 1.0)))
        except ValueError:
            raise ValueError(f"loss: expected NAME or NAME:WEIGHT, got {text!r}") from None
    return tuple(terms)


def targets(columns: Mapping[str, Any]) -> tuple[Any, Any]:
    """The label `tokens[t + 1]` of each position t of packed columns, and where it counts."""
    return columns["tokens"][:, 1:], columns["loss_mask"][:, 1:]


def loss_function(
    objective: Objective, student: Student, sources: Sequence[str] = ()
) -> Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]:
    """The objective as `loss_fn(trained, batch, rng, frozen) -> (sum, count, metrics)`.

    Args:
        objective: What is minimised.
        student: Whose `trained` and `frozen` the function takes.
        sources: Names under which `batch["sources"]` holds what each teacher says, a
            `losses.GraphStatistics` and a mask over its positions.
    """
    weights = objective.weights

    def loss_fn(trained: Any, batch: Mapping[str, Any], rng: Any, frozen: Any) -> Any:
        del rng
        model = student.model(trained, frozen)
        labels, where = targets(batch["pivot"])
        hidden = hidden_states(model, batch["pivot"], student.adapters(trained))
        head = model.head_of()
        count, counts = where.sum(), where.astype(jnp.float32)
        held = [batch["sources"][name] for name in sources] if objective.taught else []
        if not held:
            # A scalar is enough, so the head's gradient is formed in the forward sweep.
            sft = losses.linear_cross_entropy(hidden, head, labels, weights=counts)
            return weights["sft"] * sft, count, {"sft": (sft, count)}
        teachers = [(teacher.top_k, teacher.tail) for teacher, _ in held]
        ids = jnp.concatenate([cached_ids(*teacher) for teacher in teachers], axis=-1)
        parts: dict[str, Any] = {}
        if set(weights) <= {"sft", "kl", "rkl", "jsd"}:

            def mixed(readout: losses.Readout, teachers: Sequence[CachedTeacher]) -> Any:
                return sum(
                    weight * _at_positions(objective, name, readout, teachers)
                    for name, weight in objective.terms
                )

            # Here too a scalar is enough: no logit is formed twice.
            value, readout = losses.linear_fused_loss(
                hidden, head, mixed, teachers, counts, labels=labels, ids=ids
            )
            for name in weights:
                at = _at_positions(objective, name, readout, teachers)
                parts[name] = jnp.where(where, at, 0.0).sum()
            return value, count, {name: (part, count) for name, part in parts.items()}

        gathers, sorts = {"kl", "rkl", "jsd"} & set(weights), {"uld", "gld"} & set(weights)
        readout = losses.linear_readout(
            hidden,
            head,
            labels=labels,
            ids=ids if gathers else None,
            top_k=objective.fusion.k if sorts else None,
        )
        for name in ("sft", "kl", "rkl", "jsd"):
            if name in weights:
                at = _at_positions(objective, name, readout, teachers)
                parts[name] = jnp.where(where, at, 0.0).sum()
        if "dual" in weights:
            second = losses.Head(trained["auxiliary"]["head"]["kernel"], vocab_axis=1)
            parts["dual"] = _dual(objective, hidden, second, teachers, where)
        value = sum(weights[name] * part for name, part in parts.items())
        metrics = {name: (part, count) for name, part in parts.items()}
        if sorts:
            fused, found = graph_fusion_objective(
                readout.statistics,
                None,
                [
                    FusionTeacher(outputs=outputs, where=valid, weight=share, aligned=True)
                    for (outputs, valid), share in zip(held, objective.shares, strict=True)
                ],
                where=where,
                config=objective.fusion,
                cross_entropy=readout.cross_entropy,
            )
            tokens = found["tokens"]
            value = value + (fused * tokens).sum()
            for name in ("uld", "gld"):
                if name in weights:
                    metrics[name] = ((found[name] * tokens).sum(), tokens.sum())
        return value, count, metrics

    return loss_fn


def cached_ids(top: ops.TopK, tail: losses.TailSample | None) -> Any:
    """Where a student's logits are needed for the divergence from a cached teacher."""
    return top.indices if tail is None else jnp.concatenate([top.indices, tail.indices], axis=-1)


def _at_positions(
    objective: Objective, name: str, readout: losses.Readout, teachers: Sequence[CachedTeacher]
) -> Any:
    """One loss at each position; the readout has the logits at all teachers' ids, in turn."""
    if name == "sft":
        return readout.cross_entropy
    total, start = 0.0, 0
    for (top, tail), share in zip(teachers, objective.shares, strict=True):
        stop = start + cached_ids(top, tail).shape[-1]
        student = ops.TopK(readout.gathered[..., start:stop], top.indices, readout.log_z)
        total += share * _divergence(objective, name, student, top, tail)
        start = stop
    return total


def _divergence(
    objective: Objective,
    name: str,
    student: ops.TopK,
    teacher: ops.TopK,
    tail: losses.TailSample | None,
) -> Any:
    k = teacher.values.shape[-1]
    warm, theirs = objective.student_temperature, objective.teacher_temperature
    if (warm, theirs) == (1.0, 1.0):
        if name == "kl" and tail is not None:
            return losses.sparse_kl_divergence(student, teacher, tail=tail)
        ours = ops.TopK(student.values[..., :k], teacher.indices, student.log_z)
        if name != "jsd":
            direction = "forward" if name == "kl" else "reverse"
            return losses.sparse_kl_divergence(ours, teacher, direction=direction)
        return losses.generalized_jensen_shannon(
            _with_rest(ours), _with_rest(teacher), beta=objective.beta
        )
    # The mass of what is not kept is known at temperature 1 only.
    pair = (student.values[..., :k] / warm, teacher.values / theirs)
    if name == "jsd":
        return warm**2 * losses.generalized_jensen_shannon(*pair, beta=objective.beta)
    direction = "forward" if name == "kl" else "reverse"
    return warm**2 * losses.kl_divergence(*pair, direction=direction)


def _with_rest(top: ops.TopK) -> jax.Array:
    """Log-probabilities of the kept tokens and, last, of all others together."""
    known = top.values - top.log_z[..., None]
    # The smallest mass that 1 - sum(p) resolves in float32.
    rest = jnp.maximum(1.0 - jnp.exp(known).sum(-1, keepdims=True), 2.0**-24)
    return jnp.concatenate([known, jnp.log(rest)], axis=-1)


def _dual(
    objective: Objective,
    hidden: Any,
    head: losses.Head,
    teachers: Sequence[CachedTeacher],
    where: Any,
) -> Any:
    """The second head's distance to the teachers' top logits, summed over positions."""
    ids = [top.indices for top, _ in teachers]
    gathered = losses.linear_readout(hidden, head, ids=jnp.concatenate(ids, axis=-1)).gathered
    parts = jnp.split(gathered, len(ids), axis=-1)
    total = sum(
        share * binary_kl_norm(part, top.values, reduction="mean")
        for part, (top, _), share in zip(parts, teachers, objective.shares, strict=True)
    )
    return jnp.where(where, total, 0.0).sum()


def score_function(
    student: Student,
) -> Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]:
    """Held-out scores as `score(trained, batch, rng, frozen) -> (sum, count, metrics)`.

    The sum is of negative log-likelihoods. `accuracy` is next to it; with `batch["bytes"]`, the
    bytes that each label stands for, `bits_per_byte`; with `batch["teacher"]`, what a teacher of
    the same vocabulary says, `agreement` of the likeliest tokens and `teacher_kl`, the divergence
    from it by its top logits and the mass of all others.
    """

    def score(trained: Any, batch: Mapping[str, Any], rng: Any, frozen: Any) -> Any:
        del rng
        model = student.model(trained, frozen)
        labels, where = targets(batch["pivot"])
        teacher = batch.get("teacher")
        readout = losses.linear_readout(
            hidden_states(model, batch["pivot"], student.adapters(trained)),
            model.head_of(),
            labels=labels,
            ids=None if teacher is None else teacher.indices,
            top_k=1,
        )
        nll = jnp.where(where, readout.cross_entropy, 0.0).sum()
        count = where.sum()
        best = readout.statistics.indices[..., 0]
        metrics = {"accuracy": ((where & (best == labels)).sum(), count)}
        if "bytes" in batch:
            size = jnp.where(where, batch["bytes"], 0).sum()
            metrics["bits_per_byte"] = (nll / math.log(2.0), size)
        if teacher is not None:
            same = best == teacher.indices[..., 0]
            kl = losses.sparse_kl_divergence(readout.gathered_top_k(teacher.indices), teacher.top_k)
            metrics["agreement"] = ((where & same).sum(), count)
            metrics["teacher_kl"] = (jnp.where(where, kl, 0.0).sum(), count)
        return nll, count, metrics

    return score


def parse_gld(text: str, *, k: int) -> tuple[GraphConfig, float]:
    """`NODE/FEATURE/VALUE:WEIGHT`, such as `rank/row_sum/closed_form:0.002`.

    >>> parse_gld("token/row_rms/closed_form:0.5", k=10)[1]
    0.5
    """
    kind, _, weight = text.partition(":")
    names = kind.split("/")
    try:
        if len(names) != 3:
            raise ValueError("expected NODE/FEATURE/VALUE:WEIGHT")
        node, feature, value = names
        graph = GraphConfig(k=k, node=node, feature=feature, value=value)  # type: ignore
        return graph, float(weight)
    except ValueError as error:
        raise ValueError(f"gld {text!r}: {error}") from None

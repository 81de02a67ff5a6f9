"""What a cached teacher says at each position, in its own vocabulary or through a projection."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from logitjax import losses, ops
from logitjax.distillation._binary_kl import binary_kl_norm
from logitjax.distillation._objective import PROJECTIONS, Objective
from logitjax.distillation.tokenizers._likelihood_matching import (
    ChunkScores,
    Likelihood,
    TokenSet,
    likelihood_matching,
)
from logitjax.distillation.tokenizers._matched_tokens import (
    Matches,
    hybrid_logit_distance,
    with_rest,
)
from logitjax.distillation.tokenizers._projected_kl import project_top_k
from logitjax.distillation.tokenizers._projection import Members, TokenProjection

# What a cache holds of one teacher.
CachedTeacher = tuple[ops.TopK, losses.TailSample | None]


class TeacherView(NamedTuple):
    """One teacher's output on a batch, at the student's positions.

    Attributes:
        statistics: `losses.GraphStatistics` of its next token.
        where: Positions where both have read the same text and predict from there.
        single: Those of them whose label is one token on both sides; None for all.
        chunks: The `ChunkScores` of `alm`; None for none.
    """

    statistics: Any
    where: Any
    single: Any = None
    chunks: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Vocabularies:
    """How a teacher's vocabulary relates to the student's.

    Attributes:
        projections: By their rule.
        boundary: The student's tokens that begin a word, for `alm`.
    """

    projections: Mapping[str, TokenProjection] = dataclasses.field(default_factory=dict)
    boundary: TokenSet | None = None

    @functools.cached_property
    def matches(self) -> Matches:
        """The tokens that both have."""
        return Matches.of(self.projections["exact"])


POINTWISE = ("sft", "kl", "rkl", "jsd", *PROJECTIONS)
# By how many of the student's tokens the top k of a teacher may be told at a position.
_MOST_MEMBERS = 4096


def check_projections(objective: Objective, name: str, vocabularies: Vocabularies) -> None:
    for loss in objective.weights:
        rule = PROJECTIONS.get(loss)
        if rule is not None and rule not in vocabularies.projections:
            raise ValueError(f"loss {loss!r}: expected the projection {rule!r} of {name}, got none")
    if "alm" in objective.weights and vocabularies.boundary is None:
        raise ValueError(f"loss 'alm': expected the boundary tokens of {name}, got none")


def prepare(
    objective: Objective, view: TeacherView, vocabularies: Vocabularies, where: Any
) -> dict[str, Any]:
    """What the losses at positions need of one teacher: arrays, and `wide` projections."""
    top = view.statistics.top_k
    out: dict[str, Any] = {"top": top, "wide": {}}
    names = set(objective.weights)
    if names & {"kl", "rkl", "jsd", "dual"}:
        out["tail"] = view.statistics.tail
        out["ids"] = _cached_ids(top, view.statistics.tail)
    if names & set(PROJECTIONS):
        single = view.where if view.single is None else view.single
        for place, valid in (("starts", view.where), ("single", single)):
            seen = valid & where
            # The sum of a loss is divided by all labels later: scaled up here, it is a mean over
            # those that it sees.
            share = where.sum() / jnp.maximum(seen.sum(), 1)
            out[place] = jnp.where(seen, share, 0.0)
            out[f"{place}_where"] = seen
    for name in ("first_piece", "pkl", "mined"):
        if name not in names:
            continue
        projection = vocabularies.projections[PROJECTIONS[name]]
        if projection.capacity(top.values.shape[-1]) <= _MOST_MEMBERS:
            # Few enough of the student's logits to be gathered, position by position.
            merged = projection.merged(top)
            out[PROJECTIONS[name]] = projection.members(merged.indices)
            out[f"{PROJECTIONS[name]}_top"] = merged
        elif name == "mined":
            raise ValueError(
                "loss 'mined': expected a student of a smaller vocabulary than its teacher's, got "
                f"{projection.capacity(top.values.shape[-1])} tokens for its top "
                f"{top.values.shape[-1]}; use first_piece"
            )
        else:
            out["wide"][name] = projection
    if names & {"hybrid", "hkl"}:
        out["exact"] = vocabularies.matches.ids(top.indices)[0]
    return out


# The order of what is gathered of one teacher.
_GATHERED = ("ids", "first_piece", "spread", "edit_distance", "exact")


def _ids_of(held: Any) -> Any:
    return held.ids if isinstance(held, Members) else held


def gathered_ids(teachers: Sequence[Mapping[str, Any]]) -> Any:
    ids = [_ids_of(t[name]) for t in teachers for name in _GATHERED if name in t]
    return jnp.concatenate(ids, axis=-1) if ids else None


def seen_shares(objective: Objective, views: Sequence[TeacherView], where: Any) -> dict[str, Any]:
    """How many of the labels each loss across tokenizers sees."""
    # A loss that sees little of the text may be small for that alone.
    found = {}
    for name in objective.weights:
        if name in ("kl", "rkl", "jsd", "dual", "sft"):
            continue
        shares = []
        for view in views:
            seen = view.where
            if name in ("hybrid", "hkl", "mined") and view.single is not None:
                seen = view.single
            if name == "alm" and view.chunks is not None:
                seen = view.chunks.ids >= 0
            shares.append((seen & where).sum())
        total = sum(s * n for s, n in zip(objective.shares, shares, strict=True))
        found[f"seen/{name}"] = (total, where.sum())
    return found


def mean_of_chunks(objective: Objective, likelihood: Likelihood, chunks: ChunkScores) -> Any:
    # Log-probabilities divided by tau have gradients divided by it, hence the factor. Infinity
    # gives the limit of the product by itself.
    tau = objective.alm_temperature
    value = likelihood_matching(likelihood, chunks, temperature=tau)
    return (tau if math.isfinite(tau) else 1.0) * value.sum() / jnp.maximum(chunks.where.sum(), 1)


def _cached_ids(top: ops.TopK, tail: losses.TailSample | None) -> Any:
    """Where a student's logits are needed for the divergence from a cached teacher."""
    return top.indices if tail is None else jnp.concatenate([top.indices, tail.indices], axis=-1)


def at_positions(
    objective: Objective,
    name: str,
    readout: losses.Readout,
    teachers: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Vocabularies],
) -> Any:
    """One loss at each position; the readout has the logits at all teachers' ids, in turn."""
    if name == "sft":
        return readout.cross_entropy
    total, start = 0.0, 0
    wanted = PROJECTIONS.get(name, "ids")
    vocabularies = list(sources.values())
    for teacher, share, known in zip(teachers, objective.shares, vocabularies, strict=True):
        for held in _GATHERED:
            if held not in teacher:
                continue
            ids = _ids_of(teacher[held])
            stop = start + ids.shape[-1]
            if held == wanted:
                # The student's own normaliser, over its whole vocabulary.
                student = ops.TopK(readout.gathered[..., start:stop], ids, readout.log_z)
                total += share * _from_teacher(objective, name, student, readout, teacher, known)
            start = stop
    return total


def _from_teacher(
    objective: Objective,
    name: str,
    student: ops.TopK,
    readout: losses.Readout,
    teacher: Mapping[str, Any],
    vocabularies: Vocabularies,
) -> Any:
    """One loss of one teacher; of those across tokenizers the mean over what they see."""
    top = teacher["top"]
    if name in ("kl", "rkl", "jsd"):
        student = dataclasses.replace(student, indices=top.indices)
        return _divergence(objective, name, student, top, teacher["tail"])
    if name in ("first_piece", "pkl"):
        rule = PROJECTIONS[name]
        projected = project_top_k(student, teacher[f"{rule}_top"], teacher[rule])
        return _scaled(losses.sparse_kl_divergence(*projected), teacher, "starts")
    if name == "mined":
        kl = losses.sparse_kl_divergence(*_nearest(student, top, teacher["edit_distance"]))
        return jnp.where(teacher["single_where"], kl, readout.cross_entropy)
    own = readout.statistics.truncate(top.values.shape[-1]).top_k
    matched, others = hybrid_logit_distance(
        student,
        own,
        top,
        vocabularies.matches,
        kind="jsd" if name == "hybrid" else "kl",
        beta=objective.beta,
    )
    return _scaled(matched + others, teacher, "single")


def _scaled(values: Any, teacher: Mapping[str, Any], place: str) -> Any:
    # Not a product alone: what is not seen may be infinite.
    return jnp.where(teacher[f"{place}_where"], values, 0.0) * teacher[place]


def _nearest(student: ops.TopK, teacher: ops.TopK, members: Members) -> tuple[ops.TopK, ops.TopK]:
    """MinED: each of our tokens has the logit of the nearest of theirs; what is left is a rest."""
    there = members.slots < teacher.values.shape[-1]
    # Empty places hold our token 0, whose mass would be taken from our rest once for each of them.
    ours = dataclasses.replace(student, values=jnp.where(there, student.values, -jnp.inf))
    at = jnp.minimum(members.slots, teacher.values.shape[-1] - 1)
    values = jnp.where(there, jnp.take_along_axis(teacher.values, at, axis=-1), -jnp.inf)
    log_p = values - teacher.log_z[..., None]
    top = jnp.exp(teacher.values - teacher.log_z[..., None]).sum(-1)
    # A token that several of ours share counts for each of them.
    total = jnp.exp(log_p).sum(-1) + jnp.maximum(1.0 - top, 0.0)
    return ours, ops.TopK(log_p, members.ids, jnp.log(jnp.maximum(total, 1e-30)))


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
            with_rest(ours), with_rest(teacher), beta=objective.beta
        )
    # The mass of what is not kept is known at temperature 1 only.
    pair = (student.values[..., :k] / warm, teacher.values / theirs)
    if name == "jsd":
        return warm**2 * losses.generalized_jensen_shannon(*pair, beta=objective.beta)
    direction = "forward" if name == "kl" else "reverse"
    return warm**2 * losses.kl_divergence(*pair, direction=direction)


def dual_norm(
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

"""An objective as the functions that training and evaluation take.

Nothing here holds logits: one sweep over the vocabulary yields what a loss needs of the student,
and what the teachers say comes from their caches.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from logitjax import losses
from logitjax.distillation._graph_fusion import FusionTeacher, graph_fusion_objective
from logitjax.distillation._objective import Objective
from logitjax.distillation._teacher_terms import (
    POINTWISE,
    TeacherView,
    Vocabularies,
    at_positions,
    check_projections,
    dual_norm,
    gathered_ids,
    mean_of_chunks,
    prepare,
    seen_shares,
)
from logitjax.distillation.tokenizers._likelihood_matching import linear_likelihood
from logitjax.distillation.tokenizers._projected_kl import linear_projected_kl_divergence
from logitjax.distillation.training._student import Student, hidden_states


def targets(columns: Mapping[str, Any]) -> tuple[Any, Any]:
    """The label `tokens[t + 1]` of each position t of packed columns, and where it counts."""
    return columns["tokens"][:, 1:], columns["loss_mask"][:, 1:]


def loss_function(
    objective: Objective,
    student: Student,
    sources: Mapping[str, Vocabularies] | Sequence[str] = (),
) -> Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]:
    """The objective as `loss_fn(trained, batch, rng, frozen) -> (sum, count, metrics)`.

    Args:
        objective: What is minimised.
        student: The student, whose `trained` and `frozen` the function takes.
        sources: Names under which `batch["sources"]` holds the `TeacherView` of each teacher, and
            how its vocabulary lies over the student's, where it has another.

    Raises:
        ValueError: A projection that a loss needs is not there, or too large for it.
    """
    weights = objective.weights
    known = dict(sources) if isinstance(sources, Mapping) else {n: Vocabularies() for n in sources}
    if objective.taught:
        for name, vocabularies in known.items():
            check_projections(objective, name, vocabularies)

    def loss_fn(trained: Any, batch: Mapping[str, Any], rng: Any, frozen: Any) -> Any:
        del rng
        model = student.model(trained, frozen)
        labels, where = targets(batch["pivot"])
        hidden = hidden_states(model, batch["pivot"], student.adapters(trained))
        head = model.head_of()
        count, counts = where.sum(), where.astype(jnp.float32)
        names = known if objective.taught else {}
        views = [TeacherView(*batch["sources"][name]) for name in names]
        if not views:
            # A scalar is enough, so the head's gradient is formed in the forward sweep.
            sft = losses.linear_cross_entropy(hidden, head, labels, weights=counts)
            return weights["sft"] * sft, count, {"sft": (sft, count)}
        teachers = [
            prepare(objective, view, vocabularies, where)
            for view, vocabularies in zip(views, names.values(), strict=True)
        ]
        metrics = seen_shares(objective, views, where)
        ids = gathered_ids(teachers)
        # GOLD and X-Token sort the student's own likeliest tokens beside the teacher's.
        own = max((t["top"].values.shape[-1] for t in teachers if "exact" in t), default=None)
        pointwise = [n for n in weights if n in POINTWISE]
        parts: dict[str, Any] = {}
        value = 0.0
        for name in weights:
            # A vocabulary that is seen from a much smaller one: sums over whole rows.
            for i, teacher in enumerate(teachers):
                if name in teacher["wide"]:
                    part = linear_projected_kl_divergence(
                        hidden,
                        head,
                        teacher["top"],
                        teacher["wide"][name],
                        weights=objective.shares[i] * teacher["starts"] * counts,
                    )
                    value += weights[name] * part
                    parts[name] = parts.get(name, 0.0) + part
        # Without what sees more than one position, or has a head of its own, the loss is a sum over
        # positions.
        if not {"uld", "gld", "dual", "alm"} & set(weights):
            order = [{k: v for k, v in t.items() if k != "wide"} for t in teachers]

            def mixed(readout: losses.Readout, teachers: Sequence[Mapping[str, Any]]) -> Any:
                return sum(
                    weights[name] * at_positions(objective, name, readout, teachers, known)
                    for name in pointwise
                )

            # Here too a scalar is enough: no logit is formed twice.
            fused, readout = losses.linear_fused_loss(
                hidden, head, mixed, order, counts, labels=labels, ids=ids, top_k=own
            )
            value = value + fused
            for name in pointwise:
                at = at_positions(objective, name, readout, order, known)
                parts[name] = parts.get(name, 0.0) + jnp.where(where, at, 0.0).sum()
            return value, count, {n: (parts[n], count) for n in weights} | metrics

        # From here on every logit is formed once more in the backward pass.
        sorts = {"uld", "gld"} & set(weights)
        gathers = ids is not None and set(pointwise) - {"sft"}
        likelihood = None
        if "alm" in weights:
            # Of the student's vocabulary: the same for every teacher.
            boundary = next(iter(known.values())).boundary
            assert boundary is not None
            likelihood = linear_likelihood(hidden, head, labels, boundary)
            parts["alm"] = count * sum(
                share * mean_of_chunks(objective, likelihood, view.chunks)
                for share, view in zip(objective.shares, views, strict=True)
            )
        if likelihood is not None and set(weights) <= {"sft", "alm"}:
            if "sft" in weights:
                parts["sft"] = -jnp.where(where, likelihood.label, 0.0).sum()
            value = sum(weights[name] * part for name, part in parts.items())
            return value, count, {n: (part, count) for n, part in parts.items()} | metrics
        readout = losses.linear_readout(
            hidden,
            head,
            labels=labels,
            ids=ids if gathers else None,
            top_k=max(objective.fusion.k, own or 1) if sorts else own,
        )
        for name in pointwise:
            at = at_positions(objective, name, readout, teachers, known)
            parts[name] = parts.get(name, 0.0) + jnp.where(where, at, 0.0).sum()
        if "dual" in weights:
            second = losses.Head(trained["auxiliary"]["head"]["kernel"], vocab_axis=1)
            held = [(teacher["top"], teacher.get("tail")) for teacher in teachers]
            parts["dual"] = dual_norm(objective, hidden, second, held, where)
        value = sum(weights[name] * part for name, part in parts.items())
        metrics |= {name: (part, count) for name, part in parts.items()}
        if sorts:
            fused, found = graph_fusion_objective(
                readout.statistics,
                None,
                [
                    FusionTeacher(
                        outputs=view.statistics, where=view.where, weight=share, aligned=True
                    )
                    for view, share in zip(views, objective.shares, strict=True)
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


def score_function(
    student: Student,
) -> Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]:
    """Held-out scores as `score(trained, batch, rng, frozen) -> (sum, count, metrics)`.

    The sum is of negative log-likelihoods. The metrics have `accuracy`. With `batch["bytes"]`, the
    number of bytes of each label, they have `bits_per_byte`. With `batch["teacher"]`, the output of
    a teacher of the same vocabulary, they have `agreement` of the likeliest tokens and
    `teacher_kl`, the divergence from the teacher by its top logits and the mass of all others.
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

"""The arms of graph fusion: what each one minimises, given the pivot's hidden states.

Nothing here holds logits: one sweep over the vocabulary yields what a loss needs of the student,
and the sources' statistics come from their cache.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax import losses, ops
from logitjax.distillation._binary_kl import binary_kl_norm
from logitjax.distillation._graph_fusion import FusionTeacher, GraphFusionConfig
from logitjax.distillation._graph_on_logits import GraphConfig
from logitjax.distillation._linear_graph_fusion import linear_graph_fusion

LOSSES: tuple[str, ...] = ("sft", "kl", "uld", "gld", "uld+gld")
# A second head for the sources' logits; it needs their vocabulary, as kl does.
DUAL = "dual"

# What a cache holds of one teacher.
CachedTeacher = tuple[ops.TopK, losses.TailSample | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """``(1 - mix) SFT + mix (distillation terms)``, the terms by the name of the arm."""

    loss: str
    weights: tuple[float, ...]
    mix: float = 0.5
    gld_weight: float = 1.0
    graph: GraphConfig = GraphConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        known = (*LOSSES, DUAL)
        if self.loss not in known:
            raise ValueError(f"loss: expected one of {', '.join(known)}, got {self.loss!r}")

    @property
    def shares(self) -> list[float]:
        """The sources' weights, summing to one."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def fusion(self) -> GraphFusionConfig:
        return GraphFusionConfig(
            mix=self.mix,
            uld_weight=float("uld" in self.loss),
            gld_weight=self.gld_weight * ("gld" in self.loss),
            graph=self.graph,
        )


def parse_gld(text: str, *, k: int) -> tuple[GraphConfig, float]:
    """``NODE/FEATURE/VALUE:WEIGHT``, such as ``rank/row_sum/closed_form:0.002``.

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


def with_auxiliary_head(graphdef: Any, params: Any) -> dict[str, Any]:
    """What the dual arm trains: the pivot, and a second head that starts as a copy of its own."""
    kernel = jnp.array(nnx.merge(graphdef, params).head_of().rows.T)
    return {"pivot": params, "auxiliary": {"head": {"kernel": kernel}}}


def pivot_of(params: Any) -> Any:
    """The pivot's parameters, without the second head that a dual arm trains beside them."""
    return params["pivot"] if isinstance(params, dict) and "auxiliary" in params else params


def targets(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """The label ``tokens[t + 1]`` of each position t, and where it counts."""
    return batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]


def hidden_states(model: Any, batch: Mapping[str, Any]) -> Any:
    """The hidden states of every position that has a successor."""
    hidden, _ = model.hidden_states(
        batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    return hidden[:, :-1]


def loss_function(
    objective: Objective, graphdef: Any, sources: Sequence[str]
) -> Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]:
    """The arm as ``loss_fn(params, batch, rng) -> (sum, count, metrics)``.

    Args:
      objective: which arm.
      graphdef: of the pivot, to be merged with ``params``.
      sources: the names under which ``batch["sources"]`` holds the statistics of each source, a
        `losses.GraphStatistics` and a mask over its positions.
    """

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any) -> Any:
        del rng
        model = nnx.merge(graphdef, pivot_of(params))
        labels, where = targets(batch["pivot"])
        hidden = hidden_states(model, batch["pivot"])
        head = model.head_of()
        count = where.sum()

        def total(values: Any) -> Any:
            return jnp.where(where, values, 0.0).sum()

        if objective.loss == "sft":
            # A scalar is enough, so the head's gradient is formed in the forward sweep.
            weights = where.astype(jnp.float32)
            sft = losses.linear_cross_entropy(hidden, head, labels, weights=weights)
            return sft, count, {"sft": (sft, count)}

        held = [batch["sources"][name] for name in sources]
        if objective.loss == "kl":
            teachers = [(teacher.top_k, teacher.tail) for teacher, _ in held]

            def mixed(readout: losses.Readout, teachers: Sequence[CachedTeacher]) -> Any:
                kl = sparse_divergence(readout, teachers, objective.shares)
                return (1 - objective.mix) * readout.cross_entropy + objective.mix * kl

            # Here too a scalar is enough: no logit is formed twice.
            weights = where.astype(jnp.float32)
            value, readout = losses.linear_fused_loss(
                hidden,
                head,
                mixed,
                teachers,
                weights,
                labels=labels,
                ids=jnp.concatenate([cached_ids(*teacher) for teacher in teachers], axis=-1),
            )
            sft = total(readout.cross_entropy)
            kl = total(sparse_divergence(readout, teachers, objective.shares))
            return value, count, {"sft": (sft, count), "kl": (kl, count)}

        if objective.loss == DUAL:
            weights = where.astype(jnp.float32)
            sft = losses.linear_cross_entropy(hidden, head, labels, weights=weights)
            ids = jnp.concatenate([teacher.indices for teacher, _ in held], axis=-1)
            auxiliary = losses.Head(params["auxiliary"]["head"]["kernel"], vocab_axis=1)
            gathered = losses.linear_readout(hidden, auxiliary, ids=ids).gathered
            parts = jnp.split(gathered, len(held), axis=-1)
            distances = [
                binary_kl_norm(part, teacher.values, reduction="mean")
                for part, (teacher, _) in zip(parts, held, strict=True)
            ]
            dual = total(sum(w * d for w, d in zip(objective.shares, distances, strict=True)))
            value = (1 - objective.mix) * sft + objective.mix * dual
            return value, count, {"sft": (sft, count), "dual": (dual, count)}

        teachers = [
            FusionTeacher(outputs=outputs, where=valid, weight=weight, aligned=True)
            for (outputs, valid), weight in zip(held, objective.shares, strict=True)
        ]
        value, metrics = linear_graph_fusion(
            hidden, head, labels, teachers, where=where, config=objective.fusion
        )
        tokens = metrics["tokens"]
        shown = [name for name in ("sft", "uld", "gld") if name in metrics]
        sums = {name: ((metrics[name] * tokens).sum(), tokens.sum()) for name in shown}
        return (value * tokens).sum(), count, sums

    return loss_fn


def cached_ids(top: ops.TopK, tail: losses.TailSample | None) -> Any:
    """Where a student's logits are needed for the KL to a cached teacher."""
    return top.indices if tail is None else jnp.concatenate([top.indices, tail.indices], axis=-1)


def sparse_divergence(
    readout: losses.Readout, teachers: Sequence[CachedTeacher], shares: Sequence[float]
) -> Any:
    """KL to each teacher's top logits and its tail, weighted; the readout has gathered them all."""
    ids = [cached_ids(*teacher) for teacher in teachers]
    divergence, start = 0.0, 0
    for (top, tail), places, share in zip(teachers, ids, shares, strict=True):
        stop = start + places.shape[-1]
        values = readout.gathered[..., start:stop]
        student = ops.TopK(values=values, indices=places, log_z=readout.log_z)
        kl = losses.sparse_kl_divergence(student, top, tail="bucket" if tail is None else tail)
        divergence += share * kl
        start = stop
    return divergence


def score_function(graphdef: Any) -> Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]:
    """Held-out scores in the same form: negative log-likelihood, and agreement with the first
    source's most likely token where the batch has one."""

    def score(params: Any, batch: Mapping[str, Any], rng: Any) -> Any:
        del rng
        model = nnx.merge(graphdef, pivot_of(params))
        labels, where = targets(batch["pivot"])
        hidden = hidden_states(model, batch["pivot"])
        readout = losses.linear_readout(hidden, model.head_of(), labels=labels, top_k=1)
        nll = jnp.where(where, readout.cross_entropy, 0.0).sum()
        count = where.sum()
        best = first_choice(readout.statistics)
        metrics = {"accuracy": ((where & (best == labels)).sum(), count)}
        if "agreement" in batch:
            metrics["agreement"] = ((where & (best == batch["agreement"])).sum(), count)
        return nll, count, metrics

    return score


def source_statistics(
    graphdef: Any, params: Any, batch: Mapping[str, Any], *, k: int
) -> losses.GraphStatistics:
    """What a source says at each position that has a successor."""
    model = nnx.merge(graphdef, params)
    readout = losses.linear_readout(hidden_states(model, batch), model.head_of(), top_k=k)
    return readout.statistics


def source_record(
    graphdef: Any, params: Any, batch: Mapping[str, Any], rows: Any, *, k: int, tail_samples: int
) -> dict[str, Any]:
    """What a `TeacherCache` keeps of a batch; a tail's draws depend on its row alone."""
    model = nnx.merge(graphdef, params)
    hidden = hidden_states(model, batch)
    statistics = losses.linear_readout(hidden, model.head_of(), top_k=k).statistics
    names = ("values", "indices", "log_z", "mean", "std")
    record = {name: getattr(statistics, name) for name in names}
    if tail_samples:

        def draw(row: Any) -> losses.TailSample:
            here, taken, number = row
            key = jax.random.fold_in(jax.random.key(0), number)
            return losses.sample_tail(key, model.logits(here), taken, tail_samples)

        # A row at a time: here logits are held.
        tail = jax.lax.map(draw, (hidden, statistics.indices, jnp.asarray(rows, jnp.uint32)))
        record |= {"tail_values": tail.values, "tail_indices": tail.indices}
    return record


def first_choice(statistics: losses.GraphStatistics) -> ops.Array:
    """The most likely token of each position."""
    return statistics.indices[..., 0]

"""What a language model (the pivot) minimises when it learns from others (the sources).

Nothing here holds logits: one sweep over the vocabulary yields what a loss needs of the pivot, and
the sources' statistics come from their caches.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax import losses, ops
from logitjax.distillation._binary_kl import binary_kl_norm
from logitjax.distillation._graph_fusion import FusionTeacher, GraphFusionConfig
from logitjax.distillation._graph_on_logits import GraphConfig
from logitjax.distillation._linear_graph_fusion import linear_graph_fusion

LOSSES: tuple[str, ...] = ("sft", "kl", "uld", "gld", "uld+gld")
# A second head learns the sources' logits; it needs their vocabulary, as kl does.
DUAL = "dual"

LossFunction = Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]
# A source's top logits, and what was drawn from its tail.
_Cached = tuple[ops.TopK, losses.TailSample | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The next token's cross-entropy, and what is learned from the sources beside it.

    ::

        (1 - mix) * cross_entropy + mix * (distillation terms)

    Attributes:
        loss: Which terms: `sft` none, `kl` KL to the sources' cached logits, `uld` universal logit
            distance, `gld` graph-on-logits distillation, `uld+gld` both, `dual` a second head.
        weights: Weight of each source.
        mix: Share of the distillation terms.
        gld_weight: Weight of the graph loss beside ULD.
        graph: The graph loss.

    Raises:
        ValueError: Another loss.

    >>> Objective(loss="uld", weights=(1.0, 3.0)).shares
    [0.25, 0.75]
    """

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

    def mixed(self, cross_entropy: Any, distillation: Any) -> Any:
        return (1 - self.mix) * cross_entropy + self.mix * distillation


def parse_gld(text: str, *, k: int) -> tuple[GraphConfig, float]:
    """A graph loss and its weight from `NODE/FEATURE/VALUE:WEIGHT`.

    Args:
        text: Such as `rank/row_sum/closed_form:0.002`.
        k: Logits of each position that the graph is made of.

    Raises:
        ValueError: The text is no such thing, or names a graph that there is not.

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
    """The label `tokens[t + 1]` of each position t, and where it counts."""
    return batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]


def hidden_states(model: Any, batch: Mapping[str, Any]) -> Any:
    """The hidden states of every position that has a successor."""
    hidden, _ = model.hidden_states(
        batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    return hidden[:, :-1]


def loss_function(objective: Objective, graphdef: Any, sources: Sequence[str]) -> LossFunction:
    """The objective as `training.make_train_step` takes it.

    Args:
        objective: What to minimise.
        graphdef: Graph definition of the pivot, to be merged with the parameters.
        sources: Names under which `batch["sources"]` holds the statistics of each source, a
            `losses.GraphStatistics` and a mask over its positions.

    Returns:
        `loss_fn(params, batch, rng) -> (sum, count, metrics)`.
    """
    distil = {"kl": _kl, DUAL: _dual}.get(objective.loss, _graph_fusion)

    def loss_fn(params: Any, batch: Mapping[str, Any], rng: Any) -> Any:
        del rng
        model = nnx.merge(graphdef, pivot_of(params))
        student = _Student(
            hidden_states(model, batch["pivot"]), model.head_of(), *targets(batch["pivot"])
        )
        if objective.loss == "sft":
            sft = student.cross_entropy()
            return sft, student.count, {"sft": (sft, student.count)}
        held = [batch["sources"][name] for name in sources]
        value, terms = distil(objective, student, held, params)
        return value, student.count, terms

    return loss_fn


class _Student(NamedTuple):
    """The pivot's states, its head, the labels, and where they count."""

    hidden: Any
    head: losses.Head
    labels: Any
    where: Any

    @property
    def count(self) -> Any:
        return self.where.sum()

    @property
    def weights(self) -> Any:
        return self.where.astype(jnp.float32)

    def total(self, values: Any) -> Any:
        return jnp.where(self.where, values, 0.0).sum()

    def cross_entropy(self) -> Any:
        """Its sum: a scalar is enough, so the head's gradient is formed in the forward sweep."""
        return losses.linear_cross_entropy(
            self.hidden, self.head, self.labels, weights=self.weights
        )


def _kl(objective: Objective, student: _Student, held: Any, params: Any) -> tuple[Any, Any]:
    """KL to the cached logits and the exact mass of the rest; here too a scalar is enough."""
    del params
    teachers = [(teacher.top_k, teacher.tail) for teacher, _ in held]

    def mixed(readout: losses.Readout, teachers: Sequence[_Cached]) -> Any:
        kl = _sparse_divergence(readout, teachers, objective.shares)
        return objective.mixed(readout.cross_entropy, kl)

    value, readout = losses.linear_fused_loss(
        student.hidden,
        student.head,
        mixed,
        teachers,
        student.weights,
        labels=student.labels,
        ids=jnp.concatenate([_cached_ids(*teacher) for teacher in teachers], axis=-1),
    )
    sft = student.total(readout.cross_entropy)
    kl = student.total(_sparse_divergence(readout, teachers, objective.shares))
    return value, {"sft": (sft, student.count), "kl": (kl, student.count)}


def _dual(objective: Objective, student: _Student, held: Any, params: Any) -> tuple[Any, Any]:
    """A second head regresses the sources' top logits; the first sees the labels alone."""
    sft = student.cross_entropy()
    ids = jnp.concatenate([teacher.indices for teacher, _ in held], axis=-1)
    auxiliary = losses.Head(params["auxiliary"]["head"]["kernel"], vocab_axis=1)
    gathered = losses.linear_readout(student.hidden, auxiliary, ids=ids).gathered
    parts = jnp.split(gathered, len(held), axis=-1)
    distances = [
        share * binary_kl_norm(part, teacher.values, reduction="mean")
        for part, (teacher, _), share in zip(parts, held, objective.shares, strict=True)
    ]
    dual = student.total(sum(distances))
    terms = {"sft": (sft, student.count), "dual": (dual, student.count)}
    return objective.mixed(sft, dual), terms


def _graph_fusion(
    objective: Objective, student: _Student, held: Any, params: Any
) -> tuple[Any, Any]:
    """ULD, GLD or both: the sources may have other vocabularies."""
    del params
    teachers = [
        FusionTeacher(outputs=outputs, where=valid, weight=weight, aligned=True)
        for (outputs, valid), weight in zip(held, objective.shares, strict=True)
    ]
    config = GraphFusionConfig(
        mix=objective.mix,
        uld_weight=float("uld" in objective.loss),
        gld_weight=objective.gld_weight * ("gld" in objective.loss),
        graph=objective.graph,
    )
    value, metrics = linear_graph_fusion(
        student.hidden, student.head, student.labels, teachers, where=student.where, config=config
    )
    tokens = metrics["tokens"]
    names = [name for name in ("sft", "uld", "gld") if name in metrics]
    terms = {name: ((metrics[name] * tokens).sum(), tokens.sum()) for name in names}
    return (value * tokens).sum(), terms


def _cached_ids(top: ops.TopK, tail: losses.TailSample | None) -> Any:
    """Where a student's logits are needed for the KL to a cached teacher."""
    return top.indices if tail is None else jnp.concatenate([top.indices, tail.indices], axis=-1)


def _sparse_divergence(
    readout: losses.Readout, teachers: Sequence[_Cached], shares: Sequence[float]
) -> Any:
    """KL to each teacher's top logits and its tail, weighted; the readout has gathered them all."""
    ids = [_cached_ids(*teacher) for teacher in teachers]
    divergence, start = 0.0, 0
    for (top, tail), places, share in zip(teachers, ids, shares, strict=True):
        stop = start + places.shape[-1]
        values = readout.gathered[..., start:stop]
        student = ops.TopK(values=values, indices=places, log_z=readout.log_z)
        kl = losses.sparse_kl_divergence(student, top, tail="bucket" if tail is None else tail)
        divergence += share * kl
        start = stop
    return divergence


def score_function(graphdef: Any) -> LossFunction:
    """Held-out scores in the form of a loss, for `training.make_eval_step`.

    Args:
        graphdef: Graph definition of the pivot.

    Returns:
        The negative log-likelihood as loss, `accuracy`, and `agreement` with the most likely tokens
        of a source where the batch has them under that name.
    """

    def score(params: Any, batch: Mapping[str, Any], rng: Any) -> Any:
        del rng
        model = nnx.merge(graphdef, pivot_of(params))
        labels, where = targets(batch["pivot"])
        hidden = hidden_states(model, batch["pivot"])
        readout = losses.linear_readout(hidden, model.head_of(), labels=labels, top_k=1)
        nll = jnp.where(where, readout.cross_entropy, 0.0).sum()
        count = where.sum()
        best = readout.statistics.indices[..., 0]
        metrics = {"accuracy": ((where & (best == labels)).sum(), count)}
        if "agreement" in batch:
            metrics["agreement"] = ((where & (best == batch["agreement"])).sum(), count)
        return nll, count, metrics

    return score


def teacher_record(
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
            return losses.TailSample.draw(key, model.logits(here), taken, tail_samples)

        # A row at a time: here logits are held.
        tail = jax.lax.map(draw, (hidden, statistics.indices, jnp.asarray(rows, jnp.uint32)))
        record |= {"tail_values": tail.values, "tail_indices": tail.indices}
    return record

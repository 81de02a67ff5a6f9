"""What a student minimises: a weighted mix of losses, given its hidden states and its teachers.

Nothing here holds logits: one sweep over the vocabulary yields what a loss needs of the student,
and what the teachers say comes from their caches.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from logitjax import losses, ops
from logitjax.distillation._binary_kl import binary_kl_norm
from logitjax.distillation._graph_fusion import (
    FusionTeacher,
    GraphFusionConfig,
    graph_fusion_objective,
)
from logitjax.distillation._graph_on_logits import GraphConfig
from logitjax.distillation._likelihood_matching import (
    ChunkScores,
    Likelihood,
    TokenSet,
    likelihood_matching,
    linear_likelihood,
)
from logitjax.distillation._matched_tokens import Matches, hybrid_logit_distance, with_rest
from logitjax.distillation._projected_kl import linear_projected_kl_divergence, project_top_k
from logitjax.distillation._projection import Members, Rule, TokenProjection
from logitjax.distillation._student import Student, hidden_states

# Those that compare token by token need one vocabulary.
_SAME_VOCABULARY = ("kl", "rkl", "jsd", "dual")
# Those that see another vocabulary through a projection, and its rule.
PROJECTIONS: dict[str, Rule] = {
    "first_piece": "first_piece",
    "pkl": "spread",
    "mined": "edit_distance",
    "hybrid": "exact",
    "hkl": "exact",
}
TERMS: tuple[str, ...] = ("sft", *_SAME_VOCABULARY, "uld", "gld", *PROJECTIONS, "alm")

# What a cache holds of one teacher.
CachedTeacher = tuple[ops.TopK, losses.TailSample | None]


class TeacherView(NamedTuple):
    """What one teacher says of a batch, at the student's positions.

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
    """How a teacher's vocabulary lies over the student's.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """A sum of losses by their weights; one that has several teachers is their mean.

    ::

        sft   cross-entropy of the text               rkl   KL(student || teacher)
        kl    KL(teacher || student)                  jsd   generalised Jensen-Shannon divergence
        uld   universal logit distance                gld   graph-on-logits distillation
        dual  the KL norm of dual-head distillation, on a second head

    Teachers of other tokenizers::

        first_piece  KL over the teacher's vocabulary, where each token of the student is the first
                     piece that the teacher cuts it into
        pkl          the same, where it is spread over its pieces (X-Token)
        hybrid       JSD of common tokens and the sorted distance of others (GOLD)
        hkl          KL of common tokens and the sorted distance of others (X-Token)
        alm          approximate likelihood matching of chunks of text
        mined        KL by the nearest spelling, cross-entropy where tokens do not meet (MinED)

    Each of these, `uld` and `gld` is a mean over what it sees: positions where both have read the
    same text (`first_piece`, `pkl`), those whose label is one token on both sides (`hybrid`,
    `hkl`), chunks (`alm`). `seen/NAME` in the metrics is how large a share of the text that is.

    `kl`, `rkl` and `jsd` know the teacher's top logits and the mass of all others, which is one
    bucket (or what was drawn from it, where the cache has draws: then `kl` is unbiased). At a
    temperature other than 1 that mass is not known: then they compare the top logits alone.

    Attributes:
        terms: Names and weights.
        teachers: Weights of the teachers, divided by their sum.
        student_temperature: Divides the student's logits in `kl`, `rkl` and `jsd`.
        teacher_temperature: Divides the teachers'.
        beta: Share of the teacher in the mixture of `jsd` and `hybrid`.
        alm_temperature: Divides log-probabilities of chunks in `alm`, whose divergence is
            multiplied by it.
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
    alm_temperature: float = 100.0
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
    def rules(self) -> tuple[str, ...]:
        """The projections that it needs."""
        return tuple(dict.fromkeys(PROJECTIONS[n] for n in self.weights if n in PROJECTIONS))

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
    objective: Objective,
    student: Student,
    sources: Mapping[str, Vocabularies] | Sequence[str] = (),
) -> Callable[..., tuple[Any, Any, dict[str, tuple[Any, Any]]]]:
    """The objective as `loss_fn(trained, batch, rng, frozen) -> (sum, count, metrics)`.

    Args:
        objective: What is minimised.
        student: Whose `trained` and `frozen` the function takes.
        sources: Names under which `batch["sources"]` holds the `TeacherView` of each teacher, and
            how its vocabulary lies over the student's, where it has another.

    Raises:
        ValueError: A projection that a loss needs is not there, or too large for it.
    """
    weights = objective.weights
    known = dict(sources) if isinstance(sources, Mapping) else {n: Vocabularies() for n in sources}
    if objective.taught:
        for name, vocabularies in known.items():
            _check_projections(objective, name, vocabularies)

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
            _prepare(objective, view, vocabularies, where)
            for view, vocabularies in zip(views, names.values(), strict=True)
        ]
        metrics = _seen(objective, views, where)
        ids = _gathered_ids(teachers)
        own = max((t["top"].values.shape[-1] for t in teachers if "exact" in t), default=None)
        pointwise = [n for n in weights if n in _POINTWISE]
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
        if not {"uld", "gld", "dual", "alm"} & set(weights):
            order = [{k: v for k, v in t.items() if k != "wide"} for t in teachers]

            def mixed(readout: losses.Readout, teachers: Sequence[Mapping[str, Any]]) -> Any:
                return sum(
                    weights[name] * _at_positions(objective, name, readout, teachers, known)
                    for name in pointwise
                )

            # Here too a scalar is enough: no logit is formed twice.
            fused, readout = losses.linear_fused_loss(
                hidden, head, mixed, order, counts, labels=labels, ids=ids, top_k=own
            )
            value = value + fused
            for name in pointwise:
                at = _at_positions(objective, name, readout, order, known)
                parts[name] = parts.get(name, 0.0) + jnp.where(where, at, 0.0).sum()
            return value, count, {n: (parts[n], count) for n in weights} | metrics

        sorts = {"uld", "gld"} & set(weights)
        gathers = ids is not None and set(pointwise) - {"sft"}
        likelihood = None
        if "alm" in weights:
            boundary = next(iter(known.values())).boundary
            assert boundary is not None
            likelihood = linear_likelihood(hidden, head, labels, boundary)
            parts["alm"] = count * sum(
                share * _mean_of_chunks(objective, likelihood, view.chunks)
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
            at = _at_positions(objective, name, readout, teachers, known)
            parts[name] = parts.get(name, 0.0) + jnp.where(where, at, 0.0).sum()
        if "dual" in weights:
            second = losses.Head(trained["auxiliary"]["head"]["kernel"], vocab_axis=1)
            held = [(teacher["top"], teacher.get("tail")) for teacher in teachers]
            parts["dual"] = _dual(objective, hidden, second, held, where)
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


_POINTWISE = ("sft", "kl", "rkl", "jsd", *PROJECTIONS)
# By how many of the student's tokens the top k of a teacher may be told at a position.
MOST_MEMBERS = 4096


def _check_projections(objective: Objective, name: str, vocabularies: Vocabularies) -> None:
    for loss in objective.weights:
        rule = PROJECTIONS.get(loss)
        if rule is not None and rule not in vocabularies.projections:
            raise ValueError(f"loss {loss!r}: expected the projection {rule!r} of {name}, got none")
    if "alm" in objective.weights and vocabularies.boundary is None:
        raise ValueError(f"loss 'alm': expected the boundary tokens of {name}, got none")


def _prepare(
    objective: Objective, view: TeacherView, vocabularies: Vocabularies, where: Any
) -> dict[str, Any]:
    """What the losses at positions need of one teacher: arrays, and `wide` projections."""
    top = view.statistics.top_k
    out: dict[str, Any] = {"top": top, "wide": {}}
    names = set(objective.weights)
    if names & {"kl", "rkl", "jsd", "dual"}:
        out["tail"] = view.statistics.tail
        out["ids"] = cached_ids(top, view.statistics.tail)
    if names & set(PROJECTIONS):
        single = view.where if view.single is None else view.single
        for place, valid in (("starts", view.where), ("single", single)):
            seen = valid & where
            share = where.sum() / jnp.maximum(seen.sum(), 1)
            out[place] = jnp.where(seen, share, 0.0)
            out[f"{place}_where"] = seen
    for name in ("first_piece", "pkl", "mined"):
        if name not in names:
            continue
        projection = vocabularies.projections[PROJECTIONS[name]]
        if projection.capacity(top.values.shape[-1]) <= MOST_MEMBERS:
            out[PROJECTIONS[name]] = projection.members(top.indices)
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


def _gathered_ids(teachers: Sequence[Mapping[str, Any]]) -> Any:
    ids = [_ids_of(t[name]) for t in teachers for name in _GATHERED if name in t]
    return jnp.concatenate(ids, axis=-1) if ids else None


def _seen(objective: Objective, views: Sequence[TeacherView], where: Any) -> dict[str, Any]:
    """How many of the labels each loss across tokenizers sees."""
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


def _mean_of_chunks(objective: Objective, likelihood: Likelihood, chunks: ChunkScores) -> Any:
    tau = objective.alm_temperature
    value = likelihood_matching(likelihood, chunks, temperature=tau)
    return (tau if math.isfinite(tau) else 1.0) * value.sum() / jnp.maximum(chunks.where.sum(), 1)


def cached_ids(top: ops.TopK, tail: losses.TailSample | None) -> Any:
    """Where a student's logits are needed for the divergence from a cached teacher."""
    return top.indices if tail is None else jnp.concatenate([top.indices, tail.indices], axis=-1)


def _at_positions(
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
        projected = project_top_k(student, top, teacher[PROJECTIONS[name]])
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

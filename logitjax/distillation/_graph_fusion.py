"""Graph fusion: learn from labels and from any number of teachers of any vocabulary at once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax import ops
from logitjax.distillation._graph_on_logits import GraphConfig, gradient_inside, graph_on_logits
from logitjax.distillation._universal_logit_distance import universal_logit_distance
from logitjax.losses import GraphStatistics, graph_statistics
from logitjax.losses import cross_entropy as _cross_entropy
from logitjax.ops import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphFusionConfig:
    """Weights of the three parts, and options of the graph.

    Attributes:
        mix: lambda in `(1 - lambda) SFT + lambda (ULD + GLD)`, between 0 and 1.
        uld_weight: factor of the token-wise part; 0 leaves it out.
        gld_weight: factor of the graph part; 0 leaves it out.
        uld_top_k: entries that the token-wise part compares; None is `graph.k`.
        graph: the graph part's options.
    """

    mix: float = 0.5
    uld_weight: float = 1.0
    gld_weight: float = 1.0
    uld_top_k: int | None = None
    graph: GraphConfig = GraphConfig()  # noqa: RUF009

    def __post_init__(self):
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"mix: expected 0 to 1, got {self.mix}")
        for name in ("uld_weight", "gld_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.uld_top_k is not None and self.uld_top_k < 1:
            raise ValueError(f"uld_top_k: expected at least 1, got {self.uld_top_k}")

    @property
    def k(self) -> int:
        """Number of logits that the `GraphStatistics` must hold for each position."""
        kept = [self._uld_k] if self.uld_weight else []
        kept += [self.graph.k] if self.gld_weight else []
        return max(kept, default=1)

    @property
    def _uld_k(self) -> int:
        return self.graph.k if self.uld_top_k is None else self.uld_top_k


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionTeacher:
    """One source of `graph_fusion_objective`.

    Attributes:
        outputs: logits `[*batch, positions, vocab]` or their `GraphStatistics`; the teacher's
            own tokenizer, length and vocabulary.
        where: its valid positions, `[*batch, positions]`; None is all.
        weight: a number or `[*batch]`; weights are divided by their sum over the teachers.
        aligned: whether position t is the student's position t (of another tokenizer's outputs:
            gathered where both have read the same text, see `align_chunks`).
            Then only positions valid on both sides are compared, by ULD and by GLD.
    """

    outputs: Any
    where: Any = None
    weight: Any = 1.0
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})


def graph_fusion_objective(
    student: Float[Array, "*batch positions vocab"] | GraphStatistics,
    labels: Int[Array, "*batch positions"] | None,
    teachers: Sequence[FusionTeacher],
    *,
    where: Bool[Array, "*batch positions"] | None = None,
    config: GraphFusionConfig = GraphFusionConfig(),
    cross_entropy: Float[Array, "*batch positions"] | None = None,
    axis_name: str | None = None,
    sequence_axis_name: str | None = None,
) -> tuple[Float[jax.Array, "*batch"], dict[str, jax.Array]]:
    """The whole training objective of graph fusion, one value a sample.

    With teacher weights w that sum to one::

        (1 - lambda) SFT + lambda sum_i w_i (uld_weight ULD_i + gld_weight GLD_i)

    SFT is the cross entropy of the labels, averaged over a sample's valid positions. ULD compares
    the sorted top probabilities position by position: where the teacher is masked or tokenized
    differently, the n-th valid position of one is held against the n-th of the other, up to the
    shorter, and the mean is over those. GLD is `graph_on_logits`. Labels and masks are already
    shifted: position t predicts `labels[t]` where `where[t]`.

    Args:
        student: logits, or their `GraphStatistics` from a blocked loss that never holds the logits
            (then give `cross_entropy`, too).
        labels: integer ids; None where `cross_entropy` is given.
        teachers: any number, also none.
        where: the student's valid positions.
        config: weights and graph options.
        cross_entropy: per position, instead of computing it from the logits.
        axis_name: mesh axis that shards every vocabulary, inside `shard_map`.
        sequence_axis_name: mesh axis that shards positions, inside `shard_map`; with it the
            positions of student and teachers must correspond one to one.

    Returns:
        The objective `[*batch]`, float32, and metrics `[*batch]`: `sft`, `uld`, `gld`
        (unweighted by lambda), `tokens` (valid positions: `sum(loss * tokens) / sum(tokens)`
        is the mean that weights tokens equally), `uld/i` and `gld/i` of each teacher and
        `graph/NAME`, the weighted mean over the teachers of what `graph_on_logits` reports.

    Raises:
        ValueError: where labels or cross entropy are missing, or shapes do not fit.

    A data-parallel step, and the same with a teacher's statistics from a cache:

    >>> import jax, numpy as np
    >>> devices = jax.device_count()
    >>> rng = np.random.default_rng(0)
    >>> student, teacher = (rng.normal(size=(devices, 2, *n)) for n in ((8, 32), (6, 48)))
    >>> labels = np.zeros((devices, 2, 8), np.int32)
    >>> def step(student, labels, teacher):
    ...     teachers = [FusionTeacher(outputs=graph_statistics(teacher, 10))]
    ...     loss = lambda s: graph_fusion_objective(s, labels, teachers)[0].mean()
    ...     value, gradient = jax.value_and_grad(loss)(student)
    ...     return jax.lax.pmean(value, "data"), gradient
    >>> value, gradient = jax.pmap(step, axis_name="data")(student, labels, teacher)
    >>> gradient.shape == student.shape, np.unique(value).size == 1
    (True, True)

    References:
        InfiGFusion (arXiv 2505.13893), framework figure: SFT enters as (1 - lambda). Its lambda is
        not published where we could read it; 0.5 is the default of DSKD, whose loop it resembles.
        ULD: Boizard et al. (arXiv 2402.12030), here on the top probabilities as in the figure.
    """
    is_statistics = isinstance(student, GraphStatistics)
    needed = config.k if teachers else 1
    shape = jnp.shape(student.values if is_statistics else student)[:-1]
    valid = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    ops.checks.where(valid, valid.shape)
    if valid.shape != shape:
        raise ValueError(f"where: expected a position mask of shape {shape}, got {valid.shape}")
    given: Any = student if where is None else gradient_inside(student, valid)
    statistics = given if is_statistics else graph_statistics(given, needed, axis_name=axis_name)
    if cross_entropy is None:
        if is_statistics or labels is None:
            raise ValueError(
                "cross_entropy: needed where student is a GraphStatistics or labels is None"
            )
        cross_entropy = _cross_entropy(given, labels, axis_name=axis_name)
    if cross_entropy.shape != shape:
        raise ValueError(f"cross_entropy: expected shape {shape}, got {cross_entropy.shape}")

    sft, tokens = _row_mean(cross_entropy, valid, sequence_axis_name)
    metrics = {"sft": sft, "tokens": tokens}
    if not teachers:
        return sft, jax.lax.stop_gradient(metrics)

    weights = [jnp.broadcast_to(jnp.asarray(t.weight, jnp.float32), sft.shape) for t in teachers]
    total = sum(weights)
    weights = [w / jnp.where(total > 0, total, 1.0) for w in weights]
    uld = gld = jnp.zeros_like(sft)
    for i, (teacher, weight) in enumerate(zip(teachers, weights)):
        outputs = teacher.outputs
        if not isinstance(outputs, GraphStatistics):
            outputs = graph_statistics(outputs, needed, axis_name=axis_name)
        outputs = jax.lax.stop_gradient(outputs)
        ours, theirs = where, teacher.where
        if teacher.aligned:
            if outputs.values.shape[:-1] != shape:
                raise ValueError(
                    f"teachers[{i}]: aligned outputs have the student's positions {shape}, got "
                    f"{outputs.values.shape[:-1]}"
                )
            ours = theirs = valid if theirs is None else valid & theirs
        if config.uld_weight:
            part = _token_wise(statistics, outputs, ours, theirs, config._uld_k, sequence_axis_name)
            metrics[f"uld/{i}"] = part
            uld += weight * part
        if config.gld_weight:
            part, graph = graph_on_logits(
                statistics,
                outputs,
                config=config.graph,
                student_where=ours,
                teacher_where=theirs,
                sequence_axis_name=sequence_axis_name,
            )
            metrics[f"gld/{i}"] = part
            gld += weight * part
            for name, value in graph.items():
                name = f"graph/{name}"
                metrics[name] = metrics.get(name, 0.0) + weight * value
    metrics |= {"uld": uld, "gld": gld}
    fused = config.uld_weight * uld + config.gld_weight * gld
    return (1.0 - config.mix) * sft + config.mix * fused, jax.lax.stop_gradient(metrics)


def _row_mean(values, valid, axis):
    tokens = ops.psum(valid.sum(-1, dtype=jnp.float32), axis)
    total = ops.psum(jnp.where(valid, values, 0.0).sum(-1), axis)
    return total / jnp.maximum(tokens, 1.0), tokens


def _token_wise(student, teacher, student_where, teacher_where, k, axis):
    """ULD over positions that both have, after the valid ones have been moved to the front."""
    s, t = student.truncate(k).top_k, teacher.truncate(k).top_k
    same_length = s.log_z.shape == t.log_z.shape
    if not (student_where is teacher_where and same_length):
        if axis is not None and not same_length:
            raise ValueError(
                f"sequence_axis_name: the token-wise part needs teachers of the student's length "
                f"{s.log_z.shape[-1]}, got {t.log_z.shape[-1]}"
            )
        if axis is None:
            s, student_where = _to_front(s, student_where)
            t, teacher_where = _to_front(t, teacher_where)
            shorter = min(s.log_z.shape[-1], t.log_z.shape[-1])
            s, t = (_first(x, shorter) for x in (s, t))
            student_where, teacher_where = (
                student_where[..., :shorter],
                teacher_where[..., :shorter],
            )
    valid = jnp.ones(s.log_z.shape, bool)
    for mask in (student_where, teacher_where):
        valid = valid if mask is None else valid & mask
    # A position that only the student has is held against whatever the teacher has there.
    s = gradient_inside(s, valid)
    return _row_mean(universal_logit_distance(s, t, top_k=k), valid, axis)[0]


def _to_front(top, where):
    if where is None:
        return top, jnp.ones(top.log_z.shape, bool)

    def move(values, log_z, indices, where):
        order = jnp.argsort(~where, axis=-1, stable=True)
        at = order[..., None]
        return (
            jnp.take_along_axis(values, at, -2),
            jnp.take_along_axis(log_z, order, -1),
            jnp.take_along_axis(indices, at, -2),
            jnp.take_along_axis(where, order, -1),
        )

    ndim = top.values.ndim
    values, log_z, indices, where = ops.sharding.over_batch(
        move,
        (ndim, ndim - 1, ndim, ndim - 1),
        top.values,
        top.log_z,
        top.indices,
        jnp.asarray(where),
    )
    return ops.TopK(values=values, indices=indices, log_z=log_z), where


def _first(top, length):
    return ops.TopK(
        values=top.values[..., :length, :],
        indices=top.indices[..., :length, :],
        log_z=top.log_z[..., :length],
    )

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from logitjax import ops, transport
from logitjax.losses import GraphStatistics, graph_statistics
from logitjax.ops import Array
from logitjax.transport import FactoredGraph

Node = Literal["rank", "token"]
Logits = Literal["standardized", "softmax", "raw"]
Value = Literal["closed_form", "sorted_coupling"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphConfig:
    """Options of `terms.GLD`, which documents them."""

    k: int = 10
    node: Node = "rank"
    feature: transport.Feature = "row_sum"
    logits: Logits = "standardized"
    compare: Value = "closed_form"

    def __post_init__(self):
        for name, choices in (
            ("node", Node),
            ("feature", transport.Feature),
            ("logits", Logits),
            ("compare", Value),
        ):
            chosen = getattr(self, name)
            if chosen not in get_args(choices):
                raise ValueError(f"{name}: expected one of {get_args(choices)}, got {chosen!r}")
        if self.k < 1:
            raise ValueError(f"k: expected at least 1, got {self.k}")
        # Under these settings the loss would silently be zero.
        if self.feature == "off_diagonal" and self.k == 1 and self.compare == "closed_form":
            raise ValueError(
                "this graph loss is identically zero: feature='off_diagonal' has nothing off the "
                "diagonal at k=1"
            )

    def check_vocabulary(self, vocab_size: int | None) -> None:
        """Raise a ValueError if keeping the whole vocabulary makes the loss vanish."""
        if (
            vocab_size is not None
            and self.k >= vocab_size
            and self.logits == "standardized"
            and self.feature == "row_sum"
        ):
            effect = (
                "is identically zero" if self.compare == "closed_form" else "sorts rounding noise"
            )
            raise ValueError(
                f"this graph loss {effect}: k={self.k} keeps the whole vocabulary of "
                f"{vocab_size}, whose z-scores sum to zero, so every row sum vanishes; "
                "use a smaller k or feature='off_diagonal'"
            )


def graph_on_logits(
    student: Float[Array, "*batch student_positions student_vocab"] | GraphStatistics,
    teacher: Float[Array, "*batch teacher_positions teacher_vocab"] | GraphStatistics,
    *,
    config: GraphConfig = GraphConfig(),
    student_where: Bool[Array, "*batch student_positions"] | None = None,
    teacher_where: Bool[Array, "*batch teacher_positions"] | None = None,
    axis_name: str | None = None,
    sequence_axis_name: str | None = None,
) -> tuple[Float[jax.Array, "*batch"], dict[str, jax.Array]]:
    """Distance between co-activation graphs of two models' top-k logits, one graph per sample.

    Each position contributes the outer product of its k largest logits, and the graph is their sum
    over positions, so the two models may differ in tokenization, length and vocabulary. The graph
    is never formed; with T valid positions and features f::

        Z[t, :]   transformed top-k logits of position t
        C         Z^T Z / T
        f         C 1 = Z^T (Z 1) / T                          O(T k)
        loss      mean_r | sort(f_student)_r - sort(f_teacher)_r |       (closed_form)
                  mean_rs ( C_student[rs] - C_teacher[rs] )^2, sorted    (sorted_coupling)

    With token nodes, sums run over all nodes and are divided by k (by k^2 for the coupling), so
    that both kinds of node have the same scale.

    The loss depends neither on the order of positions nor on the identity of tokens, so it needs
    another loss that anchors each token. The teacher gets no gradient.

    Args:
        student, teacher: logits `[*batch, positions, vocab]`, or their `GraphStatistics`.
        config: what to compare, a `terms.GLD`.
        student_where, teacher_where: valid positions, `[*batch, positions]`.
        axis_name: mesh axis that shards both vocabularies, inside `shard_map`.
        sequence_axis_name: mesh axis that shards both models' positions, inside `shard_map`.

    Returns:
        The loss `[*batch]` in float32, zero where either side of a sample has no valid position,
        and metrics, each `[*batch]` and without gradient, which reveal degenerate settings:

        - `closed_form`: the closed form, whatever `config.compare`.
        - `student_scale`, `teacher_scale`: largest feature; near zero, the graph has no content.
        - `student_row_sum_min`, `student_row_sum_max`: range of Z 1. If both are one, C 1 is the
          summed distribution and co-activations cancel out.
        - `moved`: share of the student's nodes that sorting moves. It is zero for rank nodes whose
          row sums are positive: the loss is then a row-sum-weighted, time-averaged sorted L1.
        - `student_rank_one`: share of the energy of C along f (rank nodes); near one means that
          the graph holds a single direction.
        - `student_tokens`, `teacher_tokens`: valid positions.

        `transport.certificate` bounds the Gromov-Wasserstein cost itself.

    Raises:
        ValueError: k exceeds a vocabulary, batches differ, or the setting is identically zero.

    >>> import jax, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> student, teacher = (rng.normal(size=shape) for shape in ((2, 8, 32), (2, 5, 48)))
    >>> loss, metrics = jax.jit(graph_on_logits)(student, teacher)
    >>> loss.shape, metrics["student_tokens"].tolist()
    ((2,), [8.0, 8.0])

    References:
        InfiGFusion (arXiv 2505.13893), framework figure: plain L1 of the sorted row features of C =
        Z^T Z. We divide by the numbers of valid positions and of kept logits, standardise over the
        vocabulary before the top-k (the reverse order makes the loss identically zero), and make
        what the paper leaves open an option.
    """
    student_where = _positions("student_where", student_where, student)
    student = _statistics("student", gradient_inside(student, student_where), config, axis_name)
    teacher_where = _positions("teacher_where", teacher_where, teacher)
    teacher = jax.lax.stop_gradient(_statistics("teacher", teacher, config, axis_name))
    if student.values.shape[:-2] != teacher.values.shape[:-2]:
        raise ValueError(
            f"teacher: expected batch shape {student.values.shape[:-2]} as the student's, "
            f"got {teacher.values.shape[:-2]}"
        )
    # Not for token graphs, whose energy would take products of all pairs of positions.
    names = [*_METRICS, *(["student_rank_one"] if config.node == "rank" else [])]

    def compare(*arrays):
        half = len(arrays) // 2
        loss, metrics = _compare(
            _Graph(arrays[:half], student.vocab_size, config, sequence_axis_name),
            _Graph(arrays[half:], teacher.vocab_size, config, sequence_axis_name),
        )
        return loss, *(metrics[name] for name in names)

    out_ndims = (student.values.ndim - 2,) * (1 + len(names))
    arrays = (*_arrays(student, student_where), *_arrays(teacher, teacher_where))
    loss, *values = ops.mesh.over_batch(compare, out_ndims, *arrays)
    return loss, jax.lax.stop_gradient(dict(zip(names, values)))


_METRICS = (
    "closed_form",
    "student_scale",
    "teacher_scale",
    "student_row_sum_min",
    "student_row_sum_max",
    "moved",
    "student_tokens",
    "teacher_tokens",
)


def _compare(student, teacher):
    config = student.config
    if config.node == "token":
        # A node for each token of either vocabulary; tokens missing in one are empty nodes.
        student.nodes = teacher.nodes = max(student.nodes, teacher.nodes)
    f, g = (graph.features(config.feature) for graph in (student, teacher))
    closed_form = jnp.sum(jnp.abs(jnp.sort(f, axis=-1) - jnp.sort(g, axis=-1)), axis=-1) / config.k
    metrics = _metrics(student, teacher, f, g) | {"closed_form": closed_form}
    loss = closed_form
    if config.compare == "sorted_coupling":
        loss = _sorted_coupling_value(student, teacher, f, g)
    # The distance to an empty graph is the size of the other, and would pull it towards zero.
    both = (student.tokens > 0) & (teacher.tokens > 0)
    return jnp.where(both, loss, 0.0), metrics


def _arrays(statistics, where):
    names = ("values", "indices", "log_z", "mean", "std")
    return *(jnp.asarray(getattr(statistics, name)) for name in names), where


def gradient_inside(outputs: Any, where: Array) -> Any:
    """Return logits or `GraphStatistics` that get no gradient outside a mask."""
    return jax.tree.map(
        lambda x: ops.gradient_where(x, where) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        outputs,
    )


def _positions(name, where, outputs):
    values = outputs.values if isinstance(outputs, GraphStatistics) else outputs
    shape = jnp.shape(values)[:-1]
    if where is None:
        return jnp.ones(shape, bool)
    ops.checks.where(where, where.shape, name)
    if where.shape != shape:
        raise ValueError(f"{name}: expected a position mask of shape {shape}, got {where.shape}")
    return jnp.asarray(where)


class _Graph:
    """Matrix Z of a model: transformed, masked, scaled so that Z^T Z is a mean over positions."""

    def __init__(self, arrays, vocab_size, config, sequence_axis_name):
        values, indices, log_z, mean, std, self.valid = arrays
        self.config, self.axis = config, sequence_axis_name
        z = _transform(values, log_z, mean, std, config.logits)
        self.tokens = ops.mesh.psum(self.valid.sum(-1, dtype=z.dtype), self.axis)
        # The square root, since the graph is a product of two such factors.
        scale = jax.lax.rsqrt(jnp.maximum(self.tokens, 1.0))[..., None, None]
        # `where`, not a product: padding may hold inf or nan.
        self.unscaled = jnp.where(self.valid[..., None], z, 0.0)
        self.z = self.unscaled * scale
        self.ids, self.nodes = None, config.k
        if config.node == "token":
            self.ids, self.nodes = _token_nodes(indices, vocab_size, self.axis)

    def features(self, feature):
        """Graph features; sums over all nodes are divided by k, not by the number of nodes."""
        f = transport.graph_features(
            self.z, self.ids, feature=feature, num_nodes=self.nodes, sequence_axis_name=self.axis
        )
        return f * (self.nodes / self.config.k) ** 0.5 if feature == "row_rms" else f

    def matrix(self):
        return ops.mesh.psum(jnp.einsum("...tu,...tw->...uw", self.z, self.z), self.axis)


def _statistics(name, outputs, config, axis_name):
    if isinstance(outputs, GraphStatistics):
        statistics = outputs.truncate(config.k)
    else:
        if jnp.ndim(outputs) < 2:
            raise ValueError(
                f"{name}: expected [*batch, positions, vocab], got shape {jnp.shape(outputs)}"
            )
        statistics = graph_statistics(outputs, config.k, axis_name=axis_name)
    config.check_vocabulary(statistics.vocab_size)
    return statistics


def _transform(values, log_z, mean, std, logits):
    """Compute Z from the kept logits; -inf (k beyond the real vocabulary) becomes zero."""
    real = values != -jnp.inf
    values = jnp.where(real, values, 0.0)
    if logits == "standardized":
        # With large logits the difference and the squared deviation, by which the derivative
        # divides, may overflow, and the reciprocal is subnormal: hence an eighth of each.
        unit = jax.lax.stop_gradient(_positive(std))
        z = (0.125 * values - 0.125 * mean[..., None]) / (0.125 * unit)[..., None]
        z = z / (_positive(std) / unit)[..., None]
    else:
        z = jnp.exp(values - log_z[..., None]) if logits == "softmax" else values
    return jnp.where(real, z, 0.0)


def _positive(x):
    # The deviation of equal logits is zero, and their z-scores should be too.
    return jnp.where(x > 0, x, 1.0)


def _token_nodes(ids, vocab, axis):
    """Node of each kept token: its id if the vocabulary is small, otherwise its rank among ids."""
    positions, k = ids.shape[-2:]
    if axis is not None:
        positions *= jax.lax.axis_size(axis)
    if vocab is not None and vocab <= positions * k:
        return ids, vocab
    return transport.compact_nodes(ids, axis), positions * k


def _order(f):
    return jnp.argsort(-jax.lax.stop_gradient(f), axis=-1)


def _sorted_coupling_value(student, teacher, f, g):
    """Cost of the matching that sorting finds."""

    def matched(graph, features):
        if graph.ids is None:
            return FactoredGraph(jnp.take_along_axis(graph.z, _order(features)[..., None, :], -1))
        return FactoredGraph(graph.z, _renumber(graph.ids, features), graph.nodes)

    distance = matched(student, f).squared_distance(matched(teacher, g), student.axis)
    # A mean over pairs of nodes.
    return distance[0] / student.config.k**2


def _renumber(ids, f):
    """Number nodes by their rank in the sorted order, so that equal numbers are matched."""
    # The inverse of a permutation.
    order = jnp.argsort(_order(f), axis=-1)
    flat = jnp.take_along_axis(order, ids.reshape(*ids.shape[:-2], -1), axis=-1)
    return flat.reshape(ids.shape)


def _metrics(student, teacher, f, g):
    row_sums = student.unscaled.sum(-1)
    low = jnp.min(jnp.where(student.valid, row_sums, jnp.inf), axis=-1)
    high = jnp.max(jnp.where(student.valid, row_sums, -jnp.inf), axis=-1)
    # pmin and pmax have no derivative.
    if student.axis is not None:
        low = jax.lax.pmin(jax.lax.stop_gradient(low), student.axis)
        high = jax.lax.pmax(jax.lax.stop_gradient(high), student.axis)
    ordered = jnp.sort(f, axis=-1, descending=True)
    metrics = {
        "student_scale": jnp.max(jnp.abs(f), axis=-1),
        "teacher_scale": jnp.max(jnp.abs(g), axis=-1),
        "student_row_sum_min": jnp.where(student.tokens > 0, low, 0.0),
        "student_row_sum_max": jnp.where(student.tokens > 0, high, 0.0),
        "moved": jnp.mean(ordered != f, axis=-1),
        "student_tokens": student.tokens,
        "teacher_tokens": teacher.tokens,
    }
    if student.ids is None:
        c = student.matrix()
        along = jnp.square(jnp.einsum("...uw,...w->...u", c, f)).sum(-1)
        energy = jnp.square(c).sum((-2, -1)) * jnp.square(f).sum(-1)
        metrics["student_rank_one"] = along / _positive(energy)
    return metrics

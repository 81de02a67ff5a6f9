import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from logitjax import models


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """Amounts to cut from a model before training heals it, and of text to choose them by.

    Attributes:
        drop_layers: Number of layers to drop.
        drop_share: Share of the layers to drop, instead of their number.
        keep_layers: Layers to keep, instead of `drop_layers`.
        kv_heads: Number of key-value heads to keep in each layer; 0 keeps all.
        mlp_channels: Number of MLP channels to keep in each layer; 0 keeps all.
        calibration_rows: Number of rows of text used to choose what to prune.
    """

    drop_layers: int = 0
    drop_share: float = 0.0
    keep_layers: tuple[int, ...] = ()
    kv_heads: int = 0
    mlp_channels: int = 0
    calibration_rows: int = 16

    def __post_init__(self) -> None:
        for name in ("drop_layers", "kv_heads", "mlp_channels"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if self.calibration_rows < 1:
            raise ValueError(f"calibration_rows: expected at least 1, got {self.calibration_rows}")
        if not 0 <= self.drop_share < 1:
            raise ValueError(f"drop_share: expected a share below 1, got {self.drop_share}")
        if sum(map(bool, (self.drop_layers, self.drop_share, self.keep_layers))) > 1:
            raise ValueError("drop_layers, drop_share, keep_layers: expected one, got several")

    def dropped(self, layers: int) -> int:
        """Number of layers to drop out of `layers`; a share drops at least one."""
        return max(1, round(self.drop_share * layers)) if self.drop_share else self.drop_layers

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned."""
        drops = self.drop_layers or self.drop_share
        return bool(drops or self.keep_layers or self.kv_heads or self.mlp_channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerPruning:
    """The layers of a decoder to keep, and those to drop.

    Attributes:
        kept: Layers to keep, ascending; what `models.keep_layers` takes.
        dropped: The others, which are consecutive.
        scores: Score of each run of layers by its first one, see `prune_layers`; low ones may go.
    """

    kept: tuple[int, ...]
    dropped: tuple[int, ...]
    scores: tuple[float, ...]

    @property
    def below(self) -> str:
        """Pattern of paths below the cut, for `freeze` of `Student.of`; for listed layers.

        >>> LayerPruning(kept=(0, 1, 4), dropped=(2, 3), scores=()).below
        'embedding|layers/(0|1)/'
        """
        return f"embedding|layers/({'|'.join(map(str, range(min(self.dropped, default=0))))})/"


def prune_layers(
    model: models.Decoder, batches: Iterable[Mapping[str, Any]], count: int
) -> LayerPruning:
    """Choose the run of layers that a decoder can best do without on the given text.

    With x_i the residual stream before layer i, the run with the smallest `1 - mean_t cos(x_i,
    x_{i+count})` over positions t is dropped. It costs one forward pass.

    Args:
        batches: Calibration text: packed columns `tokens`, `segment_ids`, `positions` and
            `loss_mask`, each `[rows, length]`. A few thousand tokens are enough.
        count: Number of layers to drop, fewer than the model has.

    Raises:
        ValueError: Too few layers, or no batch.

    >>> tokens = np.arange(8)[None]
    >>> batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": tokens,
    ...          "loss_mask": tokens > 0}
    >>> chosen = prune_layers(models.load_model("tiny"), [batch], 1)
    >>> len(chosen.kept), len(chosen.scores)
    (1, 2)

    References:
        Gromov et al. (arXiv 2403.17887).
    """
    layers = model.config.num_layers
    if not 0 <= count < layers:
        raise ValueError(
            f"count: expected 0 to {layers - 1}, as the model has {layers} layers, got {count}"
        )
    listed, batches = models.with_layout(model, "listed"), list(batches)
    if not batches:
        raise ValueError("batches: expected calibration text, got none")
    scores = _stream_change(listed, batches, max(count, 1))
    first = int(np.argmin(scores))
    dropped = tuple(range(first, first + count))
    kept = tuple(i for i in range(layers) if i not in dropped)
    return LayerPruning(kept=kept, dropped=dropped, scores=tuple(map(float, scores)))


def prune_width(
    model: models.Decoder,
    batches: Iterable[Mapping[str, Any]],
    *,
    kv_heads: int | None = None,
    mlp_channels: int | None = None,
) -> models.Decoder:
    """Narrow a decoder to the heads and channels of each layer that are most active on a text.

    Activations are averaged over a row's positions; rows are combined by the root of squares::

        channel   sqrt(sum_rows (mean_t |a_t|)^2)
        head      the same of |output_t|, the norm over the query heads of one key-value head

    A key-value head is dropped with all query heads that share it, so queries stay grouped.

    Args:
        model: The decoder, which is not modified.
        batches: Calibration text, as for `prune_layers`.
        kv_heads: Key-value heads to keep in each layer; all if None.
        mlp_channels: Channels of each feed-forward layer to keep; all if None.

    Returns:
        A new decoder in the same layout.

    Raises:
        ValueError: More to keep than there are, or none.

    >>> tokens = np.arange(8)[None]
    >>> batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": tokens,
    ...          "loss_mask": tokens > 0}
    >>> small = prune_width(models.load_model("tiny"), [batch], kv_heads=1, mlp_channels=48)
    >>> small.config.num_heads, small.config.num_kv_heads, small.config.intermediate_size
    (2, 1, 48)

    References:
        Minitron (arXiv 2407.14679), activation-based importance of heads and channels.
    """
    config, listed = model.config, models.with_layout(model, "listed")
    kv_heads = config.num_kv_heads if kv_heads is None else kv_heads
    channels = config.intermediate_size if mlp_channels is None else mlp_channels
    for name, expected, most in (
        ("kv_heads", kv_heads, config.num_kv_heads),
        ("mlp_channels", channels, config.intermediate_size),
    ):
        if not 1 <= expected <= most:
            raise ValueError(f"{name}: expected 1 to {most}, got {expected}")
    # Rotary angles belong to entries of a head, so heads are dropped whole.
    group = config.num_heads // config.num_kv_heads
    heads, activity = _activity(listed, batches)
    small = dataclasses.replace(
        config, num_heads=kv_heads * group, num_kv_heads=kv_heads, intermediate_size=channels
    )
    params = nnx.to_pure_dict(nnx.state(listed, nnx.Param))
    members = [
        params["segments"][i]["layers"][j]
        for i, segment in enumerate(listed.segments)
        for j in range(len(segment.layers))
    ]
    for layer, by_head, by_channel in zip(members, heads, activity, strict=True):
        # `[kv_heads * head_dim]`.
        narrow = _entries(_best(by_head, kv_heads), config.head_dim)
        # Its query heads.
        wide = _entries(_best(by_head, kv_heads), group * config.head_dim)
        inner = _best(by_channel, channels)
        layer |= _narrowed(layer, narrow, wide, inner)
    options: dict[str, Any] = dict(dtype=model.dtype, param_dtype=model.param_dtype)
    options |= dict(remat=model.remat, attention=model.attention, layout="listed")
    abstract = nnx.eval_shape(
        lambda: models.Decoder(small, rngs=nnx.Rngs(0), head=nnx.Module(), **options)
    )
    # The output head is not pruned.
    params.pop("head", None)
    out = nnx.merge(nnx.graphdef(abstract), params)
    out.head = model.head
    return models.with_layout(out, model.layout)


@jax.jit
def _narrowed(layer: Any, narrow: jax.Array, wide: jax.Array, inner: jax.Array) -> Any:
    """Select entries of a layer's maps: of key-value heads, of their queries, of channels."""
    columns = {"query": wide, "key": narrow, "value": narrow, "gate": inner, "up": inner}
    rows = {"output": wide, "down": inner}
    out = {}
    for part in ("attention", "mlp"):
        out[part] = dict(layer[part])
        for name, linear in layer[part].items():
            if name in columns:
                out[part][name] = {n: leaf[..., columns[name]] for n, leaf in linear.items()}
            elif name in rows:
                out[part][name] = linear | {"kernel": linear["kernel"][rows[name]]}
    return out


def _entries(blocks: np.ndarray, size: int) -> np.ndarray:
    """Indices of all entries of the given blocks of equal size."""
    return (blocks[:, None] * size + np.arange(size)).reshape(-1)


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the highest scores, ascending; the first among equal ones."""
    # Ascending, so that the order in the model is kept.
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _stream_change(
    model: models.Decoder, batches: Iterable[Mapping[str, Any]], gap: int
) -> np.ndarray:
    """Cosine distance of the stream before a layer to `gap` layers on, `[layers - gap + 1]`."""

    def changes(seen: "_Seen", where: jax.Array) -> jax.Array:
        streams = seen.blocks
        pairs = zip(streams[: len(streams) - gap], streams[gap:], strict=True)
        turns = jnp.stack([1.0 - _cosine(before, after) for before, after in pairs])
        return jnp.append(jnp.where(where, turns, 0.0).sum((1, 2)), where.sum())  # count last

    total = _sums(_watching(model, changes), batches)
    return total[:-1] / total[-1]


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Cosine along the last axis, in float32; 0 for a zero vector."""
    x, y = (jnp.asarray(v, jnp.float32) for v in (x, y))
    # Scale first, so that squares of a large stream do not overflow. A vector that is not zero then
    # has a norm of at least one.
    x, y = (v / jnp.maximum(jnp.abs(v).max(-1, keepdims=True), 1e-30) for v in (x, y))
    size = jnp.sqrt(jnp.square(x).sum(-1) * jnp.square(y).sum(-1))
    return (x * y).sum(-1) / jnp.maximum(size, 1.0)


def _activity(
    model: models.Decoder, batches: Iterable[Mapping[str, Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Activity on the text, `[layers, kv_heads]` and `[layers, channels]`."""
    config = model.config

    def squares(seen: "_Seen", where: jax.Array) -> Any:
        count = jnp.maximum(where.sum(-1), 1)[:, None]

        def of_rows(values: jax.Array) -> jax.Array:
            # Padding has activations too, which say nothing about the text.
            kept = jnp.where(where[..., None], values, 0.0).sum(1) / count
            return jnp.square(kept).sum(0)

        def by_head(output: jax.Array) -> jax.Array:
            groups = output.astype(jnp.float32).reshape(*where.shape, config.num_kv_heads, -1)
            return of_rows(jnp.linalg.norm(groups, axis=-1))

        heads = jnp.stack([by_head(output) for output in seen.heads])
        inner = [of_rows(jnp.abs(x.astype(jnp.float32))) for x in seen.channels]
        return heads, jnp.stack(inner)

    heads, channels = _sums(_watching(model, squares), batches)
    return np.sqrt(heads), np.sqrt(channels)


class _Seen:
    """Activations of one pass: streams before and after blocks, inputs of each one's last maps."""

    def __init__(self) -> None:
        self.blocks: list[jax.Array] = []
        self.heads: list[jax.Array] = []
        self.channels: list[jax.Array] = []


class _WatchedLinear(nnx.Linear):
    def __init__(self, linear: nnx.Linear, seen: _Seen, name: str):
        self.linear, self.seen, self.name = linear, seen, name

    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        getattr(self.seen, self.name).append(inputs)
        return self.linear(inputs)


def _watching(model: models.Decoder, measure: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `batch -> measure(seen, where)` for a listed model."""
    # So that the model needs no hooks, maps are wrapped, and Python lists collect activations while
    # the unrolled blocks are traced.
    apply_fn, params = models.from_nnx(model)

    @jax.jit
    def run(params: Any, batch: Any) -> Any:
        seen = _Seen()
        trunk = nnx.merge(apply_fn.graphdef, params, apply_fn.rest)
        # Under `remat` a block has its own trace, from which the lists would leak tracers.
        trunk.remat = "none"
        for segment in trunk.segments:
            for block in segment.layers:
                block.attention.output = _WatchedLinear(block.attention.output, seen, "heads")
                block.mlp.down = _WatchedLinear(block.mlp.down, seen, "channels")
        where = {name: batch[name] for name in ("positions", "segment_ids")}
        trunk.hidden_states(batch["tokens"], **where, entering=seen.blocks)
        return measure(seen, jnp.asarray(batch["segment_ids"]) > 0)

    return lambda batch: run(params, batch)


def _sums(measure: Callable[[Any], Any], batches: Iterable[Mapping[str, Any]]) -> Any:
    """Sum over batches, in float64."""
    columns = ("tokens", "segment_ids", "positions", "loss_mask")
    total: Any = None
    for batch in batches:
        result = jax.tree.map(
            # Summed in float32, millions of squares lose the digits in which layers differ.
            lambda leaf: np.asarray(leaf, np.float64),
            measure({n: batch[n] for n in columns}),
        )
        total = result if total is None else jax.tree.map(np.add, total, result)
    return total

"""Key/value caches as pytrees, and the masks that follow from their positions."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from logitjax.models._config import DecoderConfig, Window
from logitjax.ops import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A decoder's keys and values of earlier tokens.

    `keys` and `values` follow the model's segments: per segment, one array per pattern entry
    `[repeats, batch, kv_heads, slots, head_dim]` when stacked, one per layer without `repeats` when
    listed; heads come before slots so that a step multiplies without transposing. `positions[kind]`
    is the position held by each slot, -1 for none, for all layers of one attention window. `length`
    is each row's next position. A token of position `p` is stored in slot `p % slots`: windowed
    layers keep a ring of their window's size. Going back to an earlier position discards later
    ones; on windowed layers only by as many positions as the ring has spare slots.
    """

    keys: tuple
    values: tuple
    positions: dict
    length: Array

    @classmethod
    def init(
        cls,
        config: DecoderConfig,
        batch: int,
        max_length: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
        *,
        layout: str = "listed",
        ring_slack: int = 0,
    ) -> "Cache":
        """An empty cache for `batch` rows of at most `max_length` tokens.

        Windowed layers keep only their window. Past `max_length` the oldest tokens are overwritten.

        Args:
            max_length: number of slots of layers without a window.
            layout: `'listed'` or `'stacked'`, as in the model.
            ring_slack: slots of windowed layers beyond their window: the number of tokens to go
                back without losing any that the window still needs.

        >>> from logitjax.models import load_config
        >>> cache = jax.jit(lambda: Cache.init(load_config("tiny"), 3, 16))()
        >>> [k.shape for k in cache.keys[0]]
        [(3, 2, 16, 8), (3, 2, 16, 8)]
        """
        slots = {
            w: max_length if w is None else min(w + ring_slack, max_length)
            for w in config.layer_windows
        }

        def arrays() -> tuple:
            segments = []
            for spec in config.segments:
                stacked = layout == "stacked"
                lead = (spec.repeats, batch) if stacked else (batch,)
                layers = spec.pattern if stacked else spec.pattern * spec.repeats
                heads, dim = config.num_kv_heads, config.head_dim
                shapes = [(*lead, heads, slots[window], dim) for window, _ in layers]
                segments.append(tuple(jnp.zeros(shape, dtype) for shape in shapes))
            return tuple(segments)

        positions = {kind_name(w): jnp.full((batch, n), -1, jnp.int32) for w, n in slots.items()}
        return cls(
            keys=arrays(),
            values=arrays(),
            positions=positions,
            length=jnp.zeros((batch,), jnp.int32),
        )


def kind_name(window: Window) -> str:
    return "global" if window is None else f"local_{window}"


def write_slots(
    positions: Int[Array, "batch time"], slots: int, window: Window
) -> Int[jax.Array, "batch time"]:
    """The slot of each new token; `slots`, out of range, for padding and what a ring drops."""
    keep = positions >= 0
    # Two tokens of one slot in a single scatter: which of them remains would be undefined.
    if window is not None and positions.shape[1] > 1:
        keep &= positions > positions.max(axis=1, keepdims=True) - slots
    return jnp.where(keep, positions % slots, slots)  # a ring


def write_vectors(
    cached: Float[Array, "batch heads slots dim"],
    new: Float[Array, "batch time heads dim"],
    slots: Int[Array, "batch time"],
) -> Float[jax.Array, "batch heads slots dim"]:
    rows = jnp.arange(cached.shape[0])[:, None]
    # Indices on both sides of a slice put their axes first: `[batch, time, heads, dim]`, as `new`.
    return jnp.asarray(cached).at[rows, :, slots].set(new.astype(cached.dtype), mode="drop")


def position_mask(
    queries: Int[Array, "batch time"], keys: Int[Array, "batch slots"], window: Window
) -> Bool[jax.Array, "batch 1 time slots"]:
    """Mask of the keys that a query sees: stored, not later, and inside the window."""
    q, k = jnp.asarray(queries)[:, :, None], jnp.asarray(keys)[:, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= k > q - window
    return seen[:, None]

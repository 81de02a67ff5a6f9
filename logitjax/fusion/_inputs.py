"""What every strategy takes: checked, in float32, with experts and bases along a leading axis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from logitjax.ops import Array, AxisName, checks


class Inputs(NamedTuple):
    """Logits of all models where they exist.

    `exists` broadcasts to `large`; `experts` and `bases` are `[T, *batch, vocab]` (or
    None), `bases` with a leading axis of T or 1.
    """

    large: jax.Array
    experts: Any
    bases: Any
    exists: jax.Array

    @property
    def differences(self) -> jax.Array:
        """Expert minus base, `[T, *batch, vocab]`; 0 where either does not exist."""
        return jnp.where(self.exists, self.experts - self.bases, 0.0)

    def fused(self, values: jax.Array) -> jax.Array:
        """`values` where the vocabulary exists, `-inf` elsewhere."""
        return jnp.where(self.exists, values, -jnp.inf)


def read_inputs(
    logits_large: Array,
    logits_experts: Array | None,
    logits_bases: Array | None,
    vocab_where: Array | None,
    *,
    needs_experts: bool = True,
    needs_bases: bool = True,
) -> Inputs:
    """Checks shapes and marks the entries that exist in every model that is given."""
    large = checks.as_float(logits_large, "logits_large")
    checks.where(vocab_where, large.shape, "vocab_where")
    experts = _stacked(logits_experts, large, "logits_experts", needed=needs_experts)
    bases = _stacked(logits_bases, large, "logits_bases", needed=needs_bases)
    if experts is not None and bases is not None and bases.shape[0] not in (1, experts.shape[0]):
        raise ValueError(
            f"logits_bases: expected one base or one for each of {experts.shape[0]} experts, got "
            f"{bases.shape[0]}"
        )
    # Not `isfinite`: a nan has to come out again rather than to pass for padding.
    exists = large != -jnp.inf
    for logits in (experts, bases):
        if logits is not None:
            exists &= (logits != -jnp.inf).all(0)
    if vocab_where is not None:
        exists &= jnp.asarray(vocab_where)

    def there(logits: Any) -> Any:
        return None if logits is None else jnp.where(exists, logits, 0.0)

    return Inputs(jnp.where(exists, large, 0.0), there(experts), there(bases), exists)


def _stacked(logits: Array | None, large: jax.Array, name: str, *, needed: bool) -> Any:
    if logits is None or (len(logits) == 0 and logits.ndim == large.ndim + 1):
        if needed:
            raise ValueError(f"{name}: this strategy needs them, got none")
        return None
    values = checks.as_float(logits, name)
    if values.ndim == large.ndim:
        values = values[None]
    if values.shape[1:] != large.shape:
        hint = ""
        if values.shape[1:-1] == large.shape[:-1]:
            hint = "; for other vocabularies see vocabulary_map"
        raise ValueError(
            f"{name}: expected {large.shape} or a leading axis of models before it, got "
            f"{logits.shape}{hint}"
        )
    return values.astype(large.dtype)


def pmax(values: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The maximum over the shards of the vocabulary, if there are any."""
    return values if axis_name is None else lax.pmax(values, axis_name)


def vocabulary_size(values: jax.Array, axis_name: AxisName | None) -> int:
    return values.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))

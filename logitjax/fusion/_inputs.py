"""Inputs of every strategy: checked, in float32, with experts and bases along a leading axis."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float

from logitjax.ops import Array, AxisName, checks


class Inputs(NamedTuple):
    """Logits of all models, where they exist."""

    large: jax.Array
    experts: Any  # [T, *batch, vocab], or None
    # The same, with a leading axis of length T or 1.
    bases: Any
    # Broadcasts to `large`.
    exists: jax.Array

    @property
    def differences(self) -> jax.Array:
        """Expert minus base, `[T, *batch, vocab]`; 0 where either does not exist."""
        return jnp.where(self.exists, self.experts - self.bases, 0.0)

    def below(self, levels: tuple[jax.Array, jax.Array, jax.Array]) -> "Inputs":
        """The same distributions: logits minus a constant for each row, `[models, *batch]`."""
        top, expert, base = levels

        def less(logits: jax.Array, level: jax.Array) -> jax.Array:
            return jnp.where(self.exists, logits - level[..., None], 0.0)

        return self._replace(
            large=less(self.large, top[0]),
            experts=less(self.experts, expert),
            bases=less(self.bases, base),
        )

    def differences_below(
        self, levels: tuple[jax.Array, jax.Array, jax.Array], *, less: jax.Array | None = None
    ) -> jax.Array:
        """`differences` of `below(levels)` minus `less`, one number for each row, in float32."""
        _, expert, base = levels
        difference, rest = _exact_difference(self.experts, self.bases)
        shift, shift_rest = _exact_difference(expert, base)
        difference, more = _exact_difference(difference, shift[..., None])
        difference, rest = _exact_difference(difference, -(more + (rest - shift_rest[..., None])))
        if less is not None:
            difference = (difference - less[..., None]) + rest
        return jnp.where(self.exists, difference, 0.0)

    def fused(self, values: jax.Array) -> jax.Array:
        """`values` where the vocabulary exists, `-inf` elsewhere."""
        return jnp.where(self.exists, values, -jnp.inf)


def _exact_difference(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x - y in float32, and its rounding error (Knuth's two-sum)."""
    difference = x - y
    # -y, up to rounding.
    back = difference - x
    return difference, (x - (difference - back)) - (y + back)


class Strategy:
    """A strategy that decides from checked logits: a frozen dataclass with `fuse`."""

    takes_experts: ClassVar[bool] = True
    takes_bases: ClassVar[bool] = True

    def __call__(
        self,
        logits_large: Float[Array, "*batch vocab"],
        logits_experts: Float[Array, "..."] | None,
        logits_bases: Float[Array, "..."] | None = None,
        *,
        vocab_where: Bool[Array, "..."] | None = None,
        axis_name: AxisName | None = None,
    ) -> tuple[Float[jax.Array, "*batch vocab"], dict[str, Any]]:
        """Fused float32 logits `[*batch, vocab]`, and the decisions by name.

        Args:
            logits_experts: `[T, *batch, vocab]`, or without the leading axis for one; None if the
                strategy takes none.
            logits_bases: as many, or one for all; None if the strategy takes none.
            vocab_where: boolean, broadcastable to the logits: True for the entries that exist.
            axis_name: inside `jax.shard_map`, the mesh axis over which the vocabulary is split.
        """
        for name, logits, accepted in (
            ("logits_experts", logits_experts, self.takes_experts),
            ("logits_bases", logits_bases, self.takes_bases),
        ):
            if not accepted and logits is not None and jnp.size(logits):
                shape = jnp.shape(logits)
                raise ValueError(f"{name}: expected None, got {shape}, of {type(self).__name__}")
        inputs = read_inputs(
            logits_large,
            logits_experts if self.takes_experts else None,
            logits_bases if self.takes_bases else None,
            vocab_where,
            needs_experts=self.takes_experts,
            needs_bases=self.takes_bases,
        )
        return self.fuse(inputs, axis_name)

    def fuse(self, inputs: Inputs, axis_name: AxisName | None) -> tuple[jax.Array, dict[str, Any]]:
        """Fuse checked inputs, as `__call__` does."""
        raise NotImplementedError


def read_inputs(
    logits_large: Array,
    logits_experts: Array | None,
    logits_bases: Array | None,
    vocab_where: Array | None,
    *,
    needs_experts: bool = True,
    needs_bases: bool = True,
) -> Inputs:
    """Check shapes and mark the entries that exist in every given model."""
    large = checks.as_float(logits_large, "logits_large")
    checks.axis(-1, large.shape, "logits_large")
    checks.where(vocab_where, large.shape, "vocab_where")
    experts = _stacked(logits_experts, large, "logits_experts", needed=needs_experts)
    bases = _stacked(logits_bases, large, "logits_bases", needed=needs_bases)
    if experts is not None and bases is not None and bases.shape[0] not in (1, experts.shape[0]):
        raise ValueError(
            f"logits_bases: expected one base or one for each of {experts.shape[0]} experts, got "
            f"{bases.shape[0]}"
        )
    # Not `isfinite`: a nan must stay a nan instead of counting as padding.
    exists = large != -jnp.inf
    for logits in (experts, bases):
        if logits is not None:
            exists &= (logits != -jnp.inf).all(0)
    if vocab_where is not None:
        exists &= jnp.asarray(vocab_where)

    def as_inputs(logits: Any) -> Any:
        # Zeros instead of -inf, whose differences would be nan.
        return None if logits is None else jnp.where(exists, logits, 0.0)

    return Inputs(jnp.where(exists, large, 0.0), as_inputs(experts), as_inputs(bases), exists)


def _stacked(logits: Array | None, large: jax.Array, name: str, *, needed: bool) -> Any:
    # An ensemble without experts passes a stack of none.
    if logits is None or (jnp.ndim(logits) == large.ndim + 1 and not len(logits)):
        if needed:
            raise ValueError(f"{name}: expected the logits that this strategy needs, got none")
        return None
    values = checks.as_float(logits, name)
    if values.ndim == large.ndim:
        # a single model.
        values = values[None]
    if values.shape[1:] != large.shape:
        hint = ""
        if values.shape[1:-1] == large.shape[:-1]:
            hint = "; for other vocabularies see vocabulary_map"
        raise ValueError(
            f"{name}: expected {large.shape} or a leading axis of models before it, got "
            f"{logits.shape}{hint}"
        )
    # float64 if it is enabled.
    return values.astype(large.dtype)


def pmax(values: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """The maximum over the shards of the vocabulary, if there are any."""
    return values if axis_name is None else lax.pmax(values, axis_name)


def vocabulary_size(values: jax.Array, axis_name: AxisName | None) -> int:
    return values.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))

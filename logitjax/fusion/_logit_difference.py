import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from logitjax.fusion._inputs import Inputs, Strategy, pmax, vocabulary_size
from logitjax.ops import AxisName, logsumexp, top_k
from logitjax.ops import mesh as on_mesh

_FORMS, _FILTERS, _OUTSIDE = ("raw", "centred"), ("clean", "official", "none"), ("keep", "exclude")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitDifference(Strategy):
    """Subtracts the logits of an assistant that only knows the data to forget.

    ::

        large - alpha * assistant                                      raw
        large - alpha * (assistant - log sum exp assistant + log V)    centred

    Both give the same distribution if all entries are changed. A filter changes only tokens that
    the large model finds likely, and then the constant matters: a raw assistant with flat logits c
    moves those tokens by `-alpha c` against the others, a centred one by 0. The two forms need
    different alphas.

    Of two assistants the second, which never saw the data to forget, is subtracted from the first,
    which saw all data: divergence decoding, `large + alpha (second - first)`.

    Filters: `'clean'` changes tokens with `p_large >= rate * max p_large`. `'official'` is the
    released filter, which also changes the `int(rate * V)` most likely tokens, so effectively
    those. `'none'` changes all tokens.

    Attributes:
        alpha: the assistant's weight.
        form: see above.
        filter: see above. `'none'` by default: a filter leaves a confident target one token to
            change, so an answer that it is sure of stays likely whatever alpha is.
        rate: rate of the filter.
        outside: the tokens that the filter excludes: `'keep'` the large model's logits for them, as
            in scoring a text, or `'exclude'` them, as the release does in generation.

    >>> large, assistant = jnp.array([3.0, 2.0, -5.0]), jnp.array([4.0, 0.0, 0.0])
    >>> fused, _ = jax.jit(LogitDifference(alpha=0.5, form="raw"))(large, assistant)
    >>> fused
    Array([ 1.,  2., -5.], dtype=float32)
    >>> both = jnp.array([[3.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    >>> LogitDifference(alpha=1.5, form="raw")(jnp.array([2.0, 1.0, 0.0]), both)[0]
    Array([-1. ,  2.5,  0. ], dtype=float32)

    References:
        Ji et al., Reversing the forget-retain objectives, 2024 (arXiv 2406.08607), eq. 2 and
        section 4.1: alpha 0.75, and a filter of rate 0.01, which is not the default here. The
        release also zeroes instead of excluding, so that an excluded token wins where all others
        are negative; not here. Divergence decoding, 2026 (arXiv 2605.31293).
    """

    takes_bases: ClassVar[bool] = False

    alpha: float = 0.75
    form: Literal["raw", "centred"] = "centred"
    filter: Literal["clean", "official", "none"] = "none"
    rate: float = 0.01
    outside: Literal["keep", "exclude"] = "keep"

    def __post_init__(self) -> None:
        for name, existing in (("form", _FORMS), ("filter", _FILTERS), ("outside", _OUTSIDE)):
            if getattr(self, name) not in existing:
                raise ValueError(
                    f"{name}: expected one of {', '.join(existing)}, got {getattr(self, name)!r}"
                )
        if not 0 < self.rate <= 1:
            raise ValueError(f"rate: expected to be in (0, 1], got {self.rate}")

    def fuse(self, inputs: Inputs, axis_name: AxisName | None) -> tuple[jax.Array, dict[str, Any]]:
        """See `Strategy.__call__`; info is `{"changed": number of entries}`."""
        if len(inputs.experts) > 2:
            raise ValueError(
                f"logits_experts: expected one assistant or two, got {len(inputs.experts)}"
            )
        assistant = inputs.experts[0]
        if len(inputs.experts) == 2:
            assistant = assistant - inputs.experts[1]
        exists = inputs.exists
        if self.form == "centred":
            log_z = logsumexp(assistant, vocab_where=exists, axis_name=axis_name)
            count = on_mesh.psum(exists.sum(-1), axis_name)
            constant = log_z - jnp.log(jnp.maximum(count, 1).astype(log_z.dtype))  # log mean exp
            assistant = assistant - constant[..., None]
        fused = inputs.large - self.alpha * assistant
        changed = exists
        if self.filter != "none":
            changed = exists & (self._threshold(inputs, axis_name) <= inputs.large)
        fused = jnp.where(changed, fused, inputs.large if self.outside == "keep" else -jnp.inf)
        return inputs.fused(fused), {"changed": on_mesh.psum(changed.sum(-1), axis_name)}

    def _threshold(self, inputs: Inputs, axis_name: AxisName | None) -> jax.Array:
        """The smallest large logit that is changed, `[*batch, 1]`."""
        large = inputs.fused(inputs.large)
        peak = pmax(large.max(-1, keepdims=True), axis_name)
        # p >= rate * max p.
        threshold = peak + math.log(self.rate)
        if self.filter == "official":
            count = int(self.rate * vocabulary_size(large, axis_name))
            if count == 0:
                return jnp.full_like(threshold, -jnp.inf)
            largest, _ = top_k(jax.lax.stop_gradient(large), count, axis_name=axis_name)
            # At least this many.
            threshold = jnp.minimum(threshold, largest[..., -1:])
        return threshold

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from logitjax import ops
from logitjax.ops import Array, AxisName


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """A linear output head, for all functions that start from hidden states.

    A pytree of `kernel` and `bias`: the gradient with respect to a head is a head. Functions that
    take a head accept a bare kernel for `Head(kernel)`.

    ::

        logits = cap tanh((hidden @ kernel + bias) / cap)

    Attributes:
        kernel: `[hidden, vocab]` or `[vocab, hidden]`.
        bias: `[vocab]`; `-inf` marks an entry that is not valid, with or without a cap.
        vocab_axis: the kernel's vocabulary axis, 0 or 1. If None, the width of hidden states
            determines it, unless the kernel is square.
        soft_cap: `cap`, as for the logits of Gemma 2; none by default.
        compute_dtype: type in which hidden states and kernel are multiplied, block by block; their
            common type if None. With float32 master weights `jnp.bfloat16` keeps accelerators at
            full speed: sums are float32, and the head's gradient has the type of the head.

    Raises:
        TypeError: `compute_dtype` is not floating point.
        ValueError: `vocab_axis` is not an axis of a matrix or `soft_cap` is not positive.

    >>> import jax, jax.numpy as jnp
    >>> head = Head(jnp.array([[1.0, 3.0, 200.0]]), soft_cap=30.0)
    >>> first = jax.value_and_grad(lambda head: head.logits(jnp.ones(1))[0])
    >>> value, gradient = jax.jit(first)(head)
    >>> print(f"{value:.4f}", gradient.kernel)
    0.9996 [[0.99... 0.  0. ]]
    """

    # Not `jax.Array`: a tree of gradients, specs or shapes is built by the same constructor.
    kernel: Any
    bias: Any = None
    vocab_axis: int | None = dataclasses.field(default=None, metadata={"static": True})
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    compute_dtype: Any = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self) -> None:
        # Only check static fields: under vmap and tree.map leaves may be anything.
        if self.vocab_axis not in (None, 0, 1):
            raise ValueError(f"vocab_axis: expected 0, 1 or None, got {self.vocab_axis}")
        if self.soft_cap is not None:
            ops.checks.positive(self.soft_cap, "soft_cap")
        if not jnp.issubdtype(self.product_dtype(jnp.float32, jnp.float32), jnp.floating):
            raise TypeError(f"compute_dtype: expected floating point, got {self.compute_dtype}")

    @classmethod
    def of(cls, head: "Head | Array") -> "Head":
        """Return a head as it is, or make one of a bare kernel."""
        return head if isinstance(head, cls) else cls(head)

    def resolve(self, width: int, name: str = "head") -> "Head":
        """Return the head with known vocabulary axis, checked against hidden states.

        `width` is that of a hidden state; errors refer to the head by `name`.

        Raises:
            TypeError: an array is not floating point.
            ValueError: the kernel is square and its axis is not given, or shapes do not fit.

        >>> Head(jnp.ones((2, 5))).resolve(5).vocab_axis
        0
        """
        shape, axis = jnp.shape(self.kernel), self.vocab_axis
        if len(shape) != 2:
            raise ValueError(f"{name}: expected a kernel of two axes, got shape {shape}")
        if axis is None:
            if shape[0] == shape[1] == width:
                raise ValueError(
                    f"{name}: its kernel of shape {shape} is square: expected a Head with "
                    "vocab_axis (1 for [hidden, vocab], 0 for [vocab, hidden]), got none"
                )
            axis = 1 if shape[0] == width else 0
        if shape[1 - axis] != width:
            raise ValueError(
                f"{name}: expected a kernel with {width} entries along its hidden axis, as the "
                f"hidden states have, got shape {shape} with vocab_axis={axis}"
            )
        vocab = (shape[axis],)
        if self.bias is not None and jnp.shape(self.bias) != vocab:
            raise ValueError(f"{name}.bias: expected shape {vocab}, got {jnp.shape(self.bias)}")
        for part in ("kernel", "bias"):
            value = getattr(self, part)
            if value is not None and not jnp.issubdtype(jnp.result_type(value), jnp.floating):
                raise TypeError(
                    f"{name}.{part}: expected floating point, got {jnp.result_type(value)}"
                )
        return dataclasses.replace(self, vocab_axis=axis)

    @property
    def axis(self) -> int:
        """`vocab_axis`, if known, as after `resolve`; otherwise a ValueError."""
        if self.vocab_axis is None:
            raise ValueError("vocab_axis: expected 0 or 1, got None")
        return self.vocab_axis

    def vocab_size(self, axis_name: AxisName | None = None) -> int:
        """Size of the vocabulary; with `axis_name`, of all shards together."""
        size = jnp.shape(self.kernel)[self.axis]
        return size if axis_name is None else size * lax.axis_size(axis_name)

    def product_dtype(self, *dtypes: Any) -> Any:
        """Return `compute_dtype`, or else the common type of `dtypes`."""
        types = dtypes if self.compute_dtype is None else (self.compute_dtype,)
        return jnp.dtype(jnp.result_type(*map(jnp.dtype, types)))

    @property
    def rows(self) -> jax.Array:
        """The kernel as `[vocab, hidden]`."""
        kernel = jnp.asarray(self.kernel)
        return kernel if self.axis == 0 else kernel.T

    def logits(self, hidden: Array) -> jax.Array:
        """Compute the logits that blocked functions never hold, `[*batch, vocab]`, in float32.

        `hidden` is `[*batch, hidden]`; the errors are those of `resolve`.
        """
        hidden = jnp.asarray(hidden)
        head = self.resolve(hidden.shape[-1])
        dtype = head.product_dtype(hidden.dtype, jnp.result_type(head.kernel))
        logits = lax.dot_general(
            hidden.astype(dtype),
            jnp.asarray(head.kernel, dtype),
            (((hidden.ndim - 1,), (1 - head.axis,)), ((), ())),
            preferred_element_type=jnp.promote_types(dtype, jnp.float32),
        )
        if head.bias is not None:
            logits = logits + jnp.asarray(head.bias, logits.dtype)
        return logits if head.soft_cap is None else ops.soft_cap(logits, head.soft_cap)

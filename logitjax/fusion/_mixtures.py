import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from logitjax.fusion._inputs import Inputs, Strategy, vocabulary_size
from logitjax.ops import AxisName, checks, log_softmax, top_k
from logitjax.ops import mesh as on_mesh


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mixture(Strategy):
    takes_bases: ClassVar[bool] = False

    def fuse(self, inputs: Inputs, axis_name: AxisName | None) -> tuple[jax.Array, dict[str, Any]]:
        if len(inputs.experts) != 1:
            raise ValueError(f"logits_experts: expected one teacher, got {len(inputs.experts)}")
        log_q, log_p = (
            log_softmax(x, vocab_where=inputs.exists, axis_name=axis_name)
            for x in (inputs.large, inputs.experts[0])
        )
        return inputs.fused(jnp.logaddexp(*self.shares(log_q, log_p, axis_name))), {}

    def shares(self, log_q: Any, log_p: Any, axis_name: AxisName | None) -> tuple[Any, Any]:
        """Logarithms of the contributions of student and teacher to the mixture."""
        raise NotImplementedError


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherMixture(_Mixture):
    """Samples from a mixture of the student, which is the large model, and its teacher, the expert.

    The distribution is ``share p + (1 - share) q``.

    Attributes:
        share: the teacher's share.

    >>> fused, _ = jax.jit(TeacherMixture())(jnp.log(jnp.array([0.5, 0.5])), jnp.array([0.0, -99.]))
    >>> print(jnp.exp(fused).round(3))
    [0.6 0.4]

    References:
        Gu et al., MiniLLM, 2024 (arXiv 2306.08543), section 2.2: 0.2.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        checks.between(self.share, 0.0, 1.0, "share")

    def shares(self, log_q: Any, log_p: Any, axis_name: AxisName | None) -> tuple[Any, Any]:
        return jnp.log(1 - self.share) + log_q, jnp.log(self.share) + log_p


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherRedraw(_Mixture):
    """Samples from the student, and redraws tokens outside the teacher's top k from the teacher.

    The student is the large model, the teacher the expert. ::

        q [v in top_k(p)] + (1 - sum_{top_k(p)} q) p

    Attributes:
        top_k: number of the teacher's most likely tokens that are accepted; ties all count.

    >>> student, teacher = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]]))
    >>> fused, _ = jax.jit(TeacherRedraw(top_k=2))(student, teacher)
    >>> print(" ".join(f"{q:.2f}" for q in jnp.exp(fused)))
    0.64 0.34 0.02

    References:
        Xu et al., Speculative knowledge distillation, 2025 (arXiv 2410.11325): 25.
    """

    top_k: int = 25

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")

    def shares(self, log_q: Any, log_p: Any, axis_name: AxisName | None) -> tuple[Any, Any]:
        k = min(self.top_k, vocabulary_size(log_p, axis_name))
        accepted = log_p >= top_k(log_p, k, axis_name=axis_name)[0][..., -1:]
        # Summed over the refused tokens: 1 minus the accepted share would leave rounding.
        refused = on_mesh.psum(
            jnp.where(accepted, 0.0, jnp.exp(log_q)).sum(-1, keepdims=True), axis_name
        )
        return jnp.where(accepted, log_q, -jnp.inf), jnp.log(refused) + log_p

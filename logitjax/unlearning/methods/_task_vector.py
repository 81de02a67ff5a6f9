"""Task vectors: what is to be forgotten is learned, and that change is taken away."""

import dataclasses

from logitjax.unlearning.methods._gradient_ascent import GradientAscent


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskVector(GradientAscent):
    """Learn what is to be forgotten, and take that change of the weights away.

    After Ilharco et al., 2022 (arXiv 2212.04089), as in MUSE (arXiv 2407.06460).
    """

    forget_weight: float = -1.0

    sign = -1.0

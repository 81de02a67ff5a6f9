"""Task vectors: the rows to forget are learned, and that change is subtracted."""

import dataclasses

from logitjax.unlearning.methods._gradient_ascent import GradientAscent


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskVector(GradientAscent):
    """Learn the rows to forget, and subtract that change of the weights.

    After Ilharco et al., 2022 (arXiv 2212.04089), as in MUSE (arXiv 2407.06460).
    """

    forget_weight: float = -1.0

    sign = -1.0

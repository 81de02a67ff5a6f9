"""Divergence decoding: the disagreement of two small models is subtracted while decoding."""

import dataclasses
import functools
from typing import Any

from logitjax import decoding, fusion, models, unlearning
from logitjax.training import LossFn
from logitjax.unlearning import Need


@functools.cache
def _small(folder: str) -> models.Decoder:
    return models.with_layout(models.load_model(folder), "listed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence(unlearning.Method):
    """A small model learns all rows, another only those to keep; the served model gives::

        z - rho (z_all - z_kept)

    Both are the first layers of the untaught model. The first starts from the weights that the
    second has learned. `rho` is sought on validation data, like an assistant's alpha.

    Attributes:
        of: Folder of the small model that learned the rows to keep.

    References:
        Divergence decoding, 2026 (arXiv 2605.31293).
    """

    of: str = ""

    peak = 5e-3
    assistant = True
    needs = (Need("forget", "nll"), Need("retain", "nll"))

    def adapted(self, model: models.Decoder) -> models.Decoder:
        return _small(self.of)

    def make_loss(self, model: models.Decoder, **options: Any) -> tuple[LossFn, Any]:
        learns = unlearning.METHODS.parse("gradient_difference(forget_weight=-1)")
        return learns.make_loss(_small(self.of), **options)

    def deployed(self, model: models.Decoder, lora: models.Lora, strength: float) -> Any:
        both = unlearning.Assistant(base=_small(self.of), lora=lora, relative=True)
        return _Divergent(model=model, assistant=both, alpha=strength)


class _Divergent(unlearning.Deployed):
    """Scored like `Deployed`; while decoding the small models are experts of their own."""

    def line_up(self) -> decoding.Ensemble:
        assert self.assistant is not None
        kept = self.assistant.base
        # Their layers are not the served model's, so they cannot be shared.
        experts = [self.assistant.lora.merged_into(kept), kept]
        fuse = fusion.LogitDifference(alpha=self.alpha)
        return decoding.Ensemble(self.model, experts=experts, fuse=fuse)

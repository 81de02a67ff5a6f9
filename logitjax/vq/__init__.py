"""Heads whose tokens share codes, and heads that re-score the candidates of a cheap head.

- `fit_assignment` chooses the tokens that share a code, `perplexity_floor` bounds the result.
- `vq_nll`, `vq_logits`, `VQTables`: the vector-quantised head as functions of arrays, `VQHead` as a
  module.
- `ProductCodes`: rows of one of 16 codes in each group of dimensions; `ProductHead` as a module.
- `ScreenedHead`: better rows for the best tokens of a cheap head, with a certificate on request.
- `PagedHead`: exact rows in pages that a sketch of them chooses, for accelerators.
- `ConvertConfig.convert` replaces a model's head; its steps are `HiddenCache.of` and its methods,
  `ConvertConfig.fit` and `Tuning.run`.
"""

from logitjax.vq._assignment import fit_assignment as fit_assignment
from logitjax.vq._assignment import perplexity_floor as perplexity_floor
from logitjax.vq._convert import ConvertConfig as ConvertConfig
from logitjax.vq._convert import load_head as load_head
from logitjax.vq._decode import VQTables as VQTables
from logitjax.vq._heads import VQHead as VQHead
from logitjax.vq._hidden_cache import HiddenCache as HiddenCache
from logitjax.vq._loss import vq_logits as vq_logits
from logitjax.vq._loss import vq_nll as vq_nll
from logitjax.vq._paged import PagedHead as PagedHead
from logitjax.vq._product_codes import ProductCodes as ProductCodes
from logitjax.vq._product_head import ProductHead as ProductHead
from logitjax.vq._screened import ScreenedHead as ScreenedHead
from logitjax.vq._tune import Tuning as Tuning

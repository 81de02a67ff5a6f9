"""Few-shot methods, each with its settings as fields: what `fit` trains and `sweep` compares.

`AMU` with the `Uncertainty` that weighs its bias, the caches `TipAdapter`, `TipAdapterF`, `CaFo`
and `APE`, and what learns weights: `ClipAdapter`, `TaskRes`, `LinearProbe`, `CrossModal` and
`LPPlusPlus`. All are `logitjax.few_shot.Method`.
"""

from logitjax.few_shot._amu import AMU as AMU
from logitjax.few_shot._cache_adapters import APE as APE
from logitjax.few_shot._cache_adapters import CaFo as CaFo
from logitjax.few_shot._cache_adapters import TipAdapter as TipAdapter
from logitjax.few_shot._cache_adapters import TipAdapterF as TipAdapterF
from logitjax.few_shot._linear_adapters import ClipAdapter as ClipAdapter
from logitjax.few_shot._linear_adapters import CrossModal as CrossModal
from logitjax.few_shot._linear_adapters import LinearProbe as LinearProbe
from logitjax.few_shot._linear_adapters import LPPlusPlus as LPPlusPlus
from logitjax.few_shot._linear_adapters import TaskRes as TaskRes
from logitjax.few_shot._uncertainty import Uncertainty as Uncertainty

"""Few-shot methods with their settings as fields, for training and for `sweep`.

`AMU` with the `Uncertainty` that weights its bias; the caches `TipAdapter` and `TipAdapterF`;
solutions of linear systems: `GDA`, `ProKeR`, `ReHARK` and `TIMO`; and learned weights: `TaskRes`,
`LinearProbe`, `LPPlusPlus`, and, kept near their initial value, `CLAP`, `ProLIP` and `ProLIPText`.
All are `logitjax.few_shot.Method`.
"""

from logitjax.few_shot._adapters import CLAP as CLAP
from logitjax.few_shot._adapters import LinearProbe as LinearProbe
from logitjax.few_shot._adapters import LPPlusPlus as LPPlusPlus
from logitjax.few_shot._adapters import ProLIP as ProLIP
from logitjax.few_shot._adapters import ProLIPText as ProLIPText
from logitjax.few_shot._adapters import TaskRes as TaskRes
from logitjax.few_shot._adapters import TipAdapter as TipAdapter
from logitjax.few_shot._adapters import TipAdapterF as TipAdapterF
from logitjax.few_shot._amu import AMU as AMU
from logitjax.few_shot._amu import Uncertainty as Uncertainty
from logitjax.few_shot._closed_form import GDA as GDA
from logitjax.few_shot._closed_form import TIMO as TIMO
from logitjax.few_shot._closed_form import ProKeR as ProKeR
from logitjax.few_shot._closed_form import ReHARK as ReHARK

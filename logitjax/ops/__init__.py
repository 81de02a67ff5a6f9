"""Operations that the other packages share: top-k, a safe softmax, masked means.

`ops.checks` checks arguments: its errors name the argument, what was expected and what came.
`ops.sharding` says how the leaves of a pytree are split over a mesh, and what its axes are called;
`ops.mesh` is what code on a mesh asks of it.
"""

# For the packages beside this one: arguments are checked in the same words everywhere, and code on
# a mesh asks the same questions of it.
from logitjax.ops import _checks as checks  # noqa: F401
from logitjax.ops import _mesh as mesh  # noqa: F401
from logitjax.ops import sharding as sharding
from logitjax.ops._codes import Codes as Codes
from logitjax.ops._log_softmax import log_softmax as log_softmax
from logitjax.ops._log_softmax import logsumexp as logsumexp
from logitjax.ops._log_softmax import neginf_to_zero as neginf_to_zero
from logitjax.ops._log_softmax import soft_cap as soft_cap
from logitjax.ops._masked_mean import gradient_where as gradient_where
from logitjax.ops._masked_mean import masked_mean as masked_mean
from logitjax.ops._positions import Positions as Positions
from logitjax.ops._static import Static as Static
from logitjax.ops._top_k import TopK as TopK
from logitjax.ops._top_k import gather_at as gather_at
from logitjax.ops._top_k import top_k as top_k
from logitjax.ops._types import Array as Array
from logitjax.ops._types import AxisName as AxisName
from logitjax.ops._types import Number as Number

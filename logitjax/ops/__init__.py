"""Operations that the other packages share: top-k, a safe softmax, masked means.

`ops.checks` checks arguments: its errors name the argument, the expected and the actual value.
`ops.sharding` splits the leaves of a pytree over a mesh and names the mesh axes; `ops.mesh` answers
queries of code that runs on a mesh.
"""

# For the other packages: all check arguments in the same words and query meshes in the same way.
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

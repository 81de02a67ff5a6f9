"""Operations the other packages share: exact top-k, safe softmax, means, positions, checks."""

from logitjax.ops._checks import as_float as as_float
from logitjax.ops._checks import check_axis as check_axis
from logitjax.ops._checks import check_between as check_between
from logitjax.ops._checks import check_positive as check_positive
from logitjax.ops._checks import check_same_shape as check_same_shape
from logitjax.ops._checks import check_where as check_where
from logitjax.ops._kth_largest import kth_largest as kth_largest
from logitjax.ops._log_softmax import AxisName as AxisName
from logitjax.ops._log_softmax import finite_or_zero as finite_or_zero
from logitjax.ops._log_softmax import log_softmax as log_softmax
from logitjax.ops._log_softmax import logsumexp as logsumexp
from logitjax.ops._log_softmax import mask_logits as mask_logits
from logitjax.ops._log_softmax import psum as psum
from logitjax.ops._masked_mean import masked_mean as masked_mean
from logitjax.ops._positions import Positions as Positions
from logitjax.ops._sharding import BATCH_AXES as BATCH_AXES
from logitjax.ops._sharding import VOCABULARY_AXES as VOCABULARY_AXES
from logitjax.ops._sharding import auto_axes as auto_axes
from logitjax.ops._sharding import check_vocabulary_unsharded as check_vocabulary_unsharded
from logitjax.ops._sharding import over_batch as over_batch
from logitjax.ops._top_k import TopK as TopK
from logitjax.ops._top_k import gather_at as gather_at
from logitjax.ops._top_k import top_k as top_k
from logitjax.ops._top_k import top_k_of as top_k_of
from logitjax.ops._types import Array as Array
from logitjax.ops._types import Number as Number

"""Losses on logits: unreduced float32 values with the vocabulary axis gone.

Common arguments:

* `logits`, or `student_logits` and `teacher_logits` of the same shape: `[*batch, vocab]`, of any
  floating point type. Both are differentiated: use `jax.lax.stop_gradient` if a teacher shares
  parameters with the student.
* `labels`: `[*batch]` integers in `0..vocab - 1`, of the whole vocabulary even if it is split.
* `direction`: 'forward' for KL(teacher || student), 'reverse' for KL(student || teacher).
* `temperature`: `T`, which divides the logits; positive, may be traced.
* `vocab_where`: boolean, broadcastable to the logits: True for valid entries, of both models if
  there are two. With a head it is `[vocab]`.
* `axis_name`: mesh axis over which the vocabulary is split, inside `jax.shard_map`. Elsewhere
  `MeshAxes` names the axes of a mesh.

The `linear_` functions start from hidden states and never hold all logits. They take instead:

* `hidden`: `[*batch, hidden]`, float32 or bfloat16. Matmuls run in the common type of hidden states
  and kernel, and accumulate in float32.
* `head`: a `Head`, or just a kernel `[hidden, vocab]` or `[vocab, hidden]`.
* `teacher_hidden` and `teacher_head`: the same for the teacher, `[*batch, teacher_hidden]` and a
  head of the same vocabulary. Neither they nor the temperature get gradients.
* `weights`: `[*batch]`. If given, the result is the scalar `sum(weights * loss)`, whose gradients
  are formed in the same sweep as the value if memory allows (see `Blocks`): nothing is computed
  twice. A position of weight 0 has no effect, whatever its label.
* `blocks`: limits on what is held at a time; chosen from shapes and device if None.

All return `[*batch]` float32, or a scalar with `weights`. They raise a TypeError for arrays of the
wrong type, and a ValueError if shapes do not fit, a kernel is square and its `vocab_axis` is not
given, or an option is unknown or out of range.
"""

from logitjax.losses._cross_entropy import cross_entropy as cross_entropy
from logitjax.losses._divergences import generalized_jensen_shannon as generalized_jensen_shannon
from logitjax.losses._divergences import kl_divergence as kl_divergence
from logitjax.losses._graph_statistics import GraphStatistics as GraphStatistics
from logitjax.losses._graph_statistics import graph_statistics as graph_statistics
from logitjax.losses._linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from logitjax.losses._linear_divergences import (
    linear_generalized_jensen_shannon as linear_generalized_jensen_shannon,
)
from logitjax.losses._linear_divergences import linear_kl_divergence as linear_kl_divergence
from logitjax.losses._linear_log_probs import linear_log_probs as linear_log_probs
from logitjax.losses._linear_log_probs import pad_support as pad_support
from logitjax.losses._linear_readout import Readout as Readout
from logitjax.losses._linear_readout import linear_fused_loss as linear_fused_loss
from logitjax.losses._linear_readout import linear_readout as linear_readout
from logitjax.losses._linear_readout import readout_statistic as readout_statistic
from logitjax.losses._sparse_teacher import (
    linear_sparse_kl_divergence as linear_sparse_kl_divergence,
)
from logitjax.losses._sparse_teacher import sparse_kl_divergence as sparse_kl_divergence
from logitjax.losses._tail_sample import TailSample as TailSample
from logitjax.losses.sweep import Blocks as Blocks
from logitjax.losses.sweep import Head as Head
from logitjax.ops.sharding import MeshAxes as MeshAxes

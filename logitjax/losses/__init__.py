"""Losses on logits: unreduced float32 values with the vocabulary axis gone.

The meaning of their common arguments:

* `logits`, or `student_logits` and `teacher_logits` of one shape: `[*batch, vocab]`, of any
  floating point type, with the vocabulary last. Both are differentiated: use
  `jax.lax.stop_gradient` if a teacher shares parameters with the student.
* `labels`: `[*batch]` integers in `0..vocab - 1`, over the whole vocabulary.
* `direction`: 'forward' for KL(teacher || student), 'reverse' for KL(student || teacher).
* `temperature`: `T`, which divides the logits. It is positive and may be traced.
* `vocab_where`: boolean, broadcastable to the logits: True for entries that exist, in both if there
  are two. For a head it is `[vocab]`.
* `axis_name`: inside `jax.shard_map`, the mesh axis over which the vocabulary is split. Elsewhere
  `MeshAxes` names the axes of a mesh.

The `linear_` functions start from hidden states and never hold the logits. They take instead:

* `hidden`: `[*batch, hidden]`, float32 or bfloat16. Matmuls run in the common type of hidden states
  and kernel, and accumulate in float32.
* `head`: a `Head`, or a kernel `[hidden, vocab]` or `[vocab, hidden]` alone.
* `teacher_hidden` and `teacher_head`: the same for the teacher, `[*batch, teacher_hidden]` and a
  head of the same vocabulary. Neither gets a gradient, nor does the temperature.
* `weights`: `[*batch]`. Returns the scalar `sum(weights * loss)`, whose gradients are formed in the
  same sweep as the value where memory allows (see `Blocks`): nothing is computed twice. A position
  of weight 0 adds nothing, whatever its label.
* `blocks`: limits of what is held at a time; chosen from shapes and device when None.

All return `[*batch]` float32, or a scalar with `weights`. They raise a TypeError if an array is of
the wrong kind, and a ValueError if shapes do not fit, a kernel is square without a `vocab_axis`, or
an option is unknown or out of range.
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
from logitjax.losses._linear_log_probs import LogProbs as LogProbs
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

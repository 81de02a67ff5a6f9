"""Learning from own samples: a student writes, its teachers read, and it learns from them.

- `OnPolicy` sets how much of a batch the student writes, and how tokens are sampled.
"""

from logitjax.distillation.on_policy._options import OnPolicy as OnPolicy
from logitjax.distillation.on_policy._rollouts import Rollouts as Rollouts
from logitjax.distillation.on_policy._rollouts import rollout_program as rollout_program

"""On-policy distillation: a student learns from its own samples, which its teachers read.

- `OnPolicy` sets how much of a batch the student writes, and how it samples.
- `Rollouts` samples rows, a function of the seed, the step and the weights, with the compiled
  `rollout_program`.
"""

from logitjax.distillation.on_policy._options import OnPolicy as OnPolicy
from logitjax.distillation.on_policy._rollouts import Rollouts as Rollouts
from logitjax.distillation.on_policy._rollouts import rollout_program as rollout_program

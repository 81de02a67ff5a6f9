"""Learning from own samples: a student writes, its teachers read, and it learns there.

- `OnPolicy` says how much of a batch the student writes, and by which law.
- `Rollouts` writes: rows are a function of the seed, the step and the weights. `rollout_program`
  is what it runs, compiled.
"""

from logitjax.distillation.on_policy._options import OnPolicy as OnPolicy
from logitjax.distillation.on_policy._rollouts import Rollouts as Rollouts
from logitjax.distillation.on_policy._rollouts import rollout_program as rollout_program

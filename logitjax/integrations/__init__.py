"""Our models and losses inside other programs, one module a program.

- `logitjax.integrations.lm_eval`: a model of lm-evaluation-harness, in process.
- `logitjax.integrations.tunix`: objectives and log-probabilities in the trainers of tunix.

Each needs its program, and so is imported by its own name.
"""

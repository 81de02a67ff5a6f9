"""Our models and losses inside other programs, one module per program.

- `logitjax.integrations.lm_eval`: a model of lm-evaluation-harness, in process.
- `logitjax.integrations.tunix`: objectives and log-probabilities in the trainers of tunix.

Each needs its program, so it is imported by its own name.
"""

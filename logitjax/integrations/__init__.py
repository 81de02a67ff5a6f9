"""Our models and losses inside other programs, one module a program.

- `logitjax.integrations.lm_eval`: a model of lm-evaluation-harness, in process.

Each needs its program, and so is imported by its own name.
"""

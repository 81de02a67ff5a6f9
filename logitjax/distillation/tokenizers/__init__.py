"""Distillation across tokenizers: alignment, projection of vocabularies, likelihood matching."""

"""Losses on logits: unreduced float32 values with the vocabulary axis gone."""

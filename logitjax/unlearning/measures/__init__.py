"""Measures of what is left after unlearning: TOFU, attacks, and their statistics."""

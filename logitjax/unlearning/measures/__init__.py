"""Measures of remaining knowledge after unlearning: TOFU, attacks, and their statistics."""

"""Experiments: one module a paper, started by ``python -m experiments.NAME --preset=...``."""

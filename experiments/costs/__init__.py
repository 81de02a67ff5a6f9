"""Costs of the papers' methods, in seconds measured in turns."""

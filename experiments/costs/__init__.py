"""Costs of the papers' methods, in seconds that are taken in turns."""

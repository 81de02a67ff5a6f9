"""Datasets of this package as tfds builders; importing this package imports tfds."""

from logitjax.data.builders._table import BUILDERS as BUILDERS

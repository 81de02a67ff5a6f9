"""Datasets of this package as tfds builders; importing this package imports tfds."""

from logitjax.data.builders._austen import Austen as Austen
from logitjax.data.builders._wiki_summaries import WikiSummaries as WikiSummaries

BUILDERS = {"austen": Austen, "wiki_summaries": WikiSummaries}

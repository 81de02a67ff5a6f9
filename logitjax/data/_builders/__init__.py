"""Datasets of this package as tfds builders; importing this package imports tfds."""

from typing import Any

from logitjax.data._builders._fashion_mnist import FashionMnistPng
from logitjax.data._builders._wiki_summaries import WikiSummaries

#: By the names that `tfds:NAME` has.
BUILDERS: dict[str, Any] = {builder.name: builder for builder in (FashionMnistPng, WikiSummaries)}

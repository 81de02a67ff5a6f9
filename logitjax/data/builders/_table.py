"""The builders by the names that `tfds:NAME` has."""

from typing import Any

from logitjax.data.builders._austen import Austen
from logitjax.data.builders._fashion_mnist import FashionMnistPng
from logitjax.data.builders._first_folio import FirstFolio
from logitjax.data.builders._udhr import Udhr
from logitjax.data.builders._wiki_summaries import WikiSummaries
from logitjax.data.builders._wikitext103 import Wikitext103

BUILDERS: dict[str, Any] = {
    builder.name: builder
    for builder in (Austen, FashionMnistPng, FirstFolio, Udhr, WikiSummaries, Wikitext103)
}

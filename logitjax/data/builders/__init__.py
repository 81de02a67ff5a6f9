"""Datasets of this package as tfds builders; importing this package imports tfds."""

from logitjax.data.builders._austen import Austen
from logitjax.data.builders._fashion_mnist import FashionMnistPng
from logitjax.data.builders._first_folio import FirstFolio
from logitjax.data.builders._udhr import Udhr
from logitjax.data.builders._wiki_summaries import WikiSummaries
from logitjax.data.builders._wikitext103 import Wikitext103

BUILDERS = {
    "austen": Austen,
    "fashion_mnist_png": FashionMnistPng,
    "first_folio": FirstFolio,
    "udhr": Udhr,
    "wiki_summaries": WikiSummaries,
    "wikitext103": Wikitext103,
}

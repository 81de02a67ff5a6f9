"""Datasets of this package as tfds builders; importing this package imports tfds."""

from logitjax.data.builders._austen import Austen as Austen
from logitjax.data.builders._fashion_mnist import FashionMnistPng as FashionMnistPng
from logitjax.data.builders._first_folio import FirstFolio as FirstFolio
from logitjax.data.builders._udhr import Udhr as Udhr
from logitjax.data.builders._wiki_summaries import WikiSummaries as WikiSummaries
from logitjax.data.builders._wikitext103 import Wikitext103 as Wikitext103

BUILDERS = {
    "austen": Austen,
    "fashion_mnist_png": FashionMnistPng,
    "first_folio": FirstFolio,
    "udhr": Udhr,
    "wiki_summaries": WikiSummaries,
    "wikitext103": Wikitext103,
}

"""Atomic file writes, the one on-disk cache, and weights in common formats.

To store something expensive of your own that belongs to rows, define the encoding of a row
(`ArrayCodec` for arrays of fixed shapes) and its inputs, and fill a `RowCache`::

    codec = ArrayCodec({"embedding": ("float16", (768,))})
    made_from = {"model": "encoder-v2", "data": digest(texts), "layer": 11}
    cache = RowCache("embeddings", codec, made_from=made_from)
    cache.fill(range(len(texts)), embed, batch_size=32)
    cache.read([3, 1])["embedding"]

A cache made from other inputs is refused, and the error names the difference. Data without rows
have a `Manifest` with the same rule. `storage.weights` reads checkpoints of others.
"""

from logitjax.storage import guard as guard
from logitjax.storage import weights as weights
from logitjax.storage._digest import digest as digest
from logitjax.storage._failures import may_pass as may_pass
from logitjax.storage._files import kept as kept
from logitjax.storage._files import write_atomic as write_atomic
from logitjax.storage._guard import read_json as read_json
from logitjax.storage._heads import read_head as read_head
from logitjax.storage._heads import write_head as write_head
from logitjax.storage._hub import hub_snapshot as hub_snapshot
from logitjax.storage._manifest import Manifest as Manifest
from logitjax.storage._option import option as option
from logitjax.storage._progress import progress as progress
from logitjax.storage._require import package_file as package_file
from logitjax.storage._require import require as require
from logitjax.storage._rows import ArrayCodec as ArrayCodec
from logitjax.storage._rows import RowCache as RowCache
from logitjax.storage._shards import ShardReader as ShardReader
from logitjax.storage._shards import write_shards as write_shards

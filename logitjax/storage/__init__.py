"""Files written whole or not at all, the one on-disk cache, and weights in the formats people have.

To keep something of your own that is expensive and belongs to rows, say how a row becomes bytes
(`ArrayCodec` for arrays of fixed shapes) and what it depends on, and fill a `RowCache`::

    codec = ArrayCodec({"embedding": ("float16", (768,))})
    made_from = {"model": "encoder-v2", "data": digest(texts), "layer": 11}
    cache = RowCache("embeddings", codec, made_from=made_from)
    cache.fill(range(len(texts)), embed, batch_size=32)
    cache.read([3, 1])["embedding"]

A cache that was made for something else is refused, and the error says what differs. Data without
rows have a `Manifest` and the same rule. `storage.weights` reads others' checkpoints.
"""

from logitjax.storage import guard as guard
from logitjax.storage import weights as weights
from logitjax.storage._digest import digest as digest
from logitjax.storage._failures import may_pass as may_pass
from logitjax.storage._files import kept as kept
from logitjax.storage._files import write_atomic as write_atomic
from logitjax.storage._files import write_json as write_json
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

"""Caches of common prompt beginnings, stored in blocks so that they are not read again."""

import collections
import hashlib
from typing import Any

import jax
import numpy as np


class PrefixCache:
    """Caches of some tokens each, `limit` bytes at most; the least recently used go first."""

    def __init__(self, limit: int):
        self.limit = limit
        self.size = 0
        self._blocks: collections.OrderedDict[bytes, tuple[Any, int]] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def longest(self, names: list[bytes]) -> list[Any]:
        """The stored blocks from the first on, up to the first that is missing."""
        longest = []
        for name in names:
            if name not in self._blocks:
                break
            longest.append(self._blocks[name][0])
        # The first block last: a block without its beginning is useless.
        for name in reversed(names[: len(longest)]):
            self._blocks.move_to_end(name)
        return longest

    def put(self, name: bytes, cache: Any) -> None:
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        if name in self._blocks or size > self.limit:
            return
        self._blocks[name] = (cache, size)
        self.size += size
        while self.size > self.limit:
            _, (_, size) = self._blocks.popitem(last=False)
            self.size -= size


def block_names(tokens: np.ndarray, block: int, salt: str) -> list[bytes]:
    """A digest for every whole block of `tokens`, of all tokens up to its end."""
    # A hash of all tokens before: equal tokens after others have other keys and values.
    digest = hashlib.blake2b(salt.encode(), digest_size=16)
    names = []
    for start in range(0, len(tokens) - block + 1, block):
        digest.update(np.asarray(tokens[start : start + block], np.int32).tobytes())
        names.append(digest.copy().digest())
    return names

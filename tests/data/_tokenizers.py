"""Two small tokenizers that cut the same text differently."""

import re
from typing import ClassVar


class ByteTokenizer:
    """A token a byte, then the end mark."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 258, None, 256, 257, "bytes"

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids) -> str:
        return bytes(i for i in ids if i < 256).decode()


class WordTokenizer:
    """A token per run of white space and up to five letters; starts every document with a mark."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 1 << 20, 1, 2, None, "words"
    add_bos = True

    _ids: ClassVar[dict[str, int]] = {}

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        words = re.findall(r"\s*\S{1,5}|\s+", text)
        return [self._ids.setdefault(word, len(self._ids) + 3) for word in words]

    def decode(self, ids) -> str:
        words = list(self._ids)
        return "".join(words[i - 3] for i in ids if i > 2)

"""How much text each token of a vocabulary stands for."""

import json
import re

import numpy as np

from logitjax.models._tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of UTF-8 text that each token stands for: what aligns two tokenizations of one text.

    Byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM2) spell every byte as one character;
    SentencePiece vocabularies (Llama 2, Mistral, Gemma) spell text as it is, a space as one lower
    block and stray bytes as ``<0xNN>``.

    Args:
      tokenizer: of a model.

    Returns:
      int64 ``[vocab_size]``; 0 for special tokens and unused ids.

    >>> from tokenizers import Tokenizer as Backend, models
    >>> backend = Backend(models.BPE({"a": 0, "▁the": 1, "<0x0A>": 2}, [], byte_fallback=True))
    >>> token_byte_lengths(Tokenizer(backend)).tolist()
    [1, 4, 1]
    """
    description = json.loads(tokenizer.backend.to_str())
    special = {t["id"] for t in description["added_tokens"] if t["special"]}
    added = {t["id"] for t in description["added_tokens"]}
    byte_level = "ByteLevel" in json.dumps([description["pre_tokenizer"], description["decoder"]])
    lengths = np.zeros(tokenizer.vocab_size, np.int64)
    for text, id_ in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if id_ in special:
            continue
        if byte_level and id_ not in added:
            lengths[id_] = len(text)
        elif _BYTE.fullmatch(text):
            lengths[id_] = 1
        else:
            lengths[id_] = len(text.replace("▁", " ").encode())
    return lengths

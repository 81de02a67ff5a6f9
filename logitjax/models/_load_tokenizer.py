"""Tokenizers from tokenizer.json or rebuilt from GGUF metadata, alone and with their models."""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from logitjax.models._config import DecoderConfig
from logitjax.models._decoder import Decoder
from logitjax.models._families import all_families
from logitjax.models._gguf import GgufSource
from logitjax.models._load import find_checkpoint, load_config, load_model
from logitjax.models._rules import DECODER_RULES
from logitjax.models._tiny import tiny_seed
from logitjax.models._tokenizer import Tokenizer
from logitjax.storage import guard, read_json, require

# The value of a key: `t:20241130` is a token, and a truncation length is not an id.
_LARGE_ID = re.compile(r'(?<!max_length)"\s*:\s*(\d{8,})')
# Every way to split a token is tried.
_LONGEST_TOKEN = 256


def load_tokenizer(spec: str) -> Tokenizer:
    """Load the tokenizer of a model; `spec` as for `load_model`.

    Raises:
        ValueError: one line naming the file or metadata that is missing or unknown.
    """
    if tiny_seed(spec) is not None:
        return byte_tokenizer()
    path = find_checkpoint(spec)
    if not path.is_dir():
        source = GgufSource(path)
        with guard.naming(path, "a tokenizer"):
            return _from_gguf(source)
    with guard.naming(path, "a tokenizer"):
        return _from_directory(path)


def load(
    spec: str,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    layout: str = "stacked",
    remat: str = "none",
    quantize: str | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Decoder, Tokenizer]:
    """Load a decoder and its tokenizer.

    The arguments are those of `load_model`; dtypes may be names, and `DECODER_RULES` split the
    parameters over a mesh. Use `param_dtype` float32 for training.

    Raises:
        ValueError: One line naming the file or tensor that is wrong, or a tokenizer with tokens
            that the model does not have.

    >>> model, tokenizer = load("tiny")
    >>> model.config.vocab_size == tokenizer.vocab_size
    True
    """
    tokenizer = load_tokenizer(spec)
    check_tokenizer(load_config(spec), tokenizer)
    model = load_model(
        spec,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        layout=layout,
        remat=remat,
        quantize=quantize,
        mesh=mesh,
        rules=DECODER_RULES,
    )
    return model, tokenizer


def byte_tokenizer() -> Tokenizer:
    """Text as its UTF-8 bytes, plus an end-of-text token: no files needed."""
    tokenizers = require("tokenizers", extra="models")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges=[]))
    backend.add_special_tokens(["<|end|>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return Tokenizer(backend, eos_id=len(vocab), pad_id=len(vocab))


def check_tokenizer(config: DecoderConfig, tokenizer: Tokenizer) -> None:
    """Raise if a tokenizer has ids without an embedding in the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} tokens but the {config.family} model's "
            f"vocabulary holds {config.vocab_size}: they do not belong together"
        )


def _from_directory(path: epath.Path) -> Tokenizer:
    file = path / "tokenizer.json"
    if not file.exists():
        raise ValueError(f"{file}: no such file")
    tokenizers = require("tokenizers", extra="models")
    config, settings = (
        read_json(path / name, form=dict) if (path / name).exists() else {}
        for name in ("config.json", "tokenizer_config.json")
    )
    with guard.naming(file, "a tokenizer"):
        content = guard.read_text(file, most=guard.LIMITS.tokenizer_bytes)
        # The library allocates an entry for every id up to the largest.
        if match := _LARGE_ID.search(content):
            raise ValueError(f"id: expected less than 10,000,000, got {match[1][:40]}")
        backend = tokenizers.Tokenizer.from_str(content)
        existing = (config.get("text_config") or config).get("vocab_size")
        if isinstance(existing, int) and backend.get_vocab_size() > existing:
            # Gemma 3's text models come with the tokenizer of the multimodal ones, which adds
            # tokens without a row in the model, such as image tokens.
            record = json.loads(content)
            added = record.get("added_tokens") or ()
            record["added_tokens"] = [token for token in added if token["id"] < existing]
            backend = tokenizers.Tokenizer.from_str(json.dumps(record))
    # Files store the truncation and padding of their last use; here callers set lengths.
    backend.no_truncation()
    backend.no_padding()
    texts = _special_texts(path, settings)
    ids = {}
    for name in ("bos", "eos", "pad"):
        text = texts.get(f"{name}_token")
        ids[name] = None if text is None else backend.token_to_id(text)
    for name, id in ids.items():
        fallback = config.get(f"{name}_token_id")
        if id is None and fallback is not None:
            one = fallback[0] if isinstance(fallback, list) and fallback else fallback
            field = f"{path / 'config.json'}: {name}_token_id"
            # Old files often have -1.
            ids[name] = None if one == -1 else guard.whole(one, field, most=guard.LIMITS.width)
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["pad"],
        chat_template=_chat_template(path, settings),
        special_tokens=texts if settings or texts else None,
        extra=settings,
    )


def _special_texts(path: epath.Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the named special tokens: `bos_token` and so on in templates."""
    older = path / "special_tokens_map.json"
    existing = (read_json(older) if older.exists() else {}) | dict(settings)
    names = [f"{n}_token" for n in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    values = {name: existing.get(name) for name in names}
    texts = {n: v.get("content") if isinstance(v, dict) else v for n, v in values.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _chat_template(path: epath.Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    """One template, or several by name; separate files win over tokenizer_config.json."""
    files = {"default": path / "chat_template.jinja"}
    folder = path / "additional_chat_templates"
    if folder.exists():
        files |= {file.stem: file for file in sorted(folder.glob("*.jinja"))}
    most = guard.LIMITS.template_bytes
    entries = {n: guard.read_text(file, most=most) for n, file in files.items() if file.exists()}
    if entries:
        return entries["default"] if list(entries) == ["default"] else entries
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    texts = template.items() if isinstance(template, dict) else [("default", template)]
    if not all(isinstance(part, str) for entry in texts for part in entry if part is not None):
        field = f"{path / 'tokenizer_config.json'}: chat_template"
        raise ValueError(f"{field}: expected a text, or texts by name, got {guard.short(template)}")
    return template


def _from_gguf(source: GgufSource) -> Tokenizer:
    tokens = source.metadata("tokenizer.ggml.tokens")
    kind = source.metadata("tokenizer.ggml.model")
    if tokens is None:
        raise ValueError(f"{source.path}: holds no tokenizer")
    types = source.metadata("tokenizer.ggml.token_type") or [1] * len(tokens)
    if kind not in _KINDS:
        raise ValueError(f"{source.path}: unknown tokenizer model {kind!r}")
    backend, add_bos = _KINDS[kind](source, tokens, types)
    tokenizers = require("tokenizers", extra="models")
    # 3 marks control tokens, 4 tokens the user defined.
    marked = [
        tokenizers.AddedToken(t, special=c == 3, normalized=False)
        for t, c in zip(tokens, types)
        if c in (3, 4)
    ]
    backend.add_special_tokens([t for t in marked if t.special])
    backend.add_tokens([t for t in marked if not t.special])
    ids = {n: source.metadata(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos", "padding")}
    mark = None if ids["bos"] is None else backend.id_to_token(ids["bos"])
    if mark is not None and source.metadata("tokenizer.ggml.add_bos_token", add_bos):
        # Part of the backend, so that it is saved with it.
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[mark, "$A"], pair=[mark, "$A", mark, "$B"], special_tokens=[(mark, ids["bos"])]
        )
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        pad_id=ids["padding"],
        chat_template=source.metadata("tokenizer.chat_template"),
    )


def _byte_level(source: GgufSource, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """BPE over the bytes of a text, split by the file's pre-tokenizer."""
    merges = source.metadata("tokenizer.ggml.merges")
    if merges is None:
        raise ValueError(f"{source.path}: metadata tokenizer.ggml.merges is missing")
    name = source.metadata("tokenizer.ggml.pre", "default")
    items = [f.pre_tokenizers[name] for f in all_families() if name in f.pre_tokenizers]
    if not items:
        raise ValueError(f"{source.path}: unknown pre-tokenizer {name!r}")
    pre = items[0]
    tokenizers = require("tokenizers", extra="models")
    splits = tokenizers.pre_tokenizers
    steps = [splits.ByteLevel(add_prefix_space=False, use_regex=not pre.pattern)]
    if pre.pattern:
        steps.insert(0, splits.Split(tokenizers.Regex(pre.pattern), "isolated"))
    if pre.digits:
        steps.insert(0, splits.Digits(individual_digits=True))
    vocab = {t: i for i, t in enumerate(tokens)}
    pairs = [tuple(m.split(" ")) for m in merges]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, pairs, ignore_merges=pre.ignore_merges)
    )
    backend.pre_tokenizer = splits.Sequence(steps) if len(steps) > 1 else steps[0]
    backend.decoder = tokenizers.decoders.ByteLevel()
    if pre.nfc:
        backend.normalizer = tokenizers.normalizers.NFC()
    return backend, pre.add_bos


def _sentencepiece(source: GgufSource, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """Byte-fallback BPE whose merges follow from the scores; texts begin with a BOS token."""
    scores = source.metadata("tokenizer.ggml.scores")
    if scores is None:
        raise ValueError(f"{source.path}: metadata tokenizer.ggml.scores is missing")
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = []
    longest = max(map(len, tokens), default=0)
    guard.whole(longest, "tokenizer.ggml.tokens: longest token", most=_LONGEST_TOKEN)
    for token, score, kind in zip(tokens, scores, types):
        if kind not in (1, 4) or len(token) < 2:
            continue
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        items = [(a, b) for a, b in splits if a in vocab and b in vocab]
        # transformers' converter orders merges of one score like this.
        items.sort(key=lambda ab: (vocab[ab[0]], vocab[ab[1]]))
        merges += [(-score, a, b) for a, b in items]
    merges.sort(key=lambda m: m[0])
    tokenizers = require("tokenizers", extra="models")
    unknown = source.metadata("tokenizer.ggml.unknown_token_id")
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab,
            [(a, b) for _, a, b in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[Any] = [tokenizers.normalizers.Replace(" ", "▁")]
    prefix = bool(source.metadata("tokenizer.ggml.add_space_prefix", True))
    if prefix:
        steps.insert(0, tokenizers.normalizers.Prepend("▁"))
    backend.normalizer = tokenizers.normalizers.Sequence(steps)
    after: list[Any] = [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if prefix:
        after.append(tokenizers.decoders.Strip(" ", 1, 0))
    backend.decoder = tokenizers.decoders.Sequence(after)
    return backend, True


# For each tokenizer model of a GGUF file, its constructor and whether texts begin with a BOS token
# if the file does not say, as in llama.cpp.
_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}

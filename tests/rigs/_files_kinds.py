"""For each kind of file: how one is made from its number, and what reads it."""

import dataclasses
import functools
import json
import os
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from logitjax import data, models, storage, vq
from logitjax.storage.weights import (
    SafetensorsSource,
    read_npy,
    read_npz,
    read_numpy_pickle,
    read_state_dict,
)
from tests.rigs import _files_bases as bases
from tests.rigs import _files_bombs as bombs
from tests.rigs import _files_mutate as mutate
from tests.rigs._files_bases import LOOPS, TEMPLATES

MESSAGES = [
    {"role": "user", "content": "Cats and cabbages: what is it?"},
    {"role": "assistant", "content": "A question."},
    {"role": "user", "content": "a b c"},
]
Random = random.Random
# Bombs and good files of each kind are fewer.
_FIRST = 100
_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_CODEC = storage.ArrayCodec({"x": ("float32", (4,))})


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        write: Writes file `number` into a directory; the first are the bombs.
        load: Reads what lies in a directory; returns the bytes of the tensors it made.
        warm: The file that is read first, not counted: imports and compiles.
    """

    count: int
    write: Callable[[Path, int, Random], None]
    load: Callable[[Path], int]
    warm: int = 1000


def _size(arrays: Any) -> int:
    if isinstance(arrays, dict):
        arrays = list(arrays.values())
    if isinstance(arrays, list | tuple):
        # One array in two places is held once.
        sizes = {id(a): a.nbytes for a in arrays if isinstance(a, np.ndarray)}
        return sum(sizes.values()) + sum(_size(a) for a in arrays if isinstance(a, dict | list))
    return getattr(arrays, "nbytes", 0)


def one_file(
    name: str,
    hostile: Callable[[], Sequence[bytes]],
    good: Callable[[], Sequence[bytes]],
    change: Callable[[bytes, Random], bytes],
) -> Callable[[Path, int, Random], None]:
    """Writes bombs, then changed copies of good files, as files of one name."""

    def write(directory: Path, number: int, rng: Random) -> None:
        # They take seconds to be made.
        first = hostile() if number < _FIRST else [b""] * _FIRST
        if number < len(first) + len(good()):
            content = [*first, *good()][number]
        else:
            content = rng.choice(good())
            edit = mutate.any_bytes if rng.random() < 0.4 else change
            content = edit(content, rng)
        (directory / name).write_bytes(content)

    return write


def _read(name: str) -> Callable[[Path], int]:
    return lambda directory: _size(read_state_dict(directory / name))


def _load_index(directory: Path) -> int:
    source = SafetensorsSource(directory)
    return _size([source.read(name) for name in source.names()])


def _write_index(directory: Path, number: int, rng: Random) -> None:
    shards = {"a.safetensors": bases.safetensors(), "b.safetensors": save({"c": np.ones((3, 3))})}
    where = {"a.weight": "a.safetensors", "b.bias": "a.safetensors", "c": "b.safetensors"}
    (directory.parent / "secret.safetensors").write_bytes(bases.safetensors())
    os.symlink(directory.parent / "secret.safetensors", directory / "link.safetensors")
    os.mkfifo(directory / "fifo.safetensors")
    maps = bombs.index_maps()
    index: Any = {"metadata": {"total_size": 1}, "weight_map": where}
    text = json.dumps(maps[number] if number < len(maps) else index).encode()
    if number > len(maps):
        if rng.random() < 0.6:
            text = mutate.json_text(index, rng)
        else:
            name = rng.choice(sorted(shards))
            shards[name] = mutate.safetensors(shards[name], rng)
    for name, content in shards.items():
        (directory / name).write_bytes(content)
    (directory / "model.safetensors.index.json").write_bytes(text)


def _load_gguf(directory: Path) -> int:
    from logitjax.models import load_config, load_tokenizer

    path = directory / "model.gguf"
    load_config(str(path))
    load_tokenizer(str(path)).encode("hello world")
    return 0


def _parameters(model: Any) -> int:
    import jax
    from flax import nnx

    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model)))


def _load_model(name: str = "") -> Callable[[Path], int]:
    return lambda directory: _parameters(models.load_model(str(directory / name)))


def _write_gguf_model(directory: Path, number: int, rng: Random) -> None:
    content = bases.gguf_file()
    if number:
        at = content.index(b"token_embd.weight") if rng.random() < 0.5 else 0
        content = content[:at] + mutate.any_bytes(content[at:], rng)
    (directory / "model.gguf").write_bytes(content)


def _in_zip(content: bytes, rng: Random) -> bytes:
    def inner(name: str, data_: bytes, rng_: Random) -> bytes:
        edit = mutate.a_pickle if name.endswith(".pkl") else mutate.any_bytes
        return edit(data_, rng_)

    return mutate.a_zip(content, rng, inner)


def _in_legacy(content: bytes, rng: Random) -> bytes:
    start = content.index(b"\x80\x02ccollections")
    return content[:start] + mutate.a_pickle(content[start:], rng)


def _load_pickle(directory: Path) -> int:
    tree = read_numpy_pickle(directory / "weights.ckpt")
    return _size(tree.get("params")) if isinstance(tree, dict) else 0


@functools.cache
def _legacy_bombs() -> list[bytes]:
    head = bases.torch_legacy()[: bases.torch_legacy().index(b"\x80\x02ccollections")]
    return [head + bomb for bomb in bombs.pickle_bombs()]


def _write_arrays(directory: Path, number: int, rng: Random) -> None:
    hostile = bombs.npz_bombs() if number < 20 else []
    if number < len(hostile):
        (directory / "a.npz").write_bytes(hostile[number])
    elif rng.random() < 0.6:
        content = mutate.a_zip(rng.choice(bases.npz_files()), rng, mutate.npy)
        (directory / "a.npz").write_bytes(content)
    else:
        (directory / "a.npy").write_bytes(mutate.npy("", bases.npy_file(), rng))


def _load_arrays(directory: Path) -> int:
    if (directory / "a.npz").exists():
        return _size(read_npz(directory / "a.npz"))
    mapped = read_npy(directory / "a.npy", mapped=True)
    return mapped.nbytes + read_npy(directory / "a.npy").nbytes


def _write_config(directory: Path, number: int, rng: Random) -> None:
    hostile = bombs.config_bombs()
    if number < len(hostile):
        value = hostile[number]
        text = value if isinstance(value, bytes) else json.dumps(value).encode()
    else:
        text = mutate.json_text(rng.choice(bases.CONFIGS), rng)
    (directory / "config.json").write_bytes(text)


def _tokenizer_files() -> dict[str, Any]:
    settings = {
        "bos_token": "<|end|>",
        "eos_token": {"content": "<|end|>"},
        "pad_token": None,
        "chat_template": [{"name": "default", "template": TEMPLATES[0]}],
        "added_tokens_decoder": {"256": {"content": "<|end|>", "special": True}},
    }
    backend = json.loads(models.load_tokenizer("tiny").backend.to_str())
    generation = {"eos_token_id": [256, 2], "temperature": 0.7, "top_p": 0.9, "top_k": 20}
    return {
        "tokenizer.json": backend,
        "tokenizer_config.json": settings,
        "config.json": bases.LLAMA,
        "generation_config.json": generation,
    }


def _write_tokenizer(directory: Path, number: int, rng: Random) -> None:
    files = _tokenizer_files()
    chosen = rng.choice(sorted(files))
    broken = (b"[" * 100_000, b"", b"[]", b"3", b'"x"', b"null", b"{}")
    for name, value in files.items():
        text = json.dumps(value).encode()
        if name == chosen and number:
            text = broken[number] if number < len(broken) else mutate.json_text(value, rng)
        (directory / name).write_bytes(text)
    template = TEMPLATES[1].encode()
    if rng.random() < 0.2:
        (directory / "chat_template.jinja").write_bytes(mutate.any_bytes(template, rng))


def _load_tokenizer(directory: Path) -> int:
    tokenizer = models.load_tokenizer(str(directory))
    tokenizer.encode("hello world", add_bos=True)
    if tokenizer.chat_template is not None:
        tokenizer.render_chat(MESSAGES)
    return 0


def _write_template(directory: Path, number: int, rng: Random) -> None:
    if number < len(LOOPS):
        text = LOOPS[number]
    else:
        text = rng.choice((*TEMPLATES, *TEMPLATES, rng.choice(LOOPS)))
        edit = rng.randrange(4)
        if edit == 0:
            text = mutate.any_bytes(text.encode(), rng).decode("utf-8", "replace")
        elif edit == 1:
            other = rng.choice((*TEMPLATES, *LOOPS))
            at, cut = rng.randrange(len(text)), rng.randrange(len(other))
            text = text[:at] + other[cut : cut + rng.randint(1, 80)] + text[at:]
        elif edit == 2:
            # Two expressions inside of each other, or one behind the other.
            pieces = [t for t in LOOPS if t.startswith("{{")]
            inner = [rng.choice(pieces).strip("{} ") for _ in range(2)]
            text = "{{ (" + ") ~ (".join(inner) + ") }}" + text
        else:
            numbers = [t for t in text.split() if t.isdigit()]
            if numbers:
                text = text.replace(rng.choice(numbers), str(rng.choice(mutate.VALUES[5:9])))
            # Four of them end at the limit of time, which is long.
            text = "{% for i in range(99) %}" * rng.choice((0, 1, 1, 1, 2, 2, 2, 4)) + text
            text += "{% endfor %}" * text.count("range(99) %}")
    (directory / "chat_template.jinja").write_text(text, errors="replace")


def _load_template(directory: Path) -> int:
    tokenizer = models.load_tokenizer("tiny")
    tokenizer.chat_template = (directory / "chat_template.jinja").read_text()
    tokenizer.render_chat(MESSAGES, add_generation_prompt=True)
    return 0


def _write_picture(directory: Path, number: int, rng: Random) -> None:
    hostile = bombs.picture_bombs() if number < 40 else []
    (directory / "train" / "a").mkdir(parents=True)
    if number < len(hostile):
        name, content = hostile[number]
    else:
        name = rng.choice(sorted(bases.pictures()))
        content = mutate.png(bases.pictures()[name], rng)
    (directory / "train" / "a" / name).write_bytes(content)


def _load_picture(directory: Path) -> int:
    (path,) = (directory / "train" / "a").iterdir()
    pixels, _ = data.load_image_set(f"folder:{directory / 'train'}")[0]
    # Pillow holds four bytes a pixel, whatever the picture has.
    return pixels.shape[0] * pixels.shape[1] * (4 + 3) if path else 0


def _load_merges(directory: Path) -> int:
    path = directory / _MERGES
    with storage.guard.naming(path, "merges"):
        content = storage.guard.read_bytes(path, most=storage.guard.LIMITS.json_bytes)
        return len(storage.guard.gunzip(content, "merges"))


def _write_head(directory: Path, number: int, rng: Random) -> None:
    record = {"kind": "VQHead", "options": {"soft_cap": None, "use_bias": True}}
    tensors = {
        "codebook": bases.llama_tensors()["model.layers.0.mlp.down_proj.weight"][:8, :8].copy(),
        "assignment": np.arange(20, dtype=np.int32) % 8,
        "bias": np.zeros(20, np.float32),
    }
    text, content = json.dumps(record).encode(), save(tensors)
    if number % 2:
        text = mutate.json_text(record, rng)
    elif number:
        content = mutate.safetensors(content, rng)
    (directory / "head.json").write_bytes(text)
    (directory / "head.safetensors").write_bytes(content)


@functools.cache
def _cache_files() -> dict[str, bytes]:
    import tempfile

    home = Path(tempfile.mkdtemp()) / "cache"
    cache = storage.RowCache(home, _CODEC, made_from={"data": "d"})
    cache.fill(range(6), lambda rows: {"x": np.ones((len(rows), 4))}, batch_size=3)
    return {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file()}


def _write_rows(directory: Path, number: int, rng: Random) -> None:
    files = dict(_cache_files())
    if number:
        name = rng.choice(sorted(files))
        if name.endswith(".json") and rng.random() < 0.8:
            files[name] = mutate.json_text(json.loads(files[name]), rng)
        else:
            files[name] = mutate.any_bytes(files[name], rng)
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def _load_rows(directory: Path) -> int:
    cache = storage.RowCache(directory, _CODEC, made_from={"data": "d"})
    return _size(cache.read([0, 5]))


def _write_model(directory: Path, number: int, rng: Random) -> None:
    config: Any = bases.LLAMA
    content = save(bases.llama_tensors())
    text = json.dumps(config).encode()
    sizes = ("num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "head_dim")
    wrong = [LLAMA | {key: value} for LLAMA in [config] for key in sizes for value in (9999, 0, 3)]
    if 0 < number <= len(wrong):
        text = json.dumps(wrong[number - 1]).encode()
    elif number % 2:
        text = mutate.json_text(config, rng)
    elif number:
        content = mutate.safetensors(content, rng)
    (directory / "config.json").write_bytes(text)
    (directory / "model.safetensors").write_bytes(content)


def _write_json(directory: Path, number: int, rng: Random) -> None:
    record = {"kind": "table", "format": 1, "made_from": {"data": "d", "k": 4, "list": [1, 2]}}
    text = json.dumps(record).encode() if number == 0 else mutate.json_text(record, rng)
    if 0 < number <= 3:
        many = b"[" + b"[]," * 4_000_000 + b"1]"
        text = (b"[" * 1_000_000, many, b'"' + bytes(40 << 20) + b'"')[number - 1]
    (directory / "manifest.json").write_bytes(text)


def _load_json(directory: Path) -> int:
    storage.read_json(directory / "manifest.json")
    storage.Manifest(directory, "table").check({"data": "d", "k": 4})
    return 0


_SAFETENSORS = (bombs.safetensors_bombs, lambda: [bases.safetensors()], mutate.safetensors)
_GGUF = (bombs.gguf_bombs, lambda: [bases.gguf_file()], mutate.any_bytes)
_ZIP = (bombs.zip_bombs, lambda: [bases.torch_zip()], _in_zip)
_OLDER = (_legacy_bombs, lambda: [bases.torch_legacy()], _in_legacy)
_PICKLE = (bombs.pickle_bombs, bases.numpy_pickles, mutate.a_pickle)
_GZIP = (bombs.gzip_bombs, lambda: [bases.MERGES], mutate.any_bytes)
KINDS: dict[str, Kind] = {
    "safetensors": Kind(
        16_000, one_file("model.safetensors", *_SAFETENSORS), _read("model.safetensors")
    ),
    "index": Kind(6000, _write_index, _load_index),
    "gguf": Kind(16_000, one_file("model.gguf", *_GGUF), _load_gguf),
    "torch, zip": Kind(12_000, one_file("weights.pth", *_ZIP), _read("weights.pth")),
    "torch, older": Kind(6000, one_file("weights.pth", *_OLDER), _read("weights.pth")),
    "numpy pickle": Kind(6000, one_file("weights.ckpt", *_PICKLE), _load_pickle),
    "npz, npy": Kind(8000, _write_arrays, _load_arrays),
    "config": Kind(10_000, _write_config, lambda d: _size(models.load_config(str(d)))),
    "tokenizer": Kind(4000, _write_tokenizer, _load_tokenizer),
    "template": Kind(4000, _write_template, _load_template),
    "image": Kind(6000, _write_picture, _load_picture),
    "manifest": Kind(3000, _write_json, _load_json),
    "gzip": Kind(500, one_file(_MERGES, *_GZIP), _load_merges),
    "row cache": Kind(1000, _write_rows, _load_rows),
    "head": Kind(500, _write_head, lambda d: _parameters(vq.load_head(d)), warm=0),
    "model": Kind(600, _write_model, _load_model(), warm=0),
    "model, gguf": Kind(400, _write_gguf_model, _load_model("model.gguf"), warm=0),
}


def seeded(kind: str, number: int) -> Random:
    """The generator of one file: the same in every run, whatever else is run."""
    return Random(zlib.crc32(f"{kind} {number}".encode()))


def numbers_of(kind: str, count: int) -> list[int]:
    """Numbers of about so many files of a kind, the bombs first and the others spread."""
    whole = KINDS[kind].count
    step = max(1, whole // max(1, count))
    return list(range(0, whole, step))[:count]

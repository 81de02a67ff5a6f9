"""Small files of every kind as people have them."""

import functools
import gzip
import io
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from PIL import Image
from safetensors.numpy import save

from tests.rigs import _tables

TABLE = _tables.read("hostile_values")
_TEMPLATES = _tables.read("hostile_templates")
# Chat templates as models have them, and as an attacker would write them.
TEMPLATES: tuple[str, ...] = tuple(_TEMPLATES["templates"])
LOOPS = tuple(map(_tables.text, _TEMPLATES["loops"]))
LLAMA: dict[str, Any] = TABLE["llama"]
CONFIGS = (LLAMA, *(LLAMA | other for other in TABLE["other llamas"]), TABLE["gpt2"])


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# Of a layer's matrices the name in GGUF, and the shape.
_LAYER: dict[str, Any] = {
    "input_layernorm": ("attn_norm", 32),
    "post_attention_layernorm": ("ffn_norm", 32),
    "self_attn.q_proj": ("attn_q", 32, 32),
    "self_attn.k_proj": ("attn_k", 16, 32),
    "self_attn.v_proj": ("attn_v", 16, 32),
    "self_attn.o_proj": ("attn_output", 32, 32),
    "mlp.gate_proj": ("ffn_gate", 64, 32),
    "mlp.up_proj": ("ffn_up", 64, 32),
    "mlp.down_proj": ("ffn_down", 32, 64),
}


@functools.cache
def llama_tensors() -> dict[str, np.ndarray]:
    tensors = {"model.embed_tokens.weight": _random(259, 32), "model.norm.weight": _random(32)}
    for i in range(2):
        layer = {name: _random(*shape) for name, (_, *shape) in _LAYER.items()}
        tensors |= {f"model.layers.{i}.{name}.weight": values for name, values in layer.items()}
    return tensors


@functools.cache
def safetensors() -> bytes:
    tensors = {"a.weight": _random(6, 5), "b.bias": _random(7).astype(np.float16)}
    return save(tensors | {"scalar": _random()}, {"format": "pt"})


@functools.cache
def gguf_file() -> bytes:
    """A whole small model with its tokenizer, its matrices in three formats."""
    from tokenizers import pre_tokenizers

    path = Path(tempfile.mkdtemp()) / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "cd", "<|end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 258 + [3])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(258)
    writer.add_chat_template(TEMPLATES[0])
    kinds = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0, None)
    for number, (name, values) in enumerate(llama_tensors().items()):
        if ".layers." in name:
            _, _, layer, inner = name.removesuffix(".weight").split(".", 3)
            name = f"blk.{layer}.{_LAYER[inner][0]}.weight"
        else:
            name = "token_embd.weight" if "embed" in name else "output_norm.weight"
        kind = kinds[number % 3] if values.ndim == 2 else None
        if kind is None:
            writer.add_tensor(name, values)
        else:
            quants = gguf.quants.quantize(values, kind)
            writer.add_tensor(name, quants, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def pickled_text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def _whole(value: int) -> bytes:
    return b"J" + value.to_bytes(4, "little")


def tensor_steps(key: str, count: int, size: tuple[int, ...], kind: str = "FloatStorage") -> bytes:
    """The steps of a pickle that make a tensor, as torch writes them."""
    strides = [int(np.prod(size[i + 1 :])) for i in range(len(size))]
    sizes, steps = (b"(" + b"".join(map(_whole, side)) + b"t" for side in (size, strides))
    storage = b"(" + pickled_text("storage") + f"ctorch\n{kind}\n".encode() + pickled_text(key)
    storage += pickled_text("cpu") + _whole(count) + b"tQ"
    head = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _whole(0) + sizes + steps
    return head + b"\x89ccollections\nOrderedDict\n)RtR"


def pickled_weights() -> bytes:
    steps = b"\x80\x02ccollections\nOrderedDict\n)R("
    steps += pickled_text("conv.weight") + tensor_steps("0", 30, (6, 5))
    steps += pickled_text("conv.bias") + tensor_steps("1", 7, (7,), "HalfStorage")
    steps += pickled_text("epoch") + _whole(7) + pickled_text("opt") + b"(" + b"N\x88K\x01tu."
    return steps


STORAGES = {"0": _random(30).tobytes(), "1": _random(7).astype(np.float16).tobytes()}
MERGES = gzip.compress(b"#version\na b\nc d\nab cd\n", mtime=0)


def archive(data: bytes, storages: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive as torch writes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", "little")
        for key, value in storages.items():
            file.writestr(f"archive/data/{key}", value)
    return out.getvalue()


@functools.cache
def torch_zip() -> bytes:
    return archive(pickled_weights(), STORAGES)


@functools.cache
def torch_legacy() -> bytes:
    start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True, "protocol_version": 1001}]
    parts = [pickle.dumps(value, protocol=2) for value in start] + [pickled_weights()]
    parts.append(pickle.dumps(sorted(STORAGES), protocol=2))
    for key in sorted(STORAGES):
        count = len(STORAGES[key]) // (4 if key == "0" else 2)
        parts += [count.to_bytes(8, "little"), STORAGES[key]]
    return b"".join(parts)


@functools.cache
def numpy_pickles() -> tuple[bytes, ...]:
    value = {"params": {"Conv_0": {"kernel": _random(3, 3, 2, 4), "bias": _random(4)}}, "step": 3}
    return tuple(pickle.dumps(value, protocol=protocol) for protocol in (2, 3, 4, 5))


@functools.cache
def npz_files() -> tuple[bytes, ...]:
    out = []
    for write in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        write(file, basis=_random(3, 4), tokens=np.arange(3), entropy=np.float64(1.5))
        out.append(file.getvalue())
    return tuple(out)


@functools.cache
def npy_file() -> bytes:
    file = io.BytesIO()
    np.save(file, _random(3, 4))
    return file.getvalue()


@functools.cache
def pictures() -> dict[str, bytes]:
    pixels = (np.random.default_rng(0).random((20, 24, 4)) * 255).astype(np.uint8)
    rgb, rgba = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels)
    grey = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    forms = {
        **{"rgb.png": (rgb, "PNG"), "rgba.png": (rgba, "PNG"), "grey.png": (grey, "PNG")},
        **{"a.jpg": (rgb, "JPEG"), "palette.png": (rgb.convert("P"), "PNG")},
        **{"gif.png": (rgb, "GIF"), "bmp.jpg": (rgb, "BMP"), "webp.jpg": (rgb, "WEBP")},
    }
    out = {}
    for name, (picture, form) in forms.items():
        file = io.BytesIO()
        picture.save(file, form)
        out[name] = file.getvalue()
    return out

"""Files written by hand that want more memory, time or rights than a file may have."""

# ruff: noqa: E501  a header is one line

import functools
import gzip
import io
import json
import pickle
import zipfile
import zlib
from typing import Any

from tests.rigs._files_bases import (
    CONFIGS,
    LLAMA,
    STORAGES,
    TABLE,
    archive,
    pickled_text,
    pickled_weights,
    tensor_steps,
)
from tests.rigs._files_mutate import deep


def _steps(count: int) -> bytes:
    """A list of itself twice, so often: a kilobyte that never ends."""
    steps = b"\x80\x02]q\x00"
    for level in range(count):
        steps += b"]q" + bytes([level + 1]) + b"(h" + bytes([level]) + b"h" + bytes([level]) + b"e"
    return steps + b"."


def _huge(key: bytes = b"0") -> bytes:
    return b"\x80\x02}" + pickled_text("w") + tensor_steps("0", 1 << 29, (1 << 29,)) + b"s."


@functools.cache
def pickle_bombs() -> list[bytes]:
    """For every reader of pickles."""
    call = b"\x80\x02cos\nsystem\n" + pickled_text("touch ran") + b"\x85R."
    tuples = b"\x80\x02K\x01\x85q\x00" + b"".join(
        b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200)
    )
    listed = b"\x80\x02]q\x00(" + b"N" * 90_000 + b"e"
    copies = b"ctorch\nSize\nq\x01h\x00\x85R" + b"h\x01h\x00\x85R" * 20_000
    return [
        call,
        call.replace(b"cos\nsystem", b"cbuiltins\neval"),
        b"\x80\x02c__builtin__\nexec\n(X\x01\0\0\0xtR.",
        _steps(200),
        _steps(50),
        tuples + b"}h\xc8N\x73.".replace(b"h\xc8", b"h\xc7"),
        tuples + b"\x8f(h\xc7\x90.",
        listed + copies + b".",
        b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        b"\x80\x02" + b"(" * 400_000,
        b"\x80\x02" + b"}" * 400_000 + b".",
        b"\x80\x02" + b"N2" * 900_000 + b".",
        b"\x80\x02Nr\xff\xff\xff\x7f0.",
        b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"x.",
        b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        b"\x80\x05\x8e" + (1 << 40).to_bytes(8, "little") + b".",
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"I" + b"9" * 60_000 + b"\n.",
        b"\x80\x02ccollections\nOrderedDict\n(](" + b"N" * 1000 + b"eetR.",
        b"\x80\x02cargparse\nNamespace\n)\x81}(" + pickled_text("__class__") + b"NubK\x01b.",
        b"\x80\x02c__torch__.os\nsystem\n)\x81" + pickled_text("touch ran") + b"b.",
        b"\x80\x02" + b"X\xff\xff\xff\xff",
        b"\x80\x02(lp0\n(lp1\n" + b"g0\na" * 9,
        b"\x80\x02]q\x00h\x00a.",
    ]


@functools.cache
def zip_bombs() -> list[bytes]:
    """Archives that grow, overlap or lie about themselves."""
    zeros = bytes(1 << 20) * 300
    bomb = archive(_huge(), {"0": zeros}, zipfile.ZIP_DEFLATED)
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as file:
        for number in range(20_000):
            file.writestr(f"archive/{number}", b"")
    # One member under many names: each entry of the directory points at the first.
    one = archive(pickled_weights(), {"0": bytes(1 << 20), "1": STORAGES["1"]})
    at = one.rindex(b"PK\x05\x06")
    start = int.from_bytes(one[at + 16 : at + 20], "little")
    entry = next(e for e in one[start:at].split(b"PK\x01\x02") if b"data/0" in e)
    extra = b"".join(
        b"PK\x01\x02" + entry.replace(b"data/0", b"d%05d" % i)[: len(entry)] for i in range(3000)
    )
    directory = one[start:at] + extra
    count = (one.count(b"PK\x01\x02") + 3000).to_bytes(2, "little")
    overlap = one[:start] + directory + b"PK\x05\x06" + bytes(4) + count * 2
    overlap += len(directory).to_bytes(4, "little") + start.to_bytes(4, "little") + bytes(2)
    begin = b"\x80\x02](" + tensor_steps("0", 1 << 18, (1 << 18,))
    shared = begin + tensor_steps("0", 1 << 18, (512, 511)) * 3000 + b"e."
    rows = (tensor_steps("0", 1 << 18, (200, n)) for n in range(200, 1300))
    differing = b"\x80\x02](" + b"".join(rows) + b"e."
    flags = b"PK\x01\x02\x14\x03\x14\x00"
    return [
        bomb,
        many.getvalue(),
        overlap,
        archive(_huge(), {"0": b"abcd"}),
        archive(shared, {"0": bytes(1 << 20)}),
        archive(differing, {"0": bytes(1 << 20)}),
        archive(pickled_weights(), STORAGES).replace(flags + b"\x00", flags + b"\x01"),
        archive(b"\x80\x02" + b"N0" * 9_000_000 + b"N.", {}, zipfile.ZIP_DEFLATED),
        *(archive(data, STORAGES) for data in pickle_bombs()),
    ]


@functools.cache
def npz_bombs() -> list[bytes]:
    """Arrays of zeros that take a thousandth of themselves, and claims that nothing backs."""
    out = []
    head = b"\x93NUMPY\x01\x00"
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000,), }\n"
    claim = head + len(text).to_bytes(2, "little") + text
    for contents, how in (
        ({"a.npy": claim + bytes(300 << 20)}, zipfile.ZIP_DEFLATED),
        ({"a.npy": claim}, zipfile.ZIP_STORED),
        ({f"{i}.npy": claim + bytes(30 << 20) for i in range(8)}, zipfile.ZIP_DEFLATED),
        ({"a.npy": head + b"\xff\xff" + b"(" * 65_535}, zipfile.ZIP_STORED),
        ({"a.npy": b""}, zipfile.ZIP_STORED),
        ({"a.npy": pickle.dumps([1])}, zipfile.ZIP_STORED),
    ):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", how) as archive_:
            for name, content in contents.items():
                archive_.writestr(name, content)
        out.append(file.getvalue())
    return [*out, *zip_bombs()[:3]]


def _st(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@functools.cache
def safetensors_bombs() -> list[bytes]:
    """Headers that are no objects, too deep, too long; tensors that overlap or are nowhere."""

    def one(shape: Any, offsets: Any, dtype: Any = "F32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": offsets}

    long = b"[" + b"[]," * 3_000_000 + b"[]]"
    headers = ([], "x", 3, None, b"[" * 100_000, b'{"a":' * 100_000, deep(900))
    tensors = [
        *((one([-4], [0, 16]), 16), (one([4], [-16, 0]), 16), (one([1 << 40] * 2, [0, 16]), 16)),
        *((one([0, 1 << 62], [0, 0]), 0), (one([], [0, 4]), 4), (one([1.5], [0, 6]), 6)),
        *((one([True], [0, 4]), 4), (one([1] * 100_000, [0, 4]), 4), (None, 0), ({}, 0)),
        *((one([4], [16, 0]), 16), (one("4", [0, 16]), 16), (one([4], [0, 16], []), 16)),
        (one([4], "ab"), 16),
    ]
    return [
        *map(_st, headers),
        *(b"\xff" * 8 + b"{}", b"\xff" * 7 + b"\x7f{}", (1 << 30).to_bytes(8, "little") + b"{}"),
        *(b"", b"\0" * 8),
        _st({"a": one([4], [0, 16]), "b": one([4], [8, 24])}, bytes(24)),
        *(_st({"a": tensor}, bytes(size)) for tensor, size in tensors),
        *(_st(b" " * (1 << 26)), _st(long), _st(b'{"a":"' + b"x" * (1 << 25) + b'"}')),
        _st({f"{i}": one([0], [0, 0]) for i in range(50_000)}),
        _st({"a": one([4], [0, 16])} | {"__metadata__": deep(60)}, bytes(16)),
        *(_st(b"{" + b'"a":1,' * 900_000 + b'"b":2}'), _st(b"9" * 100_000), _st(b"\xff\xfe{}")),
    ]


@functools.cache
def gguf_bombs() -> list[bytes]:
    """Lengths, counts, alignments and offsets that no file has."""

    def q(number: int) -> bytes:
        return (number % (1 << 64)).to_bytes(8, "little")

    def i(number: int) -> bytes:
        return number.to_bytes(4, "little")

    def text(value: str) -> bytes:
        return q(len(value)) + value.encode()

    def file(tensors: bytes, count: int, entries: list[bytes], tail: bytes = b"") -> bytes:
        return b"GGUF" + i(3) + q(count) + q(len(entries)) + b"".join(entries) + tensors + tail

    def tensor(
        dims: list[int], kind: int = 0, at: int = 0, name: str = "token_embd.weight"
    ) -> bytes:
        return text(name) + i(len(dims)) + b"".join(map(q, dims)) + i(kind) + q(at)

    name = text("general.architecture") + i(8) + text("llama")
    arrays = text("x") + i(9) + i(9) + q(1) + i(9) + q(1)
    nested = text("x") + i(9) + (i(9) + q(1)) * 100_000 + i(0) + q(0)
    pad = bytes(4096)
    align, aligned = text("general.alignment"), [(4, i(0)), (4, i(1)), (4, i(3)), (10, q(1 << 62))]
    aligned += [(5, b"\xff" * 4), (8, text("32")), (6, b"\0" * 4)]
    shapes: list[Any] = [([1 << 40, 1 << 40],), ([0],), ([],), ([32, -1],), ([31, 4], 2)]
    shapes += [([32, 4], 77), ([32, 4], 0, 1 << 62), ([32, 4], 0, (1 << 64) - 32), ([1 << 62],)]
    shapes += [([1] * 4, 0, 4096)]
    words = text("tokenizer.ggml.tokens") + i(9) + i(8) + q(3_000_000) + q(0) * 3_000_000
    return [
        b"",
        b"GGUF",
        b"GGUF" + i(3) + b"\xff" * 16,
        b"GGUF" + i(3) + q(0) + b"\xff" * 8 + pad,
        b"GGUF" + i(3) + q(1 << 40) + q(0) + pad,
        file(b"", 0, [q(1 << 62) + b"x"]),
        file(b"", 0, [q(-1) + b"x" * 99]),
        file(b"", 0, [text("x") + i(9) + i(0) + q(1 << 40)]),
        file(b"", 0, [text("x") + i(9) + i(8) + q(1 << 40)]),
        file(b"", 0, [arrays]),
        file(b"", 0, [nested]),
        file(b"", 0, [text("x") + i(99)]),
        file(b"", 0, [text("x") + i(9) + i(77) + q(1)]),
        *(file(tensor([32, 4]), 1, [name, align + i(k) + value], pad) for k, value in aligned),
        *(file(tensor(*given), 1, [name], pad) for given in shapes),
        file(text("x") + i(1 << 30), 1, [name], pad),
        file(tensor([32, 4]) * 2, 2, [name], pad),
        file(tensor([32, 4]) + tensor([32, 4], name="b"), 2, [name], pad),
        file(b"", 0, [name] * 2),
        file(b"", 0, [name], pad),
        file(b"", 0, [name, words]),
        file(b"", 0, [name, text("x") + i(9) + i(0) + q(60 << 20) + bytes(60 << 20)]),
        file(b"", 0, [name, text("x") + i(8) + q(100 << 20) + bytes(100 << 20)]),
        *(
            file(tensor([32, 257]), 1, [name, *sizes], bytes(32 * 257 * 4 + 64))
            for sizes in _gguf_sizes(text, i, q)
        ),
    ]


def _gguf_sizes(text: Any, i: Any, q: Any) -> list[list[bytes]]:
    keys = ("embedding_length", "attention.head_count", "block_count")
    keys += ("feed_forward_length", "context_length")
    good = dict(zip(keys, (32, 4, 2, 64, 128), strict=True))
    epsilon = text("llama.attention.layer_norm_rms_epsilon") + i(6) + b"\xac\xc5\x27\x37"
    out = []
    for key in keys:
        for value in (0, 1_000_000, (1 << 32) - 1):
            sizes = good | {key: value}
            out.append([*(text(f"llama.{k}") + i(4) + i(v) for k, v in sizes.items()), epsilon])
    return out


@functools.cache
def picture_bombs() -> list[tuple[str, bytes]]:
    """Pictures of gigapixels in kilobytes, lines of pixels, and what is no picture."""

    def png(width: int, height: int, kind: int = 2, rows: int = 0, extra: bytes = b"") -> bytes:
        def chunk(name: bytes, content: bytes) -> bytes:
            crc = zlib.crc32(name + content).to_bytes(4, "big")
            return len(content).to_bytes(4, "big") + name + content + crc

        head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, kind, 0, 0, 0])
        channels = {0: 1, 2: 3, 6: 4}[kind]
        data = zlib.compress(bytes((width * channels + 1) * rows), 9)
        parts = [chunk(b"IHDR", head), extra, chunk(b"IDAT", data), chunk(b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    text = zlib.compress(bytes(100 << 20), 9)
    body = b"zTXt" + b"a\0\0" + text
    bomb = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    drawn: Any = ((65_535, 65_535), (30_000, 30_000, 0, 1), (13_000, 13_000, 0, 13_000))
    drawn += ((7000, 7000, 6, 7000), (8000, 8000, 2, 8000), (1, 1_000_000, 0, 1_000_000))
    drawn += ((1_000_000, 1, 2, 1), (20, 20, 2, 20, bomb), (0, 0))
    script = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n(ran) (w) file closefile\nshowpage\n"
    )
    jpeg = b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01\xff\xd9"
    gif = b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;"
    bmp = b"BM" + bytes(12) + b"(\0\0\0" + b"\xff\xff\xff\x7f" * 2 + b"\x01\0\x18\0" + bytes(24)
    others = (("png", b""), ("jpg", script), ("png", b"\x0aPCX"), ("jpg", jpeg), ("png", gif))
    pictures = [("png", png(*sizes)) for sizes in drawn] + [*others, ("png", bmp)]
    return [(f"a.{form}", content) for form, content in pictures]


@functools.cache
def config_bombs() -> list[Any]:
    """Sizes and forms that no configuration has, as values or as bytes."""
    texts = (b"", b"[" * 100_000, b'{"a":' * 100_000, b"{", b"\xff\xfe")
    out: list[Any] = [[], "x", 3, None, {}, *texts, deep(900)]
    large = (1_000_000, 10**12, 10**400, -1, 0, 1e308, "9", [2], {}, True, 2.5)
    for base in CONFIGS[:5]:
        out += [base | {key: value} for key in TABLE["sizes"] for value in large]
    for key in ("n_layer", "n_embd", "n_head", "n_inner", "n_positions"):
        out += [CONFIGS[5] | {key: value} for value in (1_000_000, 10**12, -1, 0, "x")]
    lists = {"rope_type": "longrope", "short_factor": 3, "long_factor": None}
    zero = {"rope_type": "yarn", "factor": 0}
    kinds = [{"rope_type": kind} for kind in ([], "linear", "llama3")]
    scalings = ([], "x", kinds[0], zero, kinds[1], lists, kinds[2])
    out += [LLAMA | {"rope_scaling": value} for value in scalings]
    layers = (3, ["x"], ["full_attention"] * 99_999, None, [[]])
    return out + [CONFIGS[2] | {"layer_types": value} for value in layers]


@functools.cache
def gzip_bombs() -> list[bytes]:
    whole, cut = gzip.compress(bytes(300 << 20), 9), gzip.compress(b"#v\na b\n")[:-9]
    return [whole, cut, b"\x1f\x8b", b"\xff\xfe"]


@functools.cache
def index_maps() -> list[Any]:
    """Names that a weight map must not have."""
    wrong = ([], 3, None, {}, {"a": None}, {"a": ["x"]}, {"a": {}}, "x")
    maps = [*({"a.weight": name} for name in TABLE["paths"]), *wrong]
    many = {f"{i}": f"{i}.safetensors" for i in range(50_000)}
    return [*({"weight_map": value} for value in maps), [], "x", {}, {"weight_map": many}]

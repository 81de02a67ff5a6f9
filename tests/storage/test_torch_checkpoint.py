"""Torch files without torch: what is read, and what is refused before it can run."""

import collections
import contextlib
import dataclasses
import io
import os
import pathlib
import pickle
import tracemalloc
import zipfile

import chex
import ml_dtypes
import numpy as np
import pytest

from logitjax.storage import _torch_checkpoint
from logitjax.storage._pickles import Dtype
from logitjax.storage._torch_checkpoint import read_torch_checkpoint
from logitjax.storage.weights import read_state_dict

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_reads_what_torch_wrote(name):
    content = read_torch_checkpoint(GOLDENS / name)
    assert content["epoch"] == 240
    assert content["opt"] == {"learning_rate": 0.05}
    assert content["best_acc"] == 72.5
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    weights = read_state_dict(GOLDENS / name)
    np.testing.assert_array_equal(weights["plain"], base)
    np.testing.assert_array_equal(weights["transposed"], base.T)
    np.testing.assert_array_equal(weights["slice"], base[1:, ::2])
    np.testing.assert_array_equal(weights["parameter"], base[0])
    np.testing.assert_array_equal(weights["bfloat16"].astype(np.float32), base)
    assert weights["bfloat16"].dtype == ml_dtypes.bfloat16
    assert weights["count"] == 7


class Call:
    """Pickles to a call of a function with arguments."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def archive(path: pathlib.Path, data: bytes, storages: dict[str, bytes] | None = None):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        for key, value in (storages or {}).items():
            file.writestr(f"archive/data/{key}", value)
    return path


@pytest.mark.parametrize(
    "content",
    [
        lambda mark: Call(os.system, f"touch {mark}"),
        lambda mark: {"weights": Call(eval, f"open({str(mark)!r}, 'w')")},
        lambda mark: Call(__import__, "os"),
        lambda mark: collections.OrderedDict(a=Call(pathlib.Path.touch, mark)),
        lambda mark: Call(np.load, str(mark)),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_calls_something_is_refused(tmp_path, content, legacy):
    mark, path = tmp_path / "ran", tmp_path / "bad.pth"
    data = pickle.dumps(content(mark), protocol=2)
    if legacy:
        machine = {"little_endian": True}
        start = [_torch_checkpoint._LEGACY_MAGIC, _torch_checkpoint._LEGACY_PROTOCOL, machine]
        path.write_bytes(b"".join(pickle.dumps(x, protocol=2) for x in start) + data)
    else:
        archive(path, data)
    with pytest.raises(ValueError, match="not allowed"):
        read_torch_checkpoint(path)
    assert not mark.exists()


class FloatStorage:
    """Pickled by name, which the test then changes to torch's."""


def tensor(storage: tuple, offset, size, stride) -> bytes:
    """A pickled tensor, with a storage reference as torch writes it."""

    class Reference:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return storage if isinstance(value, Reference) else None

        def reducer_override(self, value):
            if isinstance(value, Call):
                return value.__reduce__()
            return NotImplemented

    out = io.BytesIO()
    Pickler(out, protocol=2).dump(
        {"w": Call(_torch_checkpoint._Tensor, Reference(), offset, size, stride, False, None)}
    )
    data = out.getvalue()
    for mine, of_torch in (
        (b"clogitjax.storage._torch_checkpoint\n_Tensor\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
        (b"ctests.storage.test_torch_checkpoint\nFloatStorage\n", b"ctorch\nFloatStorage\n"),
    ):
        assert mine in data
        data = data.replace(mine, of_torch)
    return data


def test_parts_of_a_storage_are_copies_and_counted_and_the_whole_is_neither(tmp_path, monkeypatch):
    # Nothing may be copied.
    limits = dataclasses.replace(_torch_checkpoint.guard.LIMITS, free_expansion=0)
    monkeypatch.setattr(_torch_checkpoint.guard, "LIMITS", limits)
    monkeypatch.setattr(_torch_checkpoint, "_SHARED", 0)
    data = {"0": np.arange(4, dtype="f4").tobytes()}

    def read(size):
        content = tensor(("storage", FloatStorage, "0", "cpu", 4), 0, size, (1,))
        return read_torch_checkpoint(archive(tmp_path / "t.pth", content, data))

    np.testing.assert_array_equal(read((4,))["w"], np.arange(4))
    with pytest.raises(ValueError, match="repeat their storages more than 0 bytes long"):
        read((3,))
    # Once what the storages take may be.
    monkeypatch.setattr(_torch_checkpoint, "_SHARED", 1)
    np.testing.assert_array_equal(read((3,))["w"], np.arange(3))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (5,), (1,)),
        (3, (2,), (1,)),
        (0, (2, 2), (4, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
        (0, (1 << 40, 4), (0, 1)),
    ],
)
def test_views_beyond_their_storage_are_refused(tmp_path, offset, size, stride):
    storage = ("storage", FloatStorage, "0", "cpu", 4)
    path = archive(
        tmp_path / "t.pth",
        tensor(storage, offset, size, stride),
        {"0": np.zeros(4, "f4").tobytes()},
    )
    with pytest.raises(ValueError, match=r"storage|strides|offset"):
        read_torch_checkpoint(path)


def test_damaged_files_are_named(tmp_path):
    whole = (GOLDENS / "zip.pth").read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path = tmp_path / "damaged.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.pth"):
            read_torch_checkpoint(path)
    legacy = (GOLDENS / "legacy.pth").read_bytes()
    path.write_bytes(legacy[:-8])
    with pytest.raises(ValueError, match="truncated"):
        read_torch_checkpoint(path)


def flipped(whole: bytes, rng: np.random.Generator, count: int) -> bytes:
    content = bytearray(whole)
    for offset in rng.integers(len(whole), size=count):
        content[offset] ^= 1 << int(rng.integers(8))
    return bytes(content)


def test_an_archive_with_flipped_bytes_is_refused_or_reads_as_it_was(tmp_path):
    whole, path = (GOLDENS / "zip.pth").read_bytes(), tmp_path / "flipped.pth"
    expected = read_torch_checkpoint(GOLDENS / "zip.pth")
    rng, refused = np.random.default_rng(0), []
    for number in range(60):
        path.write_bytes(flipped(whole, rng, 1 + number % 3))
        try:
            content = read_torch_checkpoint(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            chex.assert_trees_all_equal(content, expected)
    assert all("flipped.pth" in message for message in refused)
    # The rest fell into names and times of the archive, which say nothing of the content.
    assert len(refused) > 30


def test_flipped_bytes_of_the_older_form_end_as_errors_or_as_a_reading(tmp_path):
    # There are no checksums in it: a number that was changed comes back changed.
    whole, path = (GOLDENS / "legacy.pth").read_bytes(), tmp_path / "flipped.pth"
    rng = np.random.default_rng(0)
    for number in range(60):
        path.write_bytes(flipped(whole, rng, 1 + number % 3))
        with contextlib.suppress(ValueError):
            read_torch_checkpoint(path)


def test_the_frame_of_the_older_form_is_checked(tmp_path):
    whole, path = (GOLDENS / "legacy.pth").read_bytes(), tmp_path / "frame.pth"
    count = whole.rindex((12).to_bytes(8, "little") + np.float32(0).tobytes())
    for content in (
        whole.replace(b"\x8a\nl\xfc", b"\x8a\nl\xfd", 1),
        whole.replace(b"M\xe9\x03.", b"M\xe8\x03.", 1),
        whole.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89", 1),
        whole[:count] + (11).to_bytes(8, "little") + whole[count + 8 :],
        whole + b"\0",
    ):
        assert content != whole
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"frame\.pth"):
            read_torch_checkpoint(path)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02Nr\xff\xff\xff\x7f0.",  # a place 2^31 of what is remembered
        b"\x80\x05\x96" + (1 << 33).to_bytes(8, "little") + b"x.",  # bytes that do not follow
    ],
)
def test_memory_is_not_taken_for_what_a_file_only_claims(tmp_path, data):
    path = archive(tmp_path / "large.pth", data)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"large\.pth"):
        read_torch_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_an_archive_in_an_unknown_order_of_bytes_is_refused(tmp_path):
    data = tensor(("storage", FloatStorage, "0", "cpu", 4), 0, (4,), (1,))
    values = np.arange(4, dtype=">f4")
    path = archive(tmp_path / "big.pth", data, {"0": values.tobytes()})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", b"big")
    np.testing.assert_array_equal(read_torch_checkpoint(path)["w"], values)
    path = archive(tmp_path / "odd.pth", data, {"0": values.tobytes()})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/byteorder", b"middle")
    with pytest.raises(ValueError, match="order of bytes"):
        read_torch_checkpoint(path)


@pytest.mark.parametrize("state", [(), (3, "?", None), "<", (3,)])
def test_a_numpy_type_with_another_state_is_refused(state):
    with pytest.raises(ValueError, match="state"):
        Dtype("f8").set_state(state)


def test_numpy_types_keep_their_order_of_bytes():
    dtype = Dtype("f8")
    dtype.set_state((3, ">", None))
    assert dtype.dtype == np.dtype(">f8")

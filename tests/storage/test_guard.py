"""Refused demands of files: more than they have, more than the limits, other folders."""

import dataclasses
import gzip
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest

from logitjax import storage
from logitjax.storage import _guard as guard
from logitjax.storage.weights import (
    SafetensorsSource,
    read_npy,
    read_npz,
    read_numpy_pickle,
    read_state_dict,
)


def refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def safetensors(path, header, data: bytes = b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ([], "header: expected an object, got list"),
        (b"[" * 5000, "nested 5000 deep, expected at most 64"),
        ({"a": entry([-2], [0, 8])}, "tensor 'a': shape: expected a whole number from 0"),
        ({"a": entry([2], [-8, 0])}, "tensor 'a': data_offsets: expected a whole number from 0"),
        ({"a": entry([2], [8, 0])}, "tensor 'a': data_offsets: 8 is behind 0"),
        ({"a": entry([2], [0, 8]), "b": entry([2], [4, 12])}, "'b' overlaps tensor 'a'"),
        ({"a": entry([1 << 40, 1 << 40], [0, 8])}, "tensor 'a': shape"),
        ({"a": entry([0, 1 << 62], [0, 0])}, "tensor 'a': shape"),
        ({"a": 3}, "tensor 'a': expected dtype, shape and data_offsets"),
    ],
)
def test_a_header_of_safetensors_is_checked_before_its_tensors(tmp_path, header, message):
    path = safetensors(tmp_path / "model.safetensors", header, bytes(16))
    refused(lambda: SafetensorsSource(path), rf"model\.safetensors: .*{message}")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "link.safetensors", "..", "", "pipe", 3]
)
def test_an_index_names_files_of_its_directory_only(tmp_path, name):
    home = tmp_path / "model"
    home.mkdir()
    safetensors(tmp_path / "secret.safetensors", {"a": entry([2], [0, 8])}, bytes(8))
    os.symlink(tmp_path / "secret.safetensors", home / "link.safetensors")
    os.mkfifo(home / "pipe")
    index = home / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    refused(lambda: SafetensorsSource(home), r"index\.json: .*")


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    blobs, home = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    home.mkdir(parents=True)
    safetensors(blobs / "0123", {"a": entry([2], [0, 8])}, np.ones(2, "f4").tobytes())
    os.symlink("../../blobs/0123", home / "a.safetensors")
    index = {"weight_map": {"a": "a.safetensors"}}
    (home / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(SafetensorsSource(home).read("a"), [1, 1])


def test_a_pickle_that_repeats_itself_ends(tmp_path, monkeypatch):
    limits = dataclasses.replace(guard.LIMITS, opcodes=4000, elements=4000)
    monkeypatch.setattr(guard, "LIMITS", limits)
    path = tmp_path / "weights.ckpt"
    value, key = [np.ones(2)], (1,)
    for _ in range(150):  # a kilobyte that says it twice, 150 times over
        value = [value, value]
    for _ in range(15):
        key = (key, key)
    path.write_bytes(pickle.dumps(value))
    tree = read_numpy_pickle(path)
    assert tree[0] is tree[1]
    # As a key it would be hashed leaf by leaf.
    path.write_bytes(pickle.dumps({key: 1}))
    refused(lambda: read_numpy_pickle(path), "a key that is a tuple")
    path.write_bytes(b"\x80\x02" + b"N0" * 2001 + b"N.")
    refused(lambda: read_numpy_pickle(path), "expected at most 4000 steps")
    # A list that is remembered may be copied by four bytes each time.
    steps = b"\x80\x02]q\x00(" + b"]" * 900 + b"eccollections\nOrderedDict\nq\x01"
    path.write_bytes(steps + b"h\x01h\x00\x85R" * 300 + b".")
    refused(lambda: read_numpy_pickle(path), "copies more than 4000")


def test_a_list_that_holds_itself_is_refused_and_one_that_comes_twice_is_one(tmp_path):
    path, twice = tmp_path / "a.ckpt", [np.ones(2)]
    path.write_bytes(pickle.dumps({"a": twice, "b": twice}))
    tree = read_numpy_pickle(path)
    assert tree["a"] is tree["b"]
    twice.append(twice)
    path.write_bytes(pickle.dumps(twice))
    refused(lambda: read_numpy_pickle(path), "contains itself")


def _zip(contents, how=zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return file.getvalue()


def test_compressed_members_may_grow_so_far(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "LIMITS", dataclasses.replace(guard.LIMITS, free_expansion=1 << 12))
    content = _zip({"a": bytes(1 << 20)})
    refused(lambda: guard.open_zip(io.BytesIO(content)), "its members: .* bytes grow to")
    refused(lambda: guard.gunzip(gzip.compress(bytes(1 << 20)), "merges"), "merges: .*grow")
    assert guard.gunzip(gzip.compress(b"ab" * 99), "merges") == b"ab" * 99
    # One member under many names is read many times.
    content = _zip({"a": bytes(1000), "b": b""}, zipfile.ZIP_STORED)
    at, end = content.index(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    one = content[at : content.index(b"PK\x01\x02", at + 1)]
    entries = b"".join(one[:-1] + bytes([65 + i]) for i in range(9))
    tail = content[end : end + 8] + bytes([9, 0, 9, 0]) + len(entries).to_bytes(4, "little")
    tail += at.to_bytes(4, "little") + bytes(2)
    refused(lambda: guard.open_zip(io.BytesIO(content[:at] + entries + tail)), "members overlap")


def test_arrays_have_the_bytes_of_their_shapes(tmp_path):
    path, arrays = tmp_path / "a.npz", {"basis": np.arange(6.0).reshape(2, 3).T, "n": np.int32(3)}
    np.savez_compressed(path, **arrays)
    for name, array in read_npz(path).items():
        np.testing.assert_array_equal(array, arrays[name])
    np.save(tmp_path / "a.npy", arrays["basis"])
    for mapped in (False, True):
        np.testing.assert_array_equal(read_npy(tmp_path / "a.npy", mapped=mapped), arrays["basis"])
    content = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(content.replace(b"(3, 2)", b"(3, 9)"))
    refused(lambda: read_npy(tmp_path / "a.npy", mapped=True), r"a\.npy: .*not its shape \(3, 9\)")
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    refused(lambda: read_npy(tmp_path / "a.npy"), r"a\.npy: .*plain numbers, got object")


def test_tensors_that_share_a_storage_are_copied_so_often(tmp_path, monkeypatch):
    from tests.storage.test_torch_checkpoint import FloatStorage, archive, tensor

    data = tensor(("storage", FloatStorage, "0", "cpu", 4), 0, (4,), (1,))
    path = archive(tmp_path / "w.pth", data, {"0": np.arange(4, dtype="f4").tobytes()})
    np.testing.assert_array_equal(read_state_dict(path)["w"], np.arange(4))
    limits = dataclasses.replace(guard.LIMITS, pickle_bytes=len(data) - 1)
    monkeypatch.setattr(guard, "LIMITS", limits)
    refused(lambda: read_state_dict(path), r"w\.pth: .*data\.pkl: expected a whole number")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 99, "nested 99 deep"),
        ('{"a": ' * 2000, "nested 2000 deep"),
        ("[" + "[]," * 5000 + "[]]", "expected at most 4000 values"),
        ("[]", "expected an object, got"),
        ("{", "not valid JSON"),
    ],
)
def test_json_is_measured_before_it_is_parsed(tmp_path, monkeypatch, text, message):
    monkeypatch.setattr(guard, "LIMITS", dataclasses.replace(guard.LIMITS, elements=4000, depth=64))
    path = tmp_path / "a.json"
    path.write_text(text)
    if "values" in message or "deep" in message:
        refused(lambda: guard.parse_json(text.encode()), message)
    else:
        refused(lambda: storage.read_json(path, form=dict), rf"a\.json: {message}")
    # Brackets in texts are no lists.
    assert guard.parse_json(json.dumps(["[" * 99]).encode()) == ["[" * 99]

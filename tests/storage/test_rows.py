"""The row cache with a codec of one's own; what teachers and encoders keep is tested with them."""

import time

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from logitjax import storage
from logitjax.storage import ArrayCodec, RowCache
from logitjax.storage._shards import ShardReader, write_shards

CODEC = ArrayCodec(
    {"x": (ml_dtypes.bfloat16, (2, 3)), "label": (np.uint16, ()), "y": ("float32", (1,))}
)
MADE = {"data": "d", "model": "m"}


def compute(rows):
    x = np.random.default_rng(0).normal(size=(100, 2, 3))[rows]
    return {"x": x, "label": rows, "y": rows[:, None] / 2}


def test_rows_come_back_as_they_were_kept(tmp_path):
    cache = RowCache(tmp_path, CODEC, made_from=MADE)
    cache.fill([7, 3, 40], compute, batch_size=2)
    got, want = cache.read([40, 3, 3]), compute(np.array([40, 3, 3]))
    np.testing.assert_array_equal(got["x"], want["x"].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(got["label"], [40, 3, 3])
    np.testing.assert_array_equal(got["y"], want["y"])
    assert cache.read([])["x"].shape == (0, 2, 3)
    assert CODEC.bytes_per_row == 12 + 2 + 4


def test_what_another_process_has_written_is_seen_and_not_computed_again(tmp_path):
    one, two = (RowCache(tmp_path, CODEC, made_from=MADE) for _ in range(2))
    one.fill(range(4), compute, batch_size=2, rows_per_shard=2)
    seen = []
    two.fill(range(6), lambda rows: seen.extend(rows) or compute(rows), batch_size=2)
    assert sorted(seen) == [4, 5]
    assert two.row_numbers.tolist() == list(range(6))


def test_what_is_left_to_compute_is_counted_and_said_every_ten_seconds(
    tmp_path, monkeypatch, caplog
):
    now, codec = 0.0, ArrayCodec({"label": (np.uint16, ())})
    codec.bytes_per_row = 2_000_000
    monkeypatch.setattr(time, "monotonic", lambda: now)
    cache = RowCache(tmp_path, codec, made_from=MADE)
    cache.add([9], {"label": np.array([9])})

    def slow(rows):
        nonlocal now
        now += 5.0
        return {"label": rows}

    rows = [0, 1, 2, 3, 4, 9, 20]
    assert cache.calls(rows, batch_size=2) == 3
    with caplog.at_level("INFO", "absl"):
        cache.fill(rows, slow, batch_size=1, label="x")
    # A batch is noted once the next one is on its way.
    assert [record.getMessage() for record in caplog.records] == [
        "x: 6 rows to read, 12.0 MB (all 7 rows: 14.0 MB)",
        *(f"x: {count} of 6 rows read" for count in (2, 5, 6)),
    ]
    assert cache.calls(rows, batch_size=2) == 0
    codec.bytes_per_row = 2
    assert cache.read(rows)["label"].tolist() == rows


def test_integers_that_a_type_does_not_hold_are_refused():
    codec = ArrayCodec({"x": (np.int8, ())})
    for values in ([-128, 127], [True, False], np.array([1, 2], np.int8)):
        records = codec.encode({"x": np.array(values)}, 2)
        assert codec.decode(records)["x"].tolist() == list(values)
    for wrong in (-129, 128):
        with pytest.raises(ValueError, match=f"x: expected int8, got {wrong} at 1"):
            codec.encode({"x": np.array([0, wrong])}, 2)
    with pytest.raises(TypeError, match="x: expected integers, for int8, got float64"):
        codec.encode({"x": np.ones(2)}, 2)


def test_shards_have_so_many_rows_and_any_is_found(tmp_path):
    directory, records = epath.Path(tmp_path), [bytes([n]) for n in range(5)]
    shards = write_shards(directory, records, rows_per_shard=2)
    assert [shard["rows"] for shard in shards] == [2, 2, 1]
    assert ShardReader(directory, shards).read([4, 0, 3, 2]) == [bytes([n]) for n in (4, 0, 3, 2)]


def test_parts_can_be_added_one_by_one(tmp_path):
    cache = RowCache(tmp_path, CODEC, made_from=MADE)
    for rows in ([5], [2, 9], [3]):
        cache.add(rows, compute(np.array(rows)))
    assert (
        cache.row_numbers.tolist() == [2, 3, 5, 9] == RowCache(tmp_path, CODEC).row_numbers.tolist()
    )
    assert cache.read([9, 5])["label"].tolist() == [9, 5]


def test_errors_name_the_cache_and_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="no squares in"):
        RowCache(tmp_path, CODEC, kind="squares")
    cache = RowCache(tmp_path, CODEC, made_from=MADE, kind="squares")
    cache.fill([1], compute, batch_size=1)
    with pytest.raises(ValueError, match=r"squares .* lacks 2 of the requested rows, such as 4"):
        cache.read([1, 6, 4])
    with pytest.raises(ValueError, match=r"squares .* lacks 1 of the requested rows, such as -1"):
        cache.read([-1])
    with pytest.raises(ValueError, match=r"x: expected \[batch, 2, 3\], got \(1, 3, 2\)"):
        cache.fill([2], lambda rows: compute(rows) | {"x": np.zeros((1, 3, 2))}, batch_size=1)
    with pytest.raises(ValueError, match=r"squares .* its model is 'm', not 'n'"):
        RowCache(tmp_path, CODEC, made_from=MADE | {"model": "n"}, kind="squares")
    shorter = ArrayCodec({"label": (np.uint16, ())})
    with pytest.raises(ValueError, match="damaged record: 18 bytes instead of 2"):
        RowCache(tmp_path, shorter, kind="squares").read([1])


def test_a_flipped_bit_anywhere_in_a_manifest_is_one_line_that_names_it(tmp_path):
    RowCache(tmp_path, CODEC, made_from=MADE)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(tmp_path)) as error:
            RowCache(tmp_path, CODEC, made_from=MADE)
        assert "\n" not in str(error.value)
    # What was asked for money is not deleted for its label.
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .* remove this file"):
        storage.Manifest(tmp_path, "audit").read()
    storage.write_head(tmp_path, {"kind": "mine"}, {"kernel": np.ones(3, np.float32)})
    file = tmp_path / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"head\.safetensors: damaged"):
        storage.read_head(tmp_path)

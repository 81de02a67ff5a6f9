"""The row cache with a codec of one's own; what teachers and encoders keep is tested with them."""

import ml_dtypes
import numpy as np
import pytest

from logitjax.storage import ArrayCodec, RowCache

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
    with pytest.raises(ValueError, match=r"squares .* lacks 2 of the rows asked for, such as 4"):
        cache.read([1, 6, 4])
    with pytest.raises(ValueError, match=r"squares .* lacks 1 of the rows asked for, such as -1"):
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

"""Caches of features: what comes back, what a kill leaves, who shares the work, what is refused."""

import dataclasses
import multiprocessing
import os
import signal
import tempfile
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from logitjax import few_shot

VIEWS, FEATURES, LOGITS = 2, 5, 3


def write(directory, identity, rows, compute, **options):
    cache = few_shot.FeatureCache(directory, identity)
    cache.fill(rows, compute, **options)
    return cache


def identity(**changes):
    values = dict(
        encoder="net",
        encoder_fingerprint="n0",
        preprocessing="mean=0",
        views="plain 8 px",
        data="pictures",
        data_fingerprint="p0",
        class_names=("a", "b", "c"),
        num_views=VIEWS,
        num_features=FEATURES,
        num_logits=LOGITS,
        dtype="float32",
    )
    return few_shot.FeatureIdentity(**(values | changes))


def look(rows):
    """Different for every row, so that a mix-up shows."""
    numbers = np.stack(
        [np.random.default_rng(int(row)).normal(size=(VIEWS, FEATURES + LOGITS)) for row in rows]
    )
    return few_shot.Features(
        features=numbers[..., :FEATURES],
        logits=numbers[..., FEATURES:],
        labels=np.asarray(rows) % 3,
    )


def check_rows(cached, rows, tolerance=1e-6):
    want = look(rows)
    np.testing.assert_allclose(cached.features, want.features, atol=tolerance)
    np.testing.assert_allclose(cached.logits, want.logits, atol=tolerance)
    np.testing.assert_array_equal(cached.labels, want.labels)
    assert cached.features.dtype == cached.logits.dtype == np.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
def test_rows_come_back_in_any_order(tmp_path, dtype, tolerance):
    rows = [3, 4, 5, 9, 20, 21, 22]
    cache = write(tmp_path, identity(dtype=dtype), rows, look, batch_size=2, rows_per_shard=3)
    assert len(cache) == 7
    assert cache.class_names == ("a", "b", "c")
    check_rows(cache.read([21, 3, 9, 9]), [21, 3, 9, 9], tolerance)
    check_rows(cache.all(), rows, tolerance)
    np.testing.assert_array_equal(cache.missing([1, 3, 30]), [1, 30])
    assert "7 rows, plain 8 px views of pictures by net" in repr(cache)
    with pytest.raises(ValueError, match=r"lacks 1 of the requested rows, such as 8"):
        cache.read([3, 8])


def test_encoders_without_a_class_head_have_no_logits(tmp_path):
    who = identity(num_logits=0)

    def features_alone(rows):
        return dataclasses.replace(look(rows), logits=None)

    cache = write(tmp_path, who, [1, 2], features_alone, batch_size=2)
    assert cache.all().logits is None
    np.testing.assert_allclose(cache.all().features, look([1, 2]).features, atol=1e-6)
    assert cache._codec.bytes_per_row == 4 + 4 * VIEWS * FEATURES


def test_more_rows_can_follow_and_none_is_computed_twice(tmp_path):
    seen = []

    def count(rows):
        seen.append(np.unique(rows).tolist())
        return look(rows)

    options = dict(batch_size=2, rows_per_shard=4)
    write(tmp_path, identity(), range(4), count, **options)
    write(tmp_path, identity(), range(4), count, **options)
    cache = write(tmp_path, identity(), [2, 9, 5, 3], count, **options)
    assert seen == [[0, 1], [2, 3], [5, 9]]
    check_rows(cache.all(), [0, 1, 2, 3, 5, 9])


def slow_run(directory, wait):
    def compute(rows):
        if rows[0] >= 4:
            (directory / "here").touch()
            time.sleep(wait)
        return look(rows)

    write(directory / "cache", identity(), range(8), compute, batch_size=2, rows_per_shard=4)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=slow_run, args=(tmp_path, 60))
    process.start()
    while not (tmp_path / "here").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    left = few_shot.FeatureCache(tmp_path / "cache")
    check_rows(left.all(), [0, 1, 2, 3])
    again = []

    def count(rows):
        again.append(rows.tolist())
        return look(rows)

    cache = write(tmp_path / "cache", identity(), range(8), count, batch_size=2, rows_per_shard=4)
    assert again == [[4, 5], [6, 7]]
    check_rows(cache.all(), range(8))


def test_a_part_without_its_list_of_rows_does_not_count(tmp_path):
    options = dict(batch_size=2, rows_per_shard=2)
    write(tmp_path, identity(), range(4), look, **options)
    min(tmp_path.glob("part-*.json")).unlink()  # as if killed between the two
    assert len(few_shot.FeatureCache(tmp_path)) == 2
    cache = write(tmp_path, identity(), range(4), look, **options)
    check_rows(cache.all(), range(4))


def test_processes_share_the_work_and_leave_the_same_cache(tmp_path):
    rows, seen = np.arange(3, 14), ([], [])
    options = dict(batch_size=2, rows_per_shard=3)
    for index in (1, 0):

        def count(chunk, index=index):
            seen[index].extend(chunk.tolist())
            return look(chunk)

        write(
            tmp_path / "two",
            identity(),
            rows,
            count,
            process_index=index,
            process_count=2,
            **options,
        )
    one = write(tmp_path / "one", identity(), rows, look, **options)
    two = few_shot.FeatureCache(tmp_path / "two")
    assert not set(seen[0]) & set(seen[1])
    assert sorted({*seen[0], *seen[1]}) == rows.tolist()
    for name in ("features", "logits", "labels"):
        np.testing.assert_array_equal(getattr(one.all(), name), getattr(two.all(), name))
    names = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("one", "two")]
    assert names[0] == names[1]


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=9), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 3),
)
def test_any_order_of_runs_holds_every_row_once(runs, batch, per_shard, processes):
    with tempfile.TemporaryDirectory() as directory:
        for rows in runs:
            for index in range(processes):
                write(
                    directory,
                    identity(),
                    rows,
                    look,
                    batch_size=batch,
                    rows_per_shard=per_shard,
                    process_index=index,
                    process_count=processes,
                )
        expected = sorted({row for rows in runs for row in rows})
        cache = few_shot.FeatureCache(directory)
        assert cache.row_numbers.tolist() == expected
        check_rows(cache.read(runs[0]), runs[0])


def test_rows_that_two_runs_wrote_count_once(tmp_path):
    write(tmp_path, identity(), [0, 1], look, batch_size=2)
    write(tmp_path / "b", identity(), [1, 2], look, batch_size=2)
    for path in (tmp_path / "b").glob("part-*"):
        path.rename(tmp_path / path.name)
    cache = few_shot.FeatureCache(tmp_path)
    assert len(cache) == 3
    check_rows(cache.all(), [0, 1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_fingerprint": "n1"}, "its encoder_fingerprint is 'n0', not 'n1'"),
        ({"preprocessing": "mean=1"}, "its preprocessing is 'mean=0', not 'mean=1'"),
        ({"views": "random 8 px"}, "its views is 'plain 8 px', not 'random 8 px'"),
        ({"data_fingerprint": "p1"}, "its data_fingerprint is 'p0', not 'p1'"),
        ({"num_views": 3}, "its num_views is 2, not 3"),
        ({"compute_dtype": "bfloat16"}, "its compute_dtype is 'float32', not 'bfloat16'"),
        ({"dtype": "float16"}, "its dtype is 'float32', not 'float16'"),
        ({"encoder": "x", "encoder_fingerprint": "n1"}, "its encoder is 'net', not 'x'; its enc"),
    ],
)
def test_a_cache_of_something_else_is_refused(tmp_path, changes, message):
    write(tmp_path, identity(), [0], look, batch_size=1)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, identity(**changes), [1], look, batch_size=1)
    assert len(few_shot.FeatureCache(tmp_path)) == 1


def test_moved_weights_and_pictures_are_still_the_same(tmp_path):
    write(tmp_path, identity(), [0], look, batch_size=1)
    who = identity(
        encoder="elsewhere/net", data="elsewhere/pictures", class_names=("ant", "bee", "cat")
    )
    cache = write(tmp_path, who, [0, 1], look, batch_size=1)
    check_rows(cache.all(), [0, 1])
    with pytest.raises(ValueError, match="its encoder is 'net', not 'elsewhere/net'"):
        cache.check(encoder="elsewhere/net")


def test_what_cannot_be_stored_is_said(tmp_path):
    def wrong_shape(rows):
        return dataclasses.replace(look(rows), features=np.zeros((len(rows), FEATURES)))

    with pytest.raises(ValueError, match=r"features: expected \[batch, 2, 5\], got \(1, 5\)"):
        write(tmp_path / "a", identity(), [0], wrong_shape, batch_size=1)

    def without_logits(rows):
        return dataclasses.replace(look(rows), logits=None)

    with pytest.raises(ValueError, match=r"logits: expected \[batch, 2, 3\], got \(\)"):
        write(tmp_path / "b", identity(), [0], without_logits, batch_size=1)

    def large(rows):
        return dataclasses.replace(look(rows), features=np.full((1, VIEWS, FEATURES), 1e5))

    with pytest.raises(
        ValueError,
        match=r"^features: expected values that float16 holds, got up to 100000 from net",
    ):
        write(tmp_path / "c", identity(dtype="float16"), [0], large, batch_size=1)
    with pytest.raises(ValueError, match="dtype: expected one of float32, float16, got 'int8'"):
        identity(dtype="int8")


def test_damage_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no feature cache in .*manifest\.json"):
        few_shot.FeatureCache(tmp_path)
    write(tmp_path, identity(), range(4), look, batch_size=2)
    (shard,) = tmp_path.glob("*.array_record")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"array_record is damaged"):
        few_shot.FeatureCache(tmp_path)
    shard.write_bytes(whole)
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text()[:40])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        few_shot.FeatureCache(tmp_path)


def test_features_of_other_pictures_are_not_paired(tmp_path):
    def compute(rows):
        features = np.ones((len(rows), 1, FEATURES)) + np.asarray(rows)[:, None, None]
        return few_shot.Features(features=features, logits=None, labels=np.zeros(len(rows), int))

    plain = dict(num_views=1, num_logits=0)
    for name, rows, changes in (
        ("first", (0, 2, 4), {}),
        ("same", (0, 2, 4), dict(encoder_fingerprint="n1")),
        ("rows", (0, 2, 5), dict(encoder_fingerprint="n1")),
        ("set", (0, 2, 4), dict(data_fingerprint="p1")),
    ):
        write(tmp_path / name, identity(**plain, **changes), rows, compute, batch_size=4)
    weights = np.eye(FEATURES)[:, :3]
    first = tmp_path / "first"
    paired = few_shot.read_pictures(first, tmp_path / "same", class_weights=weights)
    assert paired.auxiliary is not None
    assert few_shot.read_pictures(first, class_weights=weights, views=[first]).views
    for name in ("same", "set"):
        with pytest.raises(ValueError, match="views: expected the pictures and encoders of"):
            few_shot.read_pictures(first, class_weights=weights, views=[tmp_path / name])
    for name in ("rows", "set"):
        with pytest.raises(ValueError, match=r"auxiliary: expected the pictures of .* in their"):
            few_shot.read_pictures(first, tmp_path / name, class_weights=weights)

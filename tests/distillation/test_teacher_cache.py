"""Writing, resuming, extending and checking what a teacher says."""

import dataclasses
import functools

import numpy as np
import pytest
from etils import epath

from logitjax import data, distillation
from logitjax.distillation import terms
from logitjax.distillation.training import _corpus
from logitjax.distillation.training._teachers import Reader, cache_teacher
from logitjax.storage import Manifest
from tests.data._tokenizers import ByteTokenizer

K, POSITIONS = 4, 6


def write(directory, identity, rows, compute, **options):
    cache = distillation.TeacherCache(directory, identity)
    cache.fill(rows, compute, **options)
    return cache


def identity(**changes):
    values = dict(
        model="teacher",
        tokenizer="tok",
        data="rows",
        vocab_size=1000,
        positions=POSITIONS,
        k=K,
        dtype="float32",
    )
    return distillation.TeacherIdentity(**(values | changes))


def say(rows):
    """Different for every row, so that a mix-up shows."""
    out = dict(
        values=np.zeros((len(rows), POSITIONS, K), np.float32),
        indices=np.zeros((len(rows), POSITIONS, K), np.int64),
    )
    out |= {name: np.zeros((len(rows), POSITIONS), np.float32) for name in ("log_z", "mean", "std")}
    for index, row in enumerate(rows):
        rng = np.random.default_rng(int(row))
        logits = np.sort(rng.normal(size=(POSITIONS, K)) * 3, -1)[:, ::-1]
        out["values"][index] = logits
        out["indices"][index] = rng.integers(0, 1000, (POSITIONS, K))
        out["log_z"][index] = np.log(np.exp(logits).sum(-1) + 1)
        out["mean"][index], out["std"][index] = rng.normal(size=(2, POSITIONS))
    return out


def check_rows(cache, rows, tolerance=1e-5):
    got, want = cache.read(rows), say(rows)
    for name, value in want.items():
        if name == "indices":
            np.testing.assert_array_equal(got[name], value)
            assert got[name].dtype == np.int32
        else:
            np.testing.assert_allclose(got[name], value, atol=tolerance)
            assert got[name].dtype == np.float32


@pytest.mark.parametrize(
    ("dtype", "vocab_size", "tolerance"),
    [("float32", 1000, 1e-5), ("float16", 100_000, 1e-2), ("bfloat16", 1000, 1e-1)],
)
def test_rows_come_back_in_any_order(tmp_path, dtype, vocab_size, tolerance):
    rows = np.array([3, 4, 5, 9, 20, 21])
    who = identity(dtype=dtype, vocab_size=vocab_size)
    cache = write(tmp_path, who, rows, say, batch_size=4, rows_per_shard=4)
    check_rows(cache, [21, 3, 9, 9], tolerance)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.array_record"))
    # array_record adds at least one 64 kB block a shard.
    assert size >= len(rows) * who.bytes_per_row
    assert len(cache) == 6


def test_draws_from_the_tail_are_kept_too(tmp_path):
    def say_more(rows):
        rng = np.random.default_rng(rows)
        shape = (len(rows), POSITIONS, 3)
        tail = dict(
            tail_values=rng.normal(size=shape).astype(np.float32) - 3,
            tail_indices=rng.integers(0, 1000, shape),
        )
        return say(rows) | tail

    who = identity(tail_samples=3)
    cache = write(tmp_path, who, [4, 7], say_more, batch_size=2)
    got, want = cache.read([7, 4]), say_more(np.array([4, 7]))
    np.testing.assert_allclose(got["tail_values"], want["tail_values"][::-1], atol=1e-5)
    np.testing.assert_array_equal(got["tail_indices"], want["tail_indices"][::-1])
    check_rows(cache, [7, 4])
    cache.check(tail_samples=2)
    with pytest.raises(ValueError, match="its tail_samples is 3, not 4"):
        cache.check(tail_samples=4)
    with pytest.raises(ValueError, match="tail_samples: expected at least 0"):
        identity(tail_samples=-1)


def test_a_killed_run_goes_on_and_more_rows_can_follow(tmp_path):
    read = []

    def interrupted(rows):
        if len(read) == 2:
            raise KeyboardInterrupt
        read.append(rows.tolist())
        return say(rows)

    arguments = dict(batch_size=2, rows_per_shard=2)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, identity(), range(8), interrupted, **arguments)
    again = []

    def count(rows):
        again.append(rows.tolist())
        return say(rows)

    cache = write(tmp_path, identity(), range(8), count, **arguments)
    assert read + again == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert not list(tmp_path.glob(".unfinished-*"))
    cache = write(tmp_path, identity(), [1, 11, 6, 30], count, **arguments)
    assert again[2:] == [[11, 30]]
    check_rows(cache, [30, 0, 7, 11])


def test_processes_share_the_work_without_talking(tmp_path):
    seen = []

    def compute(rows):
        seen.extend(rows.tolist())
        return say(rows)

    for process in range(3):
        cache = write(
            tmp_path,
            identity(),
            range(20),
            compute,
            batch_size=2,
            rows_per_shard=4,
            process_index=process,
            process_count=3,
        )
    assert sorted(seen) == list(range(20))
    check_rows(cache, range(20))


def test_padding_rows_are_zeros_and_absent_rows_an_error(tmp_path):
    cache = write(tmp_path, identity(), [2, 5], say, batch_size=2)
    got = cache.read([-1, 5])
    assert all(not got[name][0].any() for name in got)
    assert cache.missing([-1, 2, 3, 4]).tolist() == [3, 4]
    with pytest.raises(ValueError, match="lacks 1 of the requested rows, such as 7"):
        cache.read([2, 7])


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokenizer", "other"), ("data", "other"), ("model", "other"), ("k", 2), ("positions", 7)],
)
def test_what_does_not_fit_is_named(tmp_path, name, value):
    write(tmp_path, identity(), [0], say, batch_size=1)
    other = identity(**{name: value})
    with pytest.raises(ValueError, match=f"does not fit: its {name} is .* not {value!r}"):
        write(tmp_path, other, [0], say, batch_size=1)


def test_check_lists_every_difference_and_takes_a_smaller_k(tmp_path):
    cache = write(tmp_path, identity(), [0], say, batch_size=1)
    cache.check(k=2, data="rows", vocab_size=1000)
    with pytest.raises(ValueError, match=r"its data is 'rows', not 'x'; its k is 4, not 5"):
        cache.check(data="x", k=5)


def test_damage_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match="no teacher cache in"):
        distillation.TeacherCache(tmp_path)
    write(tmp_path, identity(), [0], say, batch_size=1)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        distillation.TeacherCache(tmp_path)


def test_wrong_shapes_and_options_are_errors(tmp_path):
    with pytest.raises(ValueError, match="values: expected"):
        write(tmp_path, identity(k=5), [0], say, batch_size=1)
    with pytest.raises(ValueError, match="dtype: expected one of"):
        identity(dtype="int8")
    with pytest.raises(ValueError, match="k: expected a number in"):
        identity(k=1001)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    rows = [{"text": "three 3"[:6]} for _ in range(9)]
    folder, tokenizers = tmp_path_factory.mktemp("packed"), {"pivot": ByteTokenizer()}
    splits = {
        name: data.pack(rows, tokenizers, seq_len=POSITIONS + 1, directory=folder / name)
        for name in ("train", "test")
    }
    return data.PackedSplits(
        splits=splits, names={"pivot": "pivot"}, tokenizers=tokenizers, chat=False
    )


def let_read(directory, packed, weights, *, k=K, **rows):
    """The caches, and which rows the teacher was asked for."""
    asked = []

    def reader():
        def read(columns, chunk):
            asked.append(chunk)
            top = ("values", "indices")
            return {n: a[..., :k] if n in top else a for n, a in say(chunk).items()}

        return Reader(tokenizer="tok", vocab_size=1000, read=read, weights=weights)

    caches = cache_teacher(
        "teacher",
        reader,
        columns="pivot",
        packed=packed,
        rows={name: np.arange(count) for name, count in rows.items()},
        k=k,
        batch_size=3,
        directory=epath.Path(directory),
    )
    return caches, np.unique(np.concatenate([*asked, []])).tolist()


def test_a_teacher_that_was_trained_since_does_not_read_the_rest(tmp_path, packed):
    let_read(tmp_path, packed, "first", train=3)
    with pytest.raises(ValueError, match="its weights is 'first', not 'second'"):
        let_read(tmp_path, packed, "second", train=6)
    with pytest.raises(ValueError, match="its weights is 'first', not 'second'"):
        let_read(tmp_path, packed, "second", train=3, test=3)
    caches, asked = let_read(tmp_path, packed, "first", train=6, test=3)
    assert list(caches) == ["train", "test"]
    assert asked == list(range(6))
    # Where nothing is left to read, no teacher is loaded.
    assert let_read(tmp_path, packed, "second", train=6)[1] == []


def test_a_cache_that_does_not_know_its_teachers_weights_is_continued(tmp_path, packed):
    let_read(tmp_path, packed, "", train=3)
    assert "weights" not in Manifest(tmp_path / "train", "teacher cache").read()["made_from"]
    caches, asked = let_read(tmp_path, packed, "some", train=6)
    assert asked == [3, 4, 5]
    assert caches["train"].identity.weights == ""
    check_rows(caches["train"], range(6), tolerance=1e-2)


def test_a_cache_that_does_not_fit_is_named_before_another_is_filled(tmp_path, packed):
    let_read(tmp_path, packed, "a", test=3, k=2)
    with pytest.raises(ValueError, match="its k is 2, not 4"):
        let_read(tmp_path, packed, "a", train=3, test=3)
    assert not (tmp_path / "train").exists()


def test_teachers_that_may_be_refused_come_before_models_that_read(tmp_path, packed, monkeypatch):
    """A second teacher's lacking rows, or server that is down, is said before the first reads."""
    looked = []
    monkeypatch.setattr(
        _corpus, "open_teacher_caches", lambda *_, **__: looked.append("cache") or {}
    )
    monkeypatch.setattr(_corpus, "cache_teacher", lambda spec, *_, **__: looked.append(spec) or {})
    teachers = ("tiny", "api:http://127.0.0.1:9", "tiny:1", "cache:DIR")
    reading = distillation.Reading(data="text:FILE", teachers=teachers)
    names = dict.fromkeys(("pivot", *reading.names), "pivot")
    corpus = reading.load(dataclasses.replace(packed, names=names), {}, epath.Path(tmp_path))
    assert looked == ["cache", "api:http://127.0.0.1:9", "tiny", "tiny:1"]
    assert tuple(corpus.sources) == reading.names


def test_identity_tells_its_size():
    assert identity().bytes_per_row == POSITIONS * (K * (4 + 2) + 12)
    big = dataclasses.replace(identity(), vocab_size=100_000, dtype="float16")
    assert big.bytes_per_row == POSITIONS * (K * (2 + 4) + 12)


def test_a_loss_that_needs_the_rest_is_refused_before_the_text_is_packed(tmp_path):
    top = {name: say(np.arange(1))[name] for name in ("values", "indices")}
    write(tmp_path / "train", identity(rest=False), [0], lambda _: top, batch_size=1)
    spec = f"cache:{tmp_path}"
    reading = distillation.Reading(data="text:FILE", teachers=(spec,))
    check = functools.partial(_corpus._check_needs, reading, spec=spec, other_tokenizer=False)
    check("kl", terms.KL().teacher)
    with pytest.raises(ValueError, match="loss 'uld' needs the mass of all but the top logits"):
        check("uld", terms.ULD(k=2).teacher)

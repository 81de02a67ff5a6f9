"""MaxText's stored top logits as a cache, and back, without MaxText."""

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from logitjax import distillation, losses, ops
from logitjax.distillation import terms
from logitjax.integrations import maxtext_files

POSITIONS, K, VOCAB = 5, 3, 70_000
# `tf.train.Example` as the protocol buffers of maxtext 0.2.5 write it: inputs 1 and 200, two logits
# of each, their ids, and a negative hash.
EXAMPLE = bytes.fromhex(
    "0a760a110a06696e7075747312071a050a0301c8010a1f0a0d73657175656e63655f68617368120e1a0c0a0afbffff"
    "ffffffffffff010a1a0a0d746f705f6b5f696e646963657312091a070a0507ac0200010a240a0c746f705f6b5f6c6f"
    "67697473121412120a100000c03f000000c00000803e00000000"
)


def stored_rows(count):
    rng = np.random.default_rng(count)
    logits = -np.sort(-rng.normal(size=(count, POSITIONS, K)).astype(np.float32) * 9, -1)
    return {
        "values": logits,
        "indices": rng.integers(0, VOCAB, (count, POSITIONS, K)).astype(np.int32),
    }


def write(folder, count=5):
    """A cache without the rest, the columns of its rows, and MaxText's files of both."""
    rows = stored_rows(count)
    identity = distillation.TeacherIdentity(
        model="t",
        tokenizer="t",
        data="d",
        vocab_size=VOCAB,
        positions=POSITIONS,
        k=K,
        dtype="float32",
        rest=False,
    )
    cache = distillation.TeacherCache(folder / "cache", identity)
    cache.fill(range(count), lambda n: {name: a[n] for name, a in rows.items()}, batch_size=2)
    inputs = np.arange(count * POSITIONS, dtype=np.int32).reshape(count, POSITIONS)
    columns = {"inputs": inputs, "targets": inputs + 1, "targets_segmentation": inputs % 2}
    return rows, columns, maxtext_files.store_top_k(cache, range(count), columns, folder / "files")


def test_a_cache_goes_to_maxtexts_files_and_comes_back_with_equal_ids_and_values(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(maxtext_files, "_PART", 2)
    rows, columns, files = write(tmp_path)
    assert [file.name for file in files] == [
        f"teacher_top_k_part_{number:05d}_host_000.array_record" for number in range(3)
    ]
    stored = list(maxtext_files.stored_rows(files))
    for name, column in columns.items():
        np.testing.assert_array_equal([row[name] for row in stored], column)
    for _ in range(2):
        back = maxtext_files.cache_stored_top_k(
            files, tmp_path / "back", model="t", tokenizer="t", vocab_size=VOCAB
        )
    assert len(list((tmp_path / "back").glob("*.array_record"))) == 3
    assert not back.identity.rest
    record = back.read([3, -1, 0])
    assert sorted(record) == ["indices", "values"]
    for name, array in record.items():
        np.testing.assert_array_equal(array[[0, 2]], rows[name][[3, 0]])
        assert not array[1].any()
    with pytest.raises(ValueError, match="its rest is False, not True"):
        back.check(rest=True)


def test_a_record_that_maxtext_wrote_is_read(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "one"), "group_size:1")
    writer.write(EXAMPLE)
    writer.close()
    (row,) = maxtext_files.stored_rows([tmp_path / "one"])
    assert {name: array.tolist() for name, array in row.items()} == {
        "inputs": [1, 200],
        "top_k_logits": [[1.5, -2.0], [0.25, 0.0]],
        "top_k_indices": [[7, 300], [0, 1]],
    }


def test_a_file_that_is_cut_off_is_refused_by_its_name(tmp_path):
    *_, (file,) = write(tmp_path)
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError) as error:
            list(maxtext_files.stored_rows([file]))
        assert str(error.value).startswith(f"{file}: expected a whole array_record file")
        assert "\n" not in str(error.value)


def test_other_records_and_ids_outside_of_the_vocabulary_are_refused(tmp_path):
    rows, _, files = write(tmp_path, count=2)
    options = dict(model="t", tokenizer="t", vocab_size=int(rows["indices"].max()))
    with pytest.raises(ValueError, match="top_k_indices: expected ids in 0"):
        maxtext_files.cache_stored_top_k(files, tmp_path / "small", **options)
    with pytest.raises(ValueError, match="files: expected rows, got none in 0 files"):
        maxtext_files.cache_stored_top_k([], tmp_path / "none", **options)
    cache = distillation.TeacherCache(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"columns\['inputs'\]: expected \(1, 5\), got None"):
        maxtext_files.store_top_k(cache, [0], {}, tmp_path / "more")
    (part,) = (tmp_path / "cache").glob("*.array_record")
    with pytest.raises(ValueError, match=f"{part}: expected stored top logits, got something"):
        list(maxtext_files.stored_rows([part]))


def statistics(**changes):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, 4, 9)).astype(np.float32)
    top = ops.TopK.of(logits, 3)
    return losses.GraphStatistics(values=top.values, indices=top.indices, **changes)


def value(term, teacher):
    rng = np.random.default_rng(1)
    hidden, head = rng.normal(size=(1, 4, 6)), rng.normal(size=(6, 9))
    objective = distillation.Objective(terms=((term, 1.0),))
    total, count, _ = objective.value(
        np.float32(hidden),
        np.float32(head),
        {"labels": np.zeros((1, 4), np.int32)},
        [distillation.Teacher(statistics=teacher)],
        where=np.ones((1, 4), bool),
    )
    return total / count, np.float32(hidden @ head)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_where_the_rest_is_unknown_kl_compares_the_top_logits_alone(direction):
    teacher = statistics()
    term = terms.KL() if direction == "forward" else terms.ReverseKL()
    got, logits = jax.jit(lambda teacher: value(term, teacher))(teacher)
    ours = np.take_along_axis(np.float64(logits), np.asarray(teacher.indices), -1)
    log_q = ours - np.log(np.exp(ours).sum(-1, keepdims=True))
    teacher_logits = np.float64(teacher.values)
    log_p = teacher_logits - np.log(np.exp(teacher_logits).sum(-1, keepdims=True))
    first, second = (log_p, log_q) if direction == "forward" else (log_q, log_p)
    expected = (np.exp(first) * (first - second)).sum(-1).mean()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("term", [terms.ULD(k=3), terms.GLD(k=3)], ids=["uld", "gld"])
def test_a_loss_that_needs_the_rest_refuses_by_its_name(term):
    with pytest.raises(ValueError, match=f"loss '{term.name}': expected a teacher with the mass"):
        value(term, statistics())


def test_a_divergence_with_the_tail_refuses_a_teacher_without_a_normaliser():
    top = statistics().top_k
    with pytest.raises(ValueError, match=r"teacher.log_z: expected the log-normaliser"):
        losses.sparse_kl_divergence(np.zeros((1, 4, 9), np.float32), top)

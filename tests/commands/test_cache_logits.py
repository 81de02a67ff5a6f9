"""The command that caches teachers: it writes what fits its rows, and resumes."""

import json

import numpy as np
import pytest
from etils import epath

from logitjax import data, distillation, models
from logitjax.commands import _flags, cache_logits

TEXT = "\n\n".join(f"paragraph {i} " + "word " * 60 for i in range(120))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return f"text:{path}"


def _config(source, **changes):
    small = dict(student="tiny", teacher=("tiny:1",), data=source, seq_len=64, batch_size=2)
    few = dict(rows="6", cache_top_k=16, tail_samples=2)
    return _flags.build(cache_logits.Config, small | few | changes)


@pytest.mark.every_change
@pytest.mark.slow
def test_writes_caches_that_fit_their_rows(source, tmp_path):
    workdir = epath.Path(tmp_path)
    cache_logits.run(_config(source), workdir)
    for split in data.SPLITS:
        cache = distillation.TeacherCache(workdir / "source0" / split)
        packed = data.PackedDataset(workdir / "data" / split)
        cache.check(data=packed.fingerprint, model="tiny:1", k=16, positions=63)
        assert len(cache) == min(6, len(packed))
        records = cache.read(np.arange(len(cache)))
        assert np.isfinite(records["values"]).all()
        mass = np.exp(records["values"] - records["log_z"][..., None]).sum(-1)
        assert ((mass > 0) & (mass < 1.001)).all()
    assert "--teacher=cache:" in (workdir / "report.md").read_text()
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("source0/*/*")}
    cache_logits.run(_config(source), workdir)
    assert before == {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("source0/*/*")}
    identity = json.loads((tmp_path / "source0" / "train" / "manifest.json").read_text())
    assert identity["made_from"]["model"] == "tiny:1"


def test_options_that_make_no_sense_are_named(source, tmp_path):
    workdir = epath.Path(tmp_path)
    with pytest.raises(ValueError, match="splits: expected some of"):
        cache_logits.run(_config(source, splits=("dev",)), workdir)
    with pytest.raises(ValueError, match="rows: expected all or a positive number"):
        cache_logits.run(_config(source, rows="none"), workdir)
    with pytest.raises(ValueError, match=r"at most 512, the length that teacher 'tiny:1' reads"):
        cache_logits.run(_config(source, seq_len=513), workdir / "long")


def _corpus(workdir, source, seq_len, rows):
    """Rows of the first teacher's cache, as a student reads them."""
    reading = distillation.Reading(
        data=source, teachers=(f"cache:{workdir / 'source0'}",), seq_len=seq_len
    )
    tokenizer = models.load_tokenizer("tiny")
    packed = reading.pack(tokenizer, workdir / f"rows-{seq_len}")
    return reading.load(packed, rows, workdir / "unused")


@pytest.mark.slow
def test_a_students_rows_come_with_the_draws_of_the_teachers_tail(source, tmp_path):
    workdir = epath.Path(tmp_path)
    cache_logits.run(_config(source, rows="all", tail_samples=3), workdir)
    corpus = _corpus(workdir, source, 64, {"train": np.arange(8)})
    rows = corpus.packed.splits["train"].rows(np.arange(8))
    statistics = corpus.sources["source0"].view("train", rows).statistics
    assert statistics.tail.values.shape == (8, 63, 3)
    # What is drawn is not among the top 16.
    assert (statistics.tail.indices[..., None] != statistics.indices[..., None, :]).all()
    assert (statistics.tail.values <= statistics.values[..., -1:] + 0.1).all()


@pytest.mark.every_change
@pytest.mark.slow
def test_caches_of_other_or_of_too_few_rows_are_refused(source, tmp_path):
    workdir = epath.Path(tmp_path)
    cache_logits.run(_config(source), workdir)
    with pytest.raises(ValueError, match="does not fit: its data is"):
        _corpus(workdir, source, 32, {"train": np.arange(2)})
    with pytest.raises(ValueError, match=r"lacks 3 of the rows .* write it with --rows=all"):
        _corpus(workdir, source, 64, {"train": np.arange(9)})

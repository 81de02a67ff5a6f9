"""The command that converts a head: what it writes is read back, and a second run goes on."""

import numpy as np
import pytest
from etils import epath

from logitjax import models, vq
from logitjax.commands import _flags, convert_head


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("convert"))


def _config(workdir, **changes):
    text = workdir / "text.txt"
    text.write_text("\n\n".join(f"paragraph {i} " + "word " * 20 for i in range(60)))
    small = dict(model="tiny", data=f"text:{text}", seq_len=64, max_tokens=400, held_out_tokens=100)
    few = dict(num_codes=16, steps=4, batch_size=64, reassign_every=2)
    return _flags.build(convert_head.Config, small | few | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("VQHead", {}, marks=pytest.mark.every_change),
        ("ScreenedHead", {"kind": "screened", "candidates": 8}),
    ],
)
def test_the_written_head_is_the_reported_one(workdir, kind, options):
    convert_head.run(_config(workdir, **options), workdir)
    head = vq.load_head(workdir / "head")
    assert type(head).__name__ == kind
    held_out = vq.HiddenCache.open(workdir / "held_out")
    model, _ = models.load("tiny", layout="listed")
    quality = held_out.measure(model.with_head(head))
    report = (workdir / "report.md").read_text()
    after = next(line for line in report.splitlines() if line.startswith("| after"))
    assert float(after.split("|")[2]) == pytest.approx(quality.perplexity, rel=1e-3)
    assert 1 < quality.perplexity < 300
    np.testing.assert_allclose(np.mean(quality.tokens == held_out.labels), quality.accuracy)


@pytest.mark.every_change
@pytest.mark.slow
def test_hidden_states_of_other_text_are_refused(workdir):
    other = workdir / "other.txt"
    other.write_text("\n\n".join(f"another {i} " + "text " * 20 for i in range(60)))
    with pytest.raises(ValueError, match=r"source|data"):
        convert_head.run(_config(workdir, data=f"text:{other}"), workdir)

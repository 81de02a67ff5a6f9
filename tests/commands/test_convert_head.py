"""The command that converts a head: what it writes is read back, and a second run goes on."""

import dataclasses

import numpy as np
import pytest
from etils import epath

from logitjax import decoding, models, vq
from logitjax.commands import _flags, convert_head, generate
from logitjax.commands.line_up import LineUp


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("convert"))


def _config(workdir, **changes):
    text = workdir / "text.txt"
    text.write_text("\n\n".join(f"paragraph {i} " + "word " * 20 for i in range(60)))
    small = dict(model="tiny", data=f"text:{text}", seq_len=64, max_tokens=400, held_out_tokens=100)
    few = dict(num_codes=16, steps=4, batch_size=64)
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


@pytest.mark.slow
@pytest.mark.many_programs("a conversion, and the model loaded in four types")
def test_a_converted_head_decodes_the_model_that_it_was_made_from_and_no_other(
    tmp_path, capsys, monkeypatch
):
    out = epath.Path(tmp_path)
    config = _config(out, steps=0)
    convert_head.run(config, out)
    model, tokenizer = models.load("tiny", layout="listed")
    head = vq.load_head(out / "head", model=model)
    text = decoding.TextOptions(tokenizer=tokenizer)
    expected = decoding.generate(
        model.with_head(head), [tokenizer.encode("abc")], max_new_tokens=6, text=text
    )
    assert expected.texts is not None
    capsys.readouterr()
    for folder in (out, out / "head"):
        flags = dict(model="tiny", head=str(folder), prompt=("abc",), max_new_tokens=6)
        generate.run(_flags.build(generate.Config, flags))
        assert capsys.readouterr().out == f"abc{expected.texts[0]}\n"
    for dtype in ("float32", "bfloat16"):
        for quantize in (None, "int8"):
            LineUp(model="tiny", head=str(out), dtype=dtype, quantize=quantize).load()
    with pytest.raises(ValueError, match="head: expected one made from this model, got"):
        LineUp(model="tiny:3", head=str(out)).load()
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(FileNotFoundError, match="no head in"):
        LineUp(model="tiny", head=str(tmp_path)[:-1]).load()
    with pytest.raises(ValueError, match="fusion or head with it"):
        LineUp(model="tiny", head=str(out), assistant="x").load()
    other = dataclasses.replace(model.config, hidden_size=64)
    monkeypatch.setattr(models, "load_config", lambda _: other)
    with pytest.raises(ValueError, match="head: expected one for 64 x 257 weights"):
        LineUp(model="tiny", head=str(out)).load()

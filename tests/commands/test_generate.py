"""The command that talks: what it prints, what it refuses, in one line."""

import io

import pytest

from logitjax import decoding, models
from logitjax.commands import generate
from logitjax.models import load_model, load_tokenizer

FEW = dict(max_new_tokens=6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model of no chat template as transformers writes one."""
    path = tmp_path_factory.mktemp("tiny")
    models.save_pretrained(load_model("tiny:3"), load_tokenizer("tiny"), path)
    return str(path)


def said(capsys, **values):
    generate.run(generate.Config(**values))
    return capsys.readouterr().out


def refused(**values):
    with pytest.raises(ValueError) as error:
        generate.run(generate.Config(**values))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_goes_on_from_prompts(directory, capsys):
    tokenizer = load_tokenizer("tiny")
    out = decoding.generate(
        models.load_model(directory),
        [tokenizer.encode("abc")],
        max_new_tokens=6,
        stop_ids=[tokenizer.eos_id],
        text=decoding.TextOptions(tokenizer=tokenizer),
    )
    shown = said(capsys, model=directory, prompt=("abc", "abc"), **FEW)
    assert shown == 2 * f"abc{out.texts[0]}\n"


@pytest.mark.every_change
@pytest.mark.slow
def test_reads_standard_input_and_fuses(directory, capsys, monkeypatch):
    small = dict(model=directory, expert=("tiny:1",), base=("tiny:2",), **FEW)
    texts = []
    for draft in (None, "expert"):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
        texts.append(said(capsys, fusion="proxy:alpha=0.5", draft=draft, **small))
    assert texts[0].startswith("one")
    assert "\ntwo" in texts[0]
    assert texts[0] == texts[1]


def test_mistakes_are_one_line(directory, tmp_path):
    assert "no strategy" not in refused(model=directory, fusion="proxy")
    assert "expected one of contrastive" in refused(
        model=directory, expert=("tiny",), fusion="magic"
    )
    assert "proxy takes alpha" in refused(model=directory, expert=("tiny",), fusion="proxy:beta=1")
    assert "nowhere" in refused(model=str(tmp_path / "nowhere"), prompt=("a",))
    assert "at most 512" in refused(model=directory, prompt=("a" * 512,), **FEW)
    assert "temperature" in refused(model=directory, temperature=-1.0)


def test_conversations_keep_their_turns():
    tokenizer = load_tokenizer("tiny")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = template + "{% if add_generation_prompt %}[assistant]{% endif %}"
    talk = generate.Conversation(tokenizer, "be brief")
    assert talk.ask("hi") == "[system]be brief[user]hi[assistant]"
    talk.answered("yes")
    assert talk.ask("so?").endswith("[user]hi[assistant]yes[user]so?[assistant]")

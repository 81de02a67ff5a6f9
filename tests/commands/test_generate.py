"""The command that talks: what it prints, what it refuses, in one line."""

import io
import json

import jax
import pytest

from logitjax import decoding, fusion, models
from logitjax.commands import _flags, generate
from logitjax.commands.line_up import LineUp
from logitjax.commands.strategies import strategy
from logitjax.models import load_model, load_tokenizer
from logitjax.testing._family import write_gguf
from tests.models._marks import with_mark

FEW = dict(max_new_tokens=6)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model of no chat template as transformers writes one."""
    path = tmp_path_factory.mktemp("tiny")
    models.save_pretrained(load_model("tiny:3"), load_tokenizer("tiny"), path)
    return str(path)


def printed(capsys, **values):
    generate.run(_flags.build(generate.Config, values))
    return capsys.readouterr().out


def refused(**values):
    with pytest.raises(ValueError) as error:
        generate.run(_flags.build(generate.Config, values))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.every_change
@pytest.mark.slow
def test_goes_on_from_prompts(directory, capsys):
    tokenizer = load_tokenizer("tiny")
    out = decoding.generate(
        models.load_model(directory),
        [tokenizer.encode("abc")],
        max_new_tokens=6,
        stop_ids=[tokenizer.eos_id],
        text=decoding.TextOptions(tokenizer=tokenizer),
    )
    shown = printed(capsys, model=directory, prompt=("abc", "abc"), **FEW)
    assert shown == 2 * f"abc{out.texts[0]}\n"


@pytest.mark.every_change
@pytest.mark.slow
def test_lines_of_json_go_in_and_come_out_with_log_probabilities(directory, capsys, tmp_path):
    path, prompts = tmp_path / "asked.jsonl", ["abc", "no"]
    path.write_text("\n".join(json.dumps({"prompt": p, "id": i}) for i, p in enumerate(prompts)))
    given = dict(model=directory, prompt_file=str(path), json=True, logprobs=2, **FEW)
    answers = [json.loads(line) for line in printed(capsys, **given).splitlines()]
    assert [(a["id"], a["prompt"]) for a in answers] == [(0, "abc"), (1, "no")]
    tokenizer, model = load_tokenizer("tiny"), models.load_model(directory)
    for answer in answers:
        tokens = [token["id"] for token in answer["logprobs"]]
        scores = decoding.score(model, [tokenizer.encode(answer["prompt"])], [tokens])
        assert answer["text"] == tokenizer.decode(tokens)
        found = [token["logprob"] for token in answer["logprobs"]]
        assert found == pytest.approx(scores.logprobs[0].tolist(), abs=1e-4)
        assert all(token["top"][0][1] >= token["logprob"] - 1e-6 for token in answer["logprobs"])
    shown = printed(capsys, **(given | dict(json=False, prompt_file=None, prompt=("abc",))))
    assert len(shown.splitlines()) >= 1 + len(answers[0]["logprobs"])


@pytest.mark.every_change
@pytest.mark.slow
def test_reads_standard_input_and_fuses(directory, capsys, monkeypatch):
    small = dict(model=directory, expert=("tiny:1",), base=("tiny:2",), **FEW)
    texts = []
    for draft in (None, "expert", "prompt", "tiny:1"):
        monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
        texts.append(printed(capsys, fusion="proxy:alpha=0.5", draft=draft, **small))
    assert texts[0].startswith("one")
    assert "\ntwo" in texts[0]
    assert set(texts) == {texts[0]}


@pytest.mark.every_change
@pytest.mark.slow
def test_a_model_is_its_own_base_with_another_prompt(directory, capsys):
    tokenizer, model = load_tokenizer("tiny"), models.load_model(directory)
    line_up = decoding.Ensemble(model, bases=[model], fuse=fusion.Guidance(weight=4.0))
    asked, other = tokenizer.encode("abc"), tokenizer.encode("not abc!")
    out = decoding.generate(line_up, [asked], others=[[other]], **FEW)
    given = dict(model=directory, base=(directory,), prompt=("abc",), base_prompt="not {prompt}!")
    shown = printed(capsys, fusion="context_aware:weight=4", **given, **FEW)
    assert shown == f"abc{tokenizer.decode(out.rows()[0])}\n"
    assert shown != printed(capsys, fusion="cfg:weight=1", **given, **FEW)


def test_what_no_flag_says_is_as_the_publisher_samples(directory, tmp_path):
    def sampling(text, **flags):
        (tmp_path / "generation_config.json").write_text(text)
        return generate.sampling_of(_flags.build(generate.Config, flags | {"model": str(tmp_path)}))

    assert sampling('{"eos_token_id": 1}') == decoding.Sampling()
    published = '{"do_sample": true, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}'
    assert sampling(published) == decoding.Sampling(
        temperature=0.6, top_k=50, top_p=0.9, repetition_penalty=1.1
    )
    assert sampling(published, temperature=0.0, top_k=0).temperature == 0
    with pytest.raises(ValueError, match=r"generation_config\.json: top_p: expected a number"):
        sampling('{"do_sample": true, "top_p": "most"}')
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json: expected an object, got \[\]"):
        models.load_sampling(str(tmp_path))


def test_weights_are_loaded_in_the_type_asked_for(directory):
    ensemble, _, _ = decoding.load_ensemble(directory, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(ensemble.params)} == {"bfloat16"}


def test_mistakes_are_one_line(directory, tmp_path):
    assert "no strategy" not in refused(model=directory, fusion="proxy")
    assert "expected one of cfg, context_aware, contrastive" in refused(
        model=directory, expert=("tiny",), fusion="magic"
    )
    assert "proxy takes alpha" in refused(model=directory, expert=("tiny",), fusion="proxy:beta=1")
    assert "nowhere" in refused(model=str(tmp_path / "nowhere"), prompt=("a",))
    assert "at most 512" in refused(model=directory, prompt=("a" * 512,), **FEW)
    assert "temperature" in refused(model=directory, temperature=-1.0)


def test_flags_that_do_not_fit_are_refused_before_weights_are_read(
    directory, tmp_path, monkeypatch
):
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights are read"))

    def lines(text):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text(text)
        return str(path)

    write_gguf(load_model("tiny"), tmp_path / "m.gguf")
    gguf = dict(model=str(tmp_path / "m.gguf"), fusion="contrastive", base=("tiny",))
    small, pair = dict(expert=("tiny",)), dict(expert=("tiny",), base=("tiny",))
    for message, values in (
        ("base: expected a model, which ProxyTuning needs", dict(fusion="proxy", **small)),
        ("base: expected a model, which DynamicFusion needs", dict(fusion="dynamic", **small)),
        ("expert: expected none, Contrastive", dict(fusion="contrastive", **pair)),
        ("base: expected one, got 2", dict(fusion="contrastive", base=("tiny", "tiny"))),
        ("expert: expected one, ", dict(fusion="logit_difference", expert=("tiny", "tiny"))),
        (
            "base: expected one or 3, the number of experts, got 2",
            dict(fusion="proxy", expert=("tiny",) * 3, base=("tiny",) * 2),
        ),
        ("proxy:alpha: expected a number, got 'O.5'", dict(fusion="proxy:alpha=O.5", **pair)),
        ("dynamic:num: expected a whole number", dict(fusion="dynamic:num=2.5", **pair)),
        ("draft: expected a model from --expert", dict(draft="expert")),
        ("quantize: 'file' expects a GGUF file, got tiny", dict(quantize="file", **gguf)),
        ("base_prompt: expected a model from --base", dict(base_prompt="a")),
        ("draft: expected a model from --expert", dict(draft="expert", assistant=directory)),
        ("system: expected a chat template that takes it", dict(system="a", complete=True)),
        ("system: expected a chat template that takes it", dict(system="a")),
    ):
        assert message in refused(**{"model": directory, **values})
    for message, values in (
        ("stop_pattern: expected a regular expression, ", dict(stop_pattern="(")),
        ("stop_pattern: 'a*' matches an empty text", dict(stop_pattern="a*")),
        ("line 2: not JSON", dict(prompt_file=lines('{"prompt": "a"}\n{'))),
        ("line 1: expected an object with a text `prompt`", dict(prompt_file=lines("[]"))),
        ("line 1: expected", dict(prompt_file=lines('{"prompt": "a", "base_prompt": 3}'))),
        ("cannot be read as text", dict(prompt_file=str(tmp_path))),
        ("expected one of them, got both", dict(prompt_file=lines("{}"), prompt=("a",))),
        ("draft: expected expert, base, prompt or a model 'nowhere'", dict(draft="nowhere")),
    ):
        assert message in refused(model=directory, **values)
    typo = str(tmp_path / "typo")
    with pytest.raises(FileNotFoundError, match="assistant: no such file"):
        LineUp(model=directory, assistant=typo).load()
    config = generate.Config(line_up=LineUp(model=directory), prompt_file=typo)
    with pytest.raises(FileNotFoundError, match="prompt_file: no such file"):
        generate.run(config)


def test_settings_of_a_strategy_may_be_pairs():
    assert strategy("dynamic:alpha_range=(0,1),num=3") == fusion.DynamicFusion(
        alpha_range=(0, 1), num=3
    )
    assert strategy("dynamic:num=3,alpha_range=[0.5, 1.5]").alpha_range == (0.5, 1.5)
    with pytest.raises(ValueError, match="alpha_range: expected numbers in brackets, got '0'"):
        strategy("dynamic:alpha_range=0,1")


def test_messages_of_a_line_have_roles(tmp_path):
    path = tmp_path / "talks.jsonl"
    for messages, fits in (([], False), ([{}], False), ([1], False), ([{"role": "user"}], True)):
        path.write_text(json.dumps({"messages": messages}))
        config = generate.Config(prompt_file=str(path))
        if fits:
            assert len(list(generate._entries(config, chat=True))) == 1
            continue
        with pytest.raises(ValueError, match="or `messages` with roles, got"):
            generate._entries(config, chat=True)


def test_conversations_keep_their_turns():
    tokenizer = load_tokenizer("tiny")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    tokenizer.chat_template = template + "{% if add_generation_prompt %}[assistant]{% endif %}"
    talk = generate.Conversation(tokenizer, "be brief")
    assert talk.ask("hi") == "[system]be brief[user]hi[assistant]"
    talk.answered("yes")
    assert talk.ask("so?").endswith("[user]hi[assistant]yes[user]so?[assistant]")


@pytest.mark.slow
def test_a_prompt_begins_with_the_mark_that_the_model_expects(tmp_path, capsys, monkeypatch):
    marked = with_mark(load_tokenizer("tiny"), 256)
    models.save_pretrained(load_model("tiny:3"), marked, tmp_path)
    asked, original = [], decoding.generate

    def generate_and_keep(model, prompts, **options):
        asked.extend(prompt.tolist() for prompt in prompts)
        return original(model, prompts, **options)

    monkeypatch.setattr(decoding, "generate", generate_and_keep)
    shown = printed(capsys, model=str(tmp_path), prompt=("abc",), **FEW)
    assert asked == [[256, *marked.encode("abc")]]
    assert shown.startswith("abc")

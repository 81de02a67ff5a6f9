import pytest

from logitjax.decoding import TextStream
from logitjax.models import load_tokenizer


def test_characters_come_whole():
    tokenizer = load_tokenizer("tiny")
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in tokenizer.encode("aé漢b")]
    assert pieces == ["a", "", "é", "", "", "漢", "b"]
    unfinished = tokenizer.encode("é")[:1]
    assert stream.push(unfinished) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.text == "aé漢b\N{REPLACEMENT CHARACTER}"


def test_text_that_may_become_a_stop_string_is_held_back():
    tokenizer = load_tokenizer("tiny")
    stream = TextStream(tokenizer, ["END", "\n\n"])
    assert stream.push(tokenizer.encode("one\n")) == "one"
    assert stream.push(tokenizer.encode("two EN")) == "\ntwo "
    assert stream.push(tokenizer.encode("TER ENDx")) == "ENTER "
    assert stream.stopped
    assert stream.text == "one\ntwo ENTER "
    assert tokenizer.decode(stream.tokens) == "one\ntwo ENTER END"
    assert stream.push(tokenizer.encode("more")) == ""
    assert stream.finish() == ""


def test_what_was_held_back_comes_at_the_end():
    tokenizer = load_tokenizer("tiny")
    stream = TextStream(tokenizer, ["END"])
    assert stream.push(tokenizer.encode("the EN")) == "the "
    assert stream.finish() == "EN"
    with pytest.raises(ValueError, match="stop_strings"):
        TextStream(tokenizer, [""])

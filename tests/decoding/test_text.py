import numpy as np
import pytest

from logitjax.decoding import TextOptions, TextStream
from logitjax.decoding._chunks import Generated, _Row, with_texts
from logitjax.decoding._requests import Request
from logitjax.models import load_tokenizer
from tests.models._marks import llama_like


def test_characters_come_whole():
    tokenizer = load_tokenizer("tiny")
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in tokenizer.encode("aé漢b")]
    assert pieces == ["a", "", "é", "", "", "漢", "b"]
    unfinished = tokenizer.encode("é")[:1]
    assert stream.push(unfinished) == ""
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert stream.text == "aé漢b\N{REPLACEMENT CHARACTER}"


def test_stop_strings_of_the_first_tokens_do_not_count():
    tokenizer = load_tokenizer("tiny")
    stream = TextStream(tokenizer, ["ab"], unstopped=3)
    tokens = tokenizer.encode("abababab")
    # One that begins among them does not count either.
    assert "".join(stream.push([token]) for token in tokens) == "abab"
    assert stream.stopped


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


def test_a_continuation_keeps_the_space_of_its_first_word():
    tokenizer, prompt, new = llama_like(), [0, 1, 2, 3], [4, 5, 6]
    alone, after = TextStream(tokenizer), TextStream(tokenizer, context=prompt)
    assert [alone.push([token]) for token in new] == ["Paris", " now", "."]
    assert [after.push([token]) for token in new] == [" Paris", " now", "."]
    assert after.finish() == ""
    assert (after.text, after.tokens) == (" Paris now.", new)
    # A text that only a mark stands before begins with no space.
    assert TextStream(tokenizer, context=[0]).push(new) == "Paris now."


def test_a_character_that_a_prompt_began_is_not_lost():
    tokenizer = load_tokenizer("tiny")
    *begun, last = tokenizer.encode("a漢")
    stream = TextStream(tokenizer, context=begun)
    shown = stream.push([last]) + stream.finish()
    assert shown == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("continues", [False, True])
def test_texts_with_and_without_a_look_between_go_on_alike(continues):
    text = TextOptions(tokenizer=llama_like(), continues=continues)
    request = Request(prompt=np.array([0, 1, 2, 3]), max_new_tokens=3)
    out = Generated(tokens=np.array([[4, 5, 6]]), lengths=np.array([3]), stopped=np.array([False]))
    row = _Row(text, request.prompt)
    shown = row.take(out.tokens[0], last=True)[1]
    assert with_texts(out, [request], text).texts == (shown,)
    assert shown == " " * continues + "Paris now."


@pytest.mark.parametrize(
    ("pattern", "text", "kept"),
    [
        ("sentence", 'Pi is 3.14, "so." And', 'Pi is 3.14, "so."'),
        (r"\d{2,}", "in 1984 it", "in 19"),
        ("sentence", "no end", "no end"),
    ],
)
def test_a_pattern_ends_the_text_with_its_first_match(pattern, text, kept):
    tokenizer = load_tokenizer("tiny")
    stream = TextStream(tokenizer, stop_pattern=pattern)
    shown = "".join(stream.push([token]) for token in tokenizer.encode(text))
    assert shown + stream.finish() == stream.text == kept
    assert stream.stopped == (kept != text)

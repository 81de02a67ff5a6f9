"""Names of tokens in answers: parts of characters, and tokens that decode alike."""

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, pre_tokenizers
from tokenizers import models as kinds

from logitjax.models import Tokenizer
from logitjax.serving._names import TokenNames


def byte_level():
    """Of c3, a9, c3 a9, ef bf bd (a true U+FFFD), f0 9f, 98 80, " a", "a", and a special token."""
    texts = ["Ã", "©", "Ã©", "ï¿½", "ðŁ", "ĺĢ", "Ġa", "a"]
    backend = Backend(kinds.BPE({text: i for i, text in enumerate(texts)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend)


def sentence_piece():
    """Of " a", "a", c3, a9, a new line by its byte; the decoder strips a space in front."""
    vocabulary = {"▁a": 0, "a": 1, "<0xC3>": 2, "<0xA9>": 3, "<0x0A>": 4}
    backend = Backend(kinds.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(backend)


def test_parts_of_characters_are_called_by_their_bytes():
    tokenizer = byte_level()
    names = TokenNames(tokenizer)
    assert [names(i) for i in range(9)] == [
        ("bytes:\\xc3", b"\xc3"),
        ("bytes:\\xa9", b"\xa9"),
        ("é", b"\xc3\xa9"),
        ("\N{REPLACEMENT CHARACTER}", b"\xef\xbf\xbd"),
        ("bytes:\\xf0\\x9f", b"\xf0\x9f"),
        ("bytes:\\x98\\x80", b"\x98\x80"),
        (" a", b" a"),
        ("a", b"a"),
        ("<end>", b"<end>"),
    ]
    # What the parts' bytes make together is what the tokens decode to.
    assert (names(4)[1] + names(5)[1]).decode() == tokenizer.decode([4, 5]) == "😀"


def test_tokens_that_decode_alike_keep_their_own_values():
    tokenizer = sentence_piece()
    names = TokenNames(tokenizer)
    assert tokenizer.decode([0]) == tokenizer.decode([1]) == "a"
    assert [names(i)[1] for i in range(5)] == [b" a", b"a", b"\xc3", b"\xa9", b"\n"]
    top = [(0, -1.0), (1, -2.0), (2, -3.0), (3, -4.0)]
    assert names.by_name(top, as_ids=False) == {
        " a": -1.0,
        "a": -2.0,
        "bytes:\\xc3": -3.0,
        "bytes:\\xa9": -4.0,
    }
    assert names.by_name(top[:2], as_ids=True) == {"token_id:0": -1.0, "token_id:1": -2.0}


def test_tokens_without_a_text_are_not_one():
    # A model's vocabulary may be padded beyond its tokenizer's.
    names = TokenNames(byte_level())
    assert names(9) == names(300) == names(301) == ("", b"")
    assert names.by_name([(300, -1.0), (301, -2.0)], as_ids=False) == {
        "": -1.0,
        "token_id:301": -2.0,
    }

"""Windows of text: what cannot be cut is refused."""

import pytest

from logitjax.data import token_windows


def test_a_window_holds_more_than_what_it_begins_with():
    text = [{"text": "abcd"}]
    with pytest.raises(ValueError, match="length: expected more than the 2 tokens that each"):
        token_windows(text, lambda t: t.encode(), count=1, length=2, start=[1, 2])
    with pytest.raises(ValueError, match=r"examples: expected a text, got \['prompt'\]"):
        token_windows([{"prompt": "a"}], lambda t: t.encode(), count=1, length=2)

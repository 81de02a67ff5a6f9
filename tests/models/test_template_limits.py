"""Chat templates that would never end, or never fit: each ends in one line, soon."""

import dataclasses

import pytest

from logitjax.models import load_tokenizer
from logitjax.storage import guard

MESSAGES = [{"role": "user", "content": "a question"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "longer"),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(40) }}", "longer"),
        # In the midst of one step.
        ("{{ 9 ** 99999999 }}", "longer"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        ("{{ [1] * 10 ** 10 }}", "memory"),
        ("{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
         "{% endfor %}", "memory"),
        ("{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}"
         "{% endfor %}{{ n.l }}", "longer"),
        ("{% for i in range(9999) %}{{ 'y' * 99999 }}{% endfor %}", "too much text"),
        ("{{ 'a' | center(9999999999) }}", "memory"),
        ("{{ '{:9999999999}'.format(1) }}", "refuses"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "nested too deeply"),
        ("{# " + "x" * (1 << 18) + " #}", "length"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)  # fmt: skip
def test_a_template_that_takes_too_much_is_refused_soon(monkeypatch, template, message):
    seconds = 0.05 if message == "longer" else 60
    monkeypatch.setattr(guard, "LIMITS", dataclasses.replace(guard.LIMITS, seconds=seconds))
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.render_chat(MESSAGES)
    assert "\n" not in str(error.value)
    # The next one is not the worse for it.
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert tokenizer.render_chat(MESSAGES) == "a question"


def test_a_long_conversation_may_be_joined_turn_by_turn():
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = (
        "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t ~ m.content %}"
        "{% endfor %}{{ n.t }}"
    )
    messages = [{"role": "user", "content": "x" * 2000}] * 200
    assert tokenizer.render_chat(messages) == "x" * 400_000

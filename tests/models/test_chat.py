"""Templates render as transformers renders them, and the right tokens are learnt under each."""

import json

import pytest
import tokenizers

from logitjax.models import Tokenizer, load_tokenizer
from tests.models._chat_templates import CONVERSATIONS, GOLDENS, TEMPLATES, TOOLS

# The habits of four families, in our own words.
QWEN3 = """\
{%- set state = namespace(last=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set state.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and loop.index0 > state.last %}
        {{- '[begin]' + m.role + '\\n<think>\\n\\n</think>\\n\\n' + m.content + '[end]\\n' }}
    {%- else %}
        {{- '[begin]' + m.role + '\\n' + m.content.split('</think>')[-1] + '[end]\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '[begin]assistant\\n' }}{% endif %}"""
PHI3 = (
    "{% for m in messages %}{{ '[' + m.role + ']\\n' + m.content + '[end]\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TWO_TURNS = [
    {"role": "user", "content": "hi?"},
    {"role": "assistant", "content": "yes."},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "bye."},
]


@pytest.fixture(scope="module")
def characters() -> Tokenizer:
    """Every character a token, but for the marks of turns."""
    marks = ["[begin]", "[end]", "[eos]", "[user]", "[assistant]", "<think>", "</think>"]
    alphabet = [*marks, *map(chr, range(32, 127)), "\n"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    )
    backend.add_special_tokens(marks)
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, eos_id=2)


def learnt(tokenizer: Tokenizer, template: str, messages=TWO_TURNS, **variables) -> str:
    tokenizer.chat_template = template
    tokens, mask = tokenizer.encode_chat(messages, **variables)
    assert tokenizer.decode(tokens) == tokenizer.render_chat(messages, **variables)
    return tokenizer.decode([t for t, m in zip(tokens, mask, strict=True) if m])


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_to_the_byte_as_transformers_does(characters, name):
    characters.chat_template = TEMPLATES[name]
    for number, conversation in enumerate(CONVERSATIONS):
        for tools in (None, TOOLS):
            try:
                text = characters.render_chat(
                    conversation, tools=tools, add_generation_prompt=number % 2 == 0
                )
            except ValueError:
                text = None
            assert text == GOLDENS[name][2 * number + (tools is not None)]


def test_a_turn_that_is_written_otherwise_when_others_follow_is_learnt_as_it_stands(characters):
    """The empty reasoning stands in the last turn only, and after the generation prompt."""
    assert learnt(characters, QWEN3) == "yes.[end]\n<think>\n\n</think>\n\nbye.[end]\n"
    thinking = [dict(m, content=m["content"].replace("yes", "so?</think>yes")) for m in TWO_TURNS]
    assert learnt(characters, QWEN3, thinking) == "yes.[end]\n<think>\n\n</think>\n\nbye.[end]\n"


def test_an_end_that_only_the_last_turn_has_is_learnt_there_alone(characters):
    assert learnt(characters, PHI3) == "yes.[end]\nbye.[end]\n[eos]"
    assert learnt(characters, PHI3, TWO_TURNS[:3]) == "yes.[end]\n"
    # Both endings begin with a bracket, which belongs to the token after the turn.
    assert characters.encode_chat(TWO_TURNS)[1].count(True) == len("yes.bye.") + 2 + 2 + 1


def test_a_message_that_the_template_drops_teaches_nothing(characters):
    last_only = "{% for m in messages[-2:] %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    assert learnt(characters, last_only) == "bye."


def test_a_template_that_marks_the_answers_is_believed(characters):
    marked = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}[end]{% endfor %}"
    )
    assert learnt(characters, marked) == "yes.bye."
    assert learnt(characters, marked, learn="user") == "[user]hi?[end][user]ok[end]"


def test_calls_of_tools_are_learnt_with_their_turn(characters):
    template = (
        "{% for m in messages %}{{ '[begin]' + m.role + ':' }}{{ m.content }}"
        "{% for c in m.tool_calls %}{{ c | tojson }}{% endfor %}[end]{% endfor %}"
        "{% if add_generation_prompt %}{{ '[begin]assistant:' }}{% endif %}{{ messages | length }}"
    )
    call = {"b": 1, "a": "<"}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "user", "content": "on"},
    ]
    # The number at the end keeps every part from being a prefix of the whole.
    assert learnt(characters, template, messages) == json.dumps(call) + "[end]"


def test_what_is_learnt_does_not_depend_on_the_day(characters):
    dated = Tokenizer(characters.backend, chat_template="{{ strftime_now('%Y-%m-%d') }}")
    assert dated.decode(dated.encode_chat(TWO_TURNS)[0]) == "2024-07-26"
    assert dated.render_chat(TWO_TURNS) > "2024-07-26"


def test_templates_cannot_reach_what_is_not_theirs(characters):
    for template, reason in [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses them"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{% for %}", "refuses them"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% set n = namespace(_a=1) %}", "no attribute '_a'"),
        ("{{ messages.append(1) }}", "refuses them"),
    ]:
        characters.chat_template = template
        with pytest.raises(ValueError, match=reason) as error:
            characters.render_chat(TWO_TURNS)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match=r"messages\[0\]\.content: expected a JSON value"):
        characters.render_chat([{"role": "user", "content": object()}])


def test_a_template_in_a_file_of_its_own_wins(characters, tmp_path):
    (tmp_path / "tokenizer.json").write_text(characters.backend.to_str())
    settings = {"eos_token": "[eos]", "chat_template": "old"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(str(tmp_path)).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text("new {{ eos_token }}")
    assert load_tokenizer(str(tmp_path)).render_chat([]) == "new [eos]"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | tojson }}")
    several = load_tokenizer(str(tmp_path))
    assert several.render_chat([]) == "new [eos]"
    assert several.render_chat([], tools=[{"name": "é<"}]) == '[{"name": "é<"}]'

"""Chat templates, rendered as transformers renders them."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from logitjax.models._template_limits import allowance, limited_sandbox
from logitjax.storage import require

Spans = list[tuple[int, int]]

# What `{% generation %}` blocks report to while a template runs: the text so far, and the spans.
_Track = tuple[list[str], Spans]


def render_template(template: str, variables: Mapping[str, Any]) -> tuple[str, Spans]:
    """The text that a chat template makes, and where its `{% generation %}` blocks lie in it.

    The environment is that of `transformers.apply_chat_template`: the immutable sandbox, blocks
    trimmed, `break` and `continue`, `raise_exception`, `strftime_now`, and a `tojson` that keeps
    the order of keys and escapes neither HTML nor other alphabets. It takes so long and makes so
    much text at the most (`storage.guard.LIMITS`).

    Args:
        template: Source in Jinja.
        variables: What it may use.

    Returns:
        The text and spans of characters.

    Raises:
        ValueError: The template is not Jinja, or ends in an error of whatever kind.
    """
    track: _Track = ([], [])
    try:
        with allowance(variables):
            compiled = _compiled(template)
            for block in compiled.generate(**variables, **{_TRACK: track}):
                track[0].append(block)
    except RecursionError:
        raise ValueError("chat template: nested too deeply") from None
    # A template is a program: any exception of Python's may come out of it.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"messages: the chat template refuses them ({reason})") from None
    return "".join(track[0]), track[1]


def plain(value: Any, name: str) -> Any:
    """A copy made of JSON's types, so that a template meets no methods but theirs.

    Raises:
        TypeError: Something else is in it.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
    raise TypeError(f"{name}: expected what JSON can say, got {type(value).__name__}")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: no fields that are None, reasoning under both its names.

    Raises:
        TypeError: A message is no mapping, or holds what JSON cannot say.
    """
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f"messages[{i}]: expected a mapping with role and content, "
                f"got {type(message).__name__}"
            )
        fields = {k: v for k, v in plain(message, f"messages[{i}]").items() if v is not None}
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((fields[n] for n in names if n in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        out.append(fields)
    return out


def has_generation(template: str) -> bool:
    """Whether a template says itself which parts the assistant wrote."""
    nodes = require("jinja2.nodes", extra="models")
    try:
        blocks = list(_environment().parse(template).find_all(nodes.CallBlock))
    except Exception:  # Rendering it says what is wrong.
        return False
    return any(
        isinstance(block.call.node, nodes.ExtensionAttribute)
        and block.call.node.name == "_generation"
        for block in blocks
    )


_TRACK = "logitjax generation track"  # no name that a template can spell


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@functools.cache
def _environment() -> Any:
    jinja2 = require("jinja2", extra="models")
    nodes = require("jinja2.nodes", extra="models")
    extensions = require("jinja2.ext", extra="models")

    class Generation(extensions.Extension):
        """`{% generation %} ... {% endgeneration %}`: its text, noted as the assistant's."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            track = nodes.ContextReference()
            return nodes.CallBlock(
                self.call_method("_generation", [track]), [], [], body
            ).set_lineno(line)

        def _generation(self, context: Any, caller: Any) -> str:
            text = caller()
            blocks, spans = context.parent[_TRACK]
            start = sum(map(len, blocks))
            spans.append((start, start + len(text)))
            return text

    class Namespace(jinja2.utils.Namespace):
        def __init__(*arguments: Any, **attributes: Any):
            self, *given = arguments
            values = dict(*given, **attributes)
            for name in values:
                _check_attribute(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_attribute(name)
            super().__setitem__(name, value)

    def _check_attribute(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace takes no attribute {name!r}")

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(message)

    environment = limited_sandbox()(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, extensions.loopcontrols],
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.globals["namespace"] = Namespace
    environment.globals["dict"] = _Dict()
    return environment


class _Dict:
    """`dict` for templates: the type itself would give access to its attributes."""

    def __call__(self, *arguments: Any, **entries: Any) -> dict:
        return dict(*arguments, **entries)

    def fromkeys(self, *arguments: Any) -> dict:
        return dict.fromkeys(*arguments)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )

"""The script of a process that renders chat templates, importing only Jinja.

Jinja's sandbox keeps a model's template from reaching Python, but not from running forever or
exhausting memory: here the system kills what takes too long or too much, at any step.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox

# A name that no template can spell.
_TRACK = "logitjax generation track"
# Address space in bytes; the interpreter and Jinja take 40 MB.
_MEMORY = 1 << 28


class _Generation(ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: its text, recorded as the assistant's."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        call = self.call_method("_generation", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _generation(self, context: Any, caller: Any) -> str:
        text = caller()
        blocks, spans = context.parent[_TRACK]
        start = sum(map(len, blocks))
        spans.append((start, start + len(text)))
        return text


class _Namespace(jinja2.utils.Namespace):
    """Jinja's sandbox without attributes that begin with `_`, which a template could exploit."""

    def __init__(*arguments: Any, **attributes: Any):
        # `self` may be the name of an attribute.
        self, *mappings = arguments
        values = dict(*mappings, **attributes)
        for name in values:
            _check_attribute(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no attribute {name!r}")


class _Dict:
    """`dict` for templates: the type itself would give access to its attributes."""

    def __call__(self, *arguments: Any, **entries: Any) -> dict:
        return dict(*arguments, **entries)

    def fromkeys(self, *arguments: Any) -> dict:
        return dict.fromkeys(*arguments)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes HTML and sorts.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _environment() -> Any:
    """The environment of `transformers.apply_chat_template`."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "namespace": _Namespace,
        "dict": _Dict(),
    }
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> tuple[Any, bool]:
    """A template, and whether it marks the parts that the assistant wrote."""
    blocks = _environment().parse(source).find_all(nodes.CallBlock)
    calls = [block.call.node for block in blocks]
    marks = any(isinstance(c, nodes.ExtensionAttribute) and c.name == "_generation" for c in calls)
    return _environment().from_string(source), marks


def _rendered(source: str, variables: dict[str, Any], most: int, day: str | None) -> dict[str, Any]:
    template, marks = _compiled(source)
    now = datetime.datetime.fromisoformat(day) if day else datetime.datetime.now()
    given = {"strftime_now": lambda form: now.strftime(form), **variables}
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    size = 0
    for block in template.generate(**given, **{_TRACK: (blocks, spans)}):
        size += len(block)
        if size > most:
            raise ValueError("it makes too much text")
        blocks.append(block)
    return {"text": "".join(blocks), "spans": spans, "marks": marks}


def _answer(line: bytes) -> str:
    request = json.loads(line)
    # The signal's default action ends the process, even in the middle of C code. It counts
    # processor time: on a busy machine, the wall clock measures other processes.
    signal.setitimer(signal.ITIMER_PROF, request.pop("seconds"))
    try:
        return json.dumps(_rendered(**request))
    except RecursionError:
        reason = "nested too deeply"
    except MemoryError:
        reason = "it takes too much memory"
    # A template is a program and may raise any Python exception.
    except Exception as error:
        reason = " ".join(str(error)[:1000].split()) or type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return json.dumps({"error": reason})


if __name__ == "__main__":
    # The parent handles the terminal's signal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    least = _MEMORY if most == resource.RLIM_INFINITY else min(_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (least, most))
    for request in sys.stdin.buffer:
        sys.stdout.write(_answer(request) + "\n")
        sys.stdout.flush()

"""The script of a process that renders chat templates, so that it imports Jinja and nothing else.

Jinja's sandbox keeps a model's template from reaching Python, not from running forever or taking
all memory: here the system ends what takes too long or too much, in the midst of whatever step.
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

# No name that a template can spell.
_TRACK = "logitjax generation track"
# Of addresses; the interpreter and Jinja take 40 MB.
_MEMORY = 1 << 28


class _Generation(ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: its text, noted as the assistant's."""

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
    """Jinja's own without attributes that begin with `_`, by which a template may get further."""

    def __init__(*arguments: Any, **attributes: Any):
        # `self` may be an attribute.
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
    # Jinja's own escapes HTML, and sorts.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.cache
def _environment() -> Any:
    """That of `transformers.apply_chat_template`."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": _Namespace,
        "dict": _Dict(),
    }
    return environment


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> tuple[Any, bool]:
    """A template, and whether it says itself which parts the assistant wrote."""
    blocks = _environment().parse(source).find_all(nodes.CallBlock)
    calls = [block.call.node for block in blocks]
    marks = any(isinstance(c, nodes.ExtensionAttribute) and c.name == "_generation" for c in calls)
    return _environment().from_string(source), marks


def _rendered(source: str, variables: dict[str, Any], most: int) -> dict[str, Any]:
    template, marks = _compiled(source)
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    size = 0
    for block in template.generate(**variables, **{_TRACK: (blocks, spans)}):
        size += len(block)
        if size > most:
            raise ValueError("it makes too much text")
        blocks.append(block)
    return {"text": "".join(blocks), "spans": spans, "marks": marks}


def _answer(line: bytes) -> str:
    asked = json.loads(line)
    # The signal's default ends the process, also in the midst of a step in C. Of the processor's
    # time: on a machine that is busy, the clock says what others do.
    signal.setitimer(signal.ITIMER_PROF, asked.pop("seconds"))
    try:
        return json.dumps(_rendered(**asked))
    except RecursionError:
        reason = "nested too deeply"
    except MemoryError:
        reason = "it takes too much memory"
    # A template is a program: any exception of Python's may come out of it.
    except Exception as error:
        reason = " ".join(str(error)[:1000].split()) or type(error).__name__
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return json.dumps({"error": reason})


if __name__ == "__main__":
    # That of the terminal is the parent's.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    least = _MEMORY if most == resource.RLIM_INFINITY else min(_MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (least, most))
    for request in sys.stdin.buffer:
        sys.stdout.write(_answer(request) + "\n")
        sys.stdout.flush()

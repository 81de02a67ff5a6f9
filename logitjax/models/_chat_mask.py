"""Characters of a rendered conversation that one role wrote, if the template does not mark them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from logitjax.models._chat import Spans

Render = Callable[..., str]

# From the private use area: no conversation has it, and no template trims or splits it.
_MARK = "\ue000\ue001\ue002"


def written_spans(
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    role: str,
    text: str,
    # Starts of tokens.
    boundaries: Sequence[int],
) -> Spans:
    """Spans of `text`, fully rendered, with what messages of `role` add beyond the prompt."""
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") != role:
            continue
        # If the text up to a message is a prefix of the whole, the span follows from the lengths. A
        # template may write a turn differently when others follow (Qwen3 drops earlier reasoning,
        # Phi-3 ends the last turn with one more token): then the message is replaced by a mark, and
        # the part that changes is the message.
        before = _attempt(render, messages[:i], add_generation_prompt=True)
        after = text if i + 1 == len(messages) else _attempt(render, messages[: i + 1])
        start = None if before is None or not text.startswith(before) else len(before)
        end = None if after is None or not text.startswith(after) else len(after)
        if start is None or end is None or start > end:
            changed = _changed(render, messages, i, text)
            if changed is None:
                continue
            first, last = changed
            start = first if start is None or start > first else start
            end = last + _ending(render, messages[: i + 1], after, text[last:])
            if end < len(text):
                # The common ending may stop inside a token, such as `<|` of two different ones.
                end = max([last, *(b for b in boundaries if last <= b <= end)])
        spans.append((start, end))
    return spans


def _attempt(render: Render, messages: Sequence[Any], **options: bool) -> str | None:
    """A shorter conversation's text; templates refuse some prefixes of a valid conversation."""
    try:
        return render(messages, **options)
    except ValueError:
        return None


def _changed(
    render: Render, messages: Sequence[Mapping[str, Any]], index: int, text: str
) -> tuple[int, int] | None:
    """The place of a message in `text`; None if it is not found."""
    message = messages[index]
    # Anything besides the content (tool calls, reasoning) is removed first, if possible.
    for marked in ({"role": message["role"], "content": _MARK}, {**message, "content": _MARK}):
        other = _attempt(render, [*messages[:index], marked, *messages[index + 1 :]])
        if other is None:
            continue
        if other == text:
            return None
        if other.count(_MARK) == 1:
            at = other.index(_MARK)
            first = _common(text, other[:at])
            ending = other[at + len(_MARK) :]
            last = _common(text[first:][::-1], ending[::-1])
            return first, len(text) - last
    raise ValueError(
        f"messages: the chat template does not show message {index} as one part, "
        "so its tokens cannot be told apart"
    )


def _ending(
    render: Render, messages: Sequence[Mapping[str, Any]], after: str | None, rest: str
) -> int:
    """Number of characters after the last message that end its turn, before the next begins."""
    changed = None if after is None else _changed(render, messages, len(messages) - 1, after)
    return 0 if after is None or changed is None else _common(after[changed[1] :], rest)


def _common(one: str, other: str) -> int:
    """Number of characters at the start that both share."""
    pairs = enumerate(zip(one, other))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))

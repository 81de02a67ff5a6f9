"""Conversion of rows of public data sets to the three forms that the library reads."""

import json
import os
from collections.abc import Mapping
from typing import Any

# Roles by the names of ShareGPT and later formats.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"}
_CALL = "function_call"
# Fields of a message that chat templates read besides role and content.
_EXTRAS = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")


def own_form(row: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row of a public data set to `text`, `prompt` and `response`, or `messages`.

    Instructions (Alpaca) and questions become a user's turn. Of a preference the chosen text is
    used; without a prompt, the common beginning of chosen and rejected text is the prompt. Turns of
    ShareGPT and lists of prompt and completion (TRL) become messages. Other rows are unchanged.

    >>> own_form({"instruction": "Add.", "input": "1, 2", "output": "3"})["messages"][0]["content"]
    'Add.\\n1, 2'
    >>> own_form({"chosen": "Q: 1+1? A: 2", "rejected": "Q: 1+1? A: 3"})
    {'prompt': 'Q: 1+1? A: ', 'response': '2'}
    """
    try:
        # In Parquet every row has every key.
        return _form({key: value for key, value in row.items() if value is not None})
    except (TypeError, AttributeError) as error:
        raise ValueError(f"expected texts, or lists of turns, of {sorted(row)} ({error})") from None


def _form(row: dict[str, Any]) -> dict[str, Any]:
    history: Any = ()
    if "instruction" in row:
        # Alpaca's rows repeat their content in a template.
        row.pop("text", None)
        more = row.pop("input", None)
        row["question"] = row.pop("instruction") + (f"\n{more}" if more else "")
        row["answer"] = row.pop("output", None)
        # LLaMA-Factory's rows have earlier questions with their answers.
        history = row.pop("history", ())
    if "question" in row:
        pairs = [*history, (row.pop("question"), row.pop("answer", None))]
        names = ("user", "assistant")
        turns = [(who, text) for pair in pairs for who, text in zip(names, pair, strict=True)]
        messages = [{"role": who, "content": text} for who, text in turns]
        return row | {"messages": _system(row) + messages}
    if "conversations" in row:
        turns = row.pop("conversations")
        row["messages"] = _system(row) + [_turn(**turn) for turn in turns]
    if "chosen" in row:
        # Some data sets hold the chosen turns twice.
        row.pop("messages", None)
        best, worse = row.pop("chosen"), row.pop("rejected", "")
        # They include the turns of the prompt.
        if isinstance(best, list) and len(best) > 1:
            row["prompt"] = []
        elif "prompt" not in row:
            begin = len(os.path.commonprefix([best, worse]))  # noqa: RUF071
            # Back to the end of a word.
            begin -= len(str(best[:begin]).split(" ")[-1])
            row["prompt"], best = best[:begin], best[begin:]
        row["completion"] = best
    if "completion" in row:
        prompt, completion = row.pop("prompt", ""), row.pop("completion")
        if isinstance(completion, list):
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            return row | {"messages": [*prompt, *completion]}
        return row | {"prompt": prompt, "response": completion}
    if "messages" in row and "response" not in row:
        # It repeats the first turn.
        row.pop("prompt", None)
    return row


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    text = row.pop("system", None)
    return [{"role": "system", "content": text}] if text else []


def _turn(**turn: Any) -> dict[str, Any]:
    who, content = turn.pop("from", turn.get("role")), turn.pop("value", turn.get("content"))
    return {**turn, "role": _ROLES.get(who, who), "content": content}


def normalise(row: Any, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Reduce a row to one of the three forms; raise a ValueError with the reason otherwise."""
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object, got {type(row).__name__}")
    keys = sorted(map(str, row))
    names: Mapping[Any, Any] = columns or {}
    row = own_form({names.get(key, key): value for key, value in row.items()})
    forms = [f for f in (("text",), ("prompt", "response"), ("messages",)) if f[0] in row]
    if len(forms) != 1:
        raise ValueError(
            "expected exactly one of 'text', 'prompt' + 'response' or 'messages', or rows of "
            f"Alpaca, ShareGPT, TRL or a preference, got the keys {keys!r}"
        )
    (form,) = forms
    kept: dict[str, Any] = {name: str(row[name]) for name in ("id", "teacher") if name in row}
    if form == ("messages",):
        kept |= {"messages": messages_of(row["messages"])}
        if tools := _parsed(row.get("tools")):
            _check_encodable("tools", json.dumps(tools, ensure_ascii=False, default=str))
            kept["tools"] = tools
        return kept
    for key in form:
        value = row.get(key)
        if not isinstance(value, str):
            raise ValueError(f"{key!r}: expected a string, got {type(value).__name__}")
        if key != "prompt" and not value.strip():
            raise ValueError(f"{key!r} is empty")
        _check_encodable(key, value)
        kept[key] = value
    return kept


def _check_encodable(key: str, value: str) -> None:
    # JSON may hold half a surrogate pair, on which tokenizers fail with a TypeError.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key!r}: expected Unicode text, got half a surrogate pair at character {error.start}"
        ) from None


def messages_of(messages: Any) -> list[dict[str, Any]]:
    """Convert turns to the names of chat templates; at least one must be the assistant's."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages': expected a list that is not empty")
    out = [_message(message) for message in messages]
    if not any(m["role"] == "assistant" for m in out):
        raise ValueError("'messages' has no message of role 'assistant', so nothing to learn from")
    return out


def _message(message: Any) -> dict[str, Any]:
    fields = message if isinstance(message, Mapping) else {}
    role, content = fields.get("role"), fields.get("content")
    extras = {name: fields[name] for name in _EXTRAS if fields.get(name) not in (None, [])}
    if role == _CALL and isinstance(content, str):
        role, extras, content = "assistant", {"tool_calls": [{"function": content}]}, ""
    if "tool_calls" in extras:
        extras["tool_calls"], content = _calls(extras["tool_calls"]), content or ""
    if not (isinstance(role, str) and isinstance(content, str)):
        raise ValueError(f"message: expected strings 'role' and 'content', got {message!r}")
    entries = {"role": role, "content": content}
    for key, value in entries.items():
        _check_encodable(key, value)
    _check_encodable("tool_calls", json.dumps(extras, ensure_ascii=False, default=str))
    return entries | extras


def _calls(calls: Any) -> list[dict[str, Any]]:
    """Check tool calls, and parse arguments stored as text, since templates need objects."""
    out = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = dict(call) if isinstance(call, Mapping) else {}
        function = _parsed(call.get("function", call))
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool_calls: expected functions with a name, got {calls!r}")
        arguments = _parsed(function.get("arguments")) or {}
        function = {**function, "arguments": arguments}
        out.append({"type": "function"} | call | {"function": function})
    return out


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        return value

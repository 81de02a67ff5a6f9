"""Chat templates in our own words, each with a habit of real ones, and what they render.

`GOLDENS` are what transformers made of them: `python -m tests.models.make_chat_goldens`, where
transformers is installed. A template that refuses a conversation has None there.
"""

import json
import pathlib

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What's the weather <now> & later? Größe 天気",
            "parameters": {
                "type": "object",
                "properties": {"z": {"type": "string"}, "a": {"type": "number"}},
                "required": ["z"],
            },
        },
    }
]
_CALL = {
    "id": "abc123456",
    "type": "function",
    "function": {"name": "weather", "arguments": {"z": "Zürich <b>", "a": 1.5}},
}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi there!\n"}],
    [
        {"role": "system", "content": "  Be brief. "},
        {"role": "user", "content": "What is 1 < 2 & 'three'?"},
        {"role": "assistant", "content": "True.", "reasoning_content": "Easy."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes — ja ✓"},
    ],
    [
        {"role": "user", "content": "Weather in Zürich?"},
        {"role": "assistant", "content": None, "tool_calls": [_CALL]},
        {"role": "tool", "content": '{"t": 7}', "tool_call_id": "abc123456", "name": "weather"},
        {"role": "assistant", "content": "Seven degrees."},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": "Parts"}]},
        {"role": "assistant", "content": "one"},
        {"role": "assistant", "content": "two"},
    ],
]

_HERE = pathlib.Path(__file__).parent
TEMPLATES = {
    file.stem: file.read_text() for file in sorted((_HERE / "chat_templates").glob("*.jinja"))
}
_GOLDENS = _HERE / "chat_goldens.json"
GOLDENS: dict[str, list[str | None]] = json.loads(_GOLDENS.read_text())

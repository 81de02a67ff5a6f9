"""Text to token ids and back, conversations under a chat template, and how much text a token is."""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitjax.storage import digest, require

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Tokenizer:
    """Text to token ids and back, with the ids a decoder needs to know.

    ``fingerprint`` is a sha256 of everything that decides the ids; two tokenizers with the same
    one encode alike.
    """

    def __init__(
        self,
        backend: Any,  # tokenizers.Tokenizer
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
        extra: dict[str, Any] | None = None,
    ):
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.chat_template = chat_template
        self.extra = dict(extra or {})
        self.fingerprint = digest(backend.to_str(), bos_id, eos_id, pad_id)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, add_bos: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens written out in it are recognised."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of one token's text, None where there is no such token."""
        return self.backend.token_to_id(token)

    def token(self, id: int) -> str | None:
        """The text form of one id, as the vocabulary spells it."""
        return self.backend.id_to_token(int(id))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation under the chat template.

        The template runs in jinja2's sandbox, as it comes with a downloaded model.

        Args:
          messages: dicts with ``role`` and ``content``.
          add_generation_prompt: end where the assistant's next answer begins.
          **variables: more names the template may use (``tools``, ``enable_thinking``...).

        Returns:
          The text, special tokens written out.

        Raises:
          ValueError: without a template, or where the template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("tokenizer: has no chat template, give the text itself")
        jinja2 = require("jinja2", extra="models")
        sandbox = require("jinja2.sandbox", extra="models")

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        names = {
            f"{name}_token": "" if id is None else self.token(id)
            for name, id in (
                ("bos", self.bos_id),
                ("eos", self.eos_id),
                ("pad", self.pad_id),
            )
        }
        try:
            return environment.from_string(self.chat_template).render(
                messages=[dict(m) for m in messages],
                add_generation_prompt=add_generation_prompt,
                **names,
                **variables,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"messages: the chat template refuses them ({error})") from None

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        learn: str = "assistant",
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them are to be learnt.

        The conversation is rendered up to every message; what a message of the role ``learn`` adds
        beyond the generation prompt (its text and its end-of-turn token) is to be predicted, the
        rest is context. The whole text is encoded at once, so that no token boundary is invented; a
        token counts as learnt where it begins inside such a part.

        Args:
          messages: dicts with ``role`` and ``content``.
          learn: the role to learn from.
          **variables: more names the template may use.

        Returns:
          ``(tokens, loss_mask)``, equally long; ``loss_mask[t]`` says that ``tokens[t]`` is a
          target.

        Raises:
          ValueError: as `render_chat`, and where the template rewrites earlier turns when later
            ones follow, so that the parts cannot be told apart.
        """
        text = self.render_chat(messages, **variables)
        spans = []
        for i, message in enumerate(messages):
            if message["role"] != learn:
                continue
            before = self.render_chat(messages[:i], add_generation_prompt=True, **variables)
            after = self.render_chat(messages[: i + 1], **variables)
            if not (text.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"messages: the chat template changes message {i} when others follow, "
                    "so its tokens cannot be told apart"
                )
            spans.append((len(before), len(after)))
        encoded = self.backend.encode(text, add_special_tokens=False)
        mask = [any(a <= start < b for a, b in spans) for start, _ in encoded.offsets]
        return encoded.ids, mask

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of text that each token stands for: what aligns two tokenizations of a text.

        Byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM2) spell every byte as one character;
        SentencePiece vocabularies (Llama 2, Mistral, Gemma) spell text as it is, a space as one
        lower block and stray bytes as ``<0xNN>``.

        Returns:
          int64 ``[vocab_size]``; 0 for special tokens and unused ids.

        >>> from tokenizers import Tokenizer as Backend, models
        >>> backend = Backend(models.BPE({"a": 0, "▁the": 1, "<0x0A>": 2}, [], byte_fallback=True))
        >>> Tokenizer(backend).byte_lengths().tolist()
        [1, 4, 1]
        """
        description = json.loads(self.backend.to_str())
        special = {t["id"] for t in description["added_tokens"] if t["special"]}
        added = {t["id"] for t in description["added_tokens"]}
        byte_level = "ByteLevel" in json.dumps(
            [description["pre_tokenizer"], description["decoder"]]
        )
        lengths = np.zeros(self.vocab_size, np.int64)
        for text, id_ in self.backend.get_vocab(with_added_tokens=True).items():
            if id_ in special:
                continue
            if byte_level and id_ not in added:
                lengths[id_] = len(text)
            elif _BYTE.fullmatch(text):
                lengths[id_] = 1
            else:
                lengths[id_] = len(text.replace("▁", " ").encode())
        return lengths

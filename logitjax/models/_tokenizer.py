"""Text to token ids and back, conversations under a chat template, and token bytes."""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from logitjax.models._chat import Spans, plain, plain_messages, render_template
from logitjax.models._chat_mask import written_spans
from logitjax.storage import digest, guard

# SentencePiece's bytes.
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# GPT-2's characters and their bytes: printable ones unchanged (! to ~, ¡ to ¬, ® to ÿ), others from
# 256.
_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PLAIN]
_BYTE_OF = {chr(byte): bytes([byte]) for byte in _PLAIN}
_BYTE_OF |= {chr(256 + i): bytes([byte]) for i, byte in enumerate(_OTHERS)}
# The day of texts to learn.
_DAY = "2024-07-26"


class Tokenizer:
    """Text to token ids and back, with the ids that a decoder needs.

    `fingerprint` is a sha256 of everything that determines the ids: tokenizers with the same
    fingerprint encode alike. `chat_template` is one template, or several by name (`default` and
    `tool_use`). `special_tokens` are the texts of `bos_token` and so on in templates. `add_bos` is
    whether the model expects every text to begin with `bos_id` (Gemma, Llama, Mistral), set from
    the backend's post-processor as in transformers 5. A Gemma without the BOS token predicts
    nothing useful. A chat template may take `template_seconds` of processor time.
    """

    def __init__(
        self,
        # tokenizers.Tokenizer.
        backend: Any,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        extra: dict[str, Any] | None = None,
    ):
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.chat_template = chat_template
        ids = {"bos": bos_id, "eos": eos_id, "pad": pad_id}
        names = {f"{n}_token": self.token(id) for n, id in ids.items() if id is not None}
        self.special_tokens = names if special_tokens is None else dict(special_tokens)
        self.extra = dict(extra or {})
        self.template_seconds = guard.LIMITS.seconds
        self.fingerprint = digest(backend.to_str(), bos_id, eos_id, pad_id)
        # Whether the backend itself writes it before any text.
        self.add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def start(self) -> list[int]:
        """The ids that a text begins with: `bos_id` if the model expects it, otherwise none."""
        return [self.bos_id] if self.add_bos and self.bos_id is not None else []

    def encode(self, text: str, add_bos: bool | None = False) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it are recognised.

        Args:
            add_bos: whether to begin with the BOS token (once, even if the text spells it out);
                None for a text from its beginning, as the model expects it.
        """
        ids = self.backend.encode(text, add_special_tokens=False).ids
        add_bos = self.add_bos if add_bos is None else add_bos
        # Chat templates spell the token out.
        if not add_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """The text of token ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        """The id of one token's text, None if there is no such token."""
        return self.backend.token_to_id(token)

    def token(self, id: int) -> str | None:
        """The text form of one id, as spelled in the vocabulary."""
        return self.backend.id_to_token(int(id))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation under the chat template, byte for byte as in transformers.

        The template runs in jinja2's sandbox, because it comes with a downloaded model. Special
        tokens are spelled out.

        Args:
            messages: dicts with `role` and `content`, and other fields that a template reads
                (`tool_calls`, `reasoning_content`...); fields that are None are ignored.
            tools: JSON schemas of functions. If the tokenizer has several templates, the one named
                `tool_use` is used for them.
            documents: dicts with `title` and `text`.
            add_generation_prompt: end where the assistant's next answer begins.
            **variables: further variables for the template (`enable_thinking`...).

        Raises:
            ValueError: without a template, or if the template refuses the messages.
            TypeError: if something is not of JSON's types.
        """
        return self._rendered(messages, tools, documents, add_generation_prompt, variables)[0]

    def _template(self, tools: Any) -> str:
        template = self.chat_template
        if isinstance(template, Mapping):
            name = "tool_use" if tools is not None and "tool_use" in template else "default"
            if name not in template:
                raise ValueError(
                    f"tokenizer: has the chat templates {sorted(template)} and no default, "
                    "set tokenizer.chat_template to one of them"
                )
            template = template[name]
        if template is None:
            raise ValueError("tokenizer: has no chat template, so pass the text itself")
        return template

    def _rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        documents: Any,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        day: str | None = None,
    ) -> tuple[str, Spans | None]:
        return render_template(
            self._template(tools),
            {
                **self.special_tokens,
                **{name: plain(value, name) for name, value in variables.items()},
                "messages": plain_messages(messages),
                "tools": plain(tools, "tools"),
                "documents": plain(documents, "documents"),
                "add_generation_prompt": add_generation_prompt,
            },
            self.template_seconds,
            day,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        learn: str = "assistant",
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and the mask of those to learn.

        If a template marks the assistant's text (`{% generation %}`), tokens that overlap a marked
        part are learned, as in transformers. Under any other template, the part that a message of
        the role `learn` adds beyond the generation prompt (its text and its end-of-turn token) is
        learned; a token counts if it begins inside that part. The whole text is encoded at once, so
        no token boundary is artificial. A template that asks for the day is told 26 July 2024, as
        Llama 3's say by themselves, so that rows packed on different days are the same.

        Messages, tools and variables are those of `render_chat`.

        Returns:
            `(tokens, loss_mask)`, equally long; `loss_mask[t]` says that `tokens[t]` is a target.

        Raises:
            ValueError: as for `render_chat`, and if the template shows a message in several parts.
        """
        documents = variables.pop("documents", None)
        rendered = functools.partial(self._rendered, day=_DAY)

        def render(messages: Sequence[Any], add_generation_prompt: bool = False) -> str:
            return rendered(messages, tools, documents, add_generation_prompt, variables)[0]

        text, spans = rendered(messages, tools, documents, False, variables)
        encoded = self.backend.encode(text, add_special_tokens=False)
        if learn == "assistant" and spans is not None:
            mask = [any(s < b and e > a for a, b in spans) for s, e in encoded.offsets]
            return encoded.ids, mask
        starts = [start for start, _ in encoded.offsets]
        spans = written_spans(render, messages, learn, text, starts)
        return encoded.ids, [any(a <= start < b for a, b in spans) for start in starts]

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes of each token's text, int64 `[vocab_size]`; 0 for special and unused ids."""
        return np.array([len(text) for text in self.token_bytes()], np.int64)

    def token_bytes(self) -> tuple[bytes, ...]:
        """The bytes of each token's text; empty for special tokens and unused ids.

        Byte-level vocabularies (GPT-2, Llama 3, Qwen, SmolLM2) spell every byte as one character;
        SentencePiece vocabularies (Llama 2, Mistral, Gemma) spell text unchanged, a space as one
        lower block and stray bytes as `<0xNN>`.

        >>> from tokenizers import Tokenizer as Backend, models
        >>> backend = Backend(models.BPE({"a": 0, "▁the": 1, "<0x0A>": 2}, [], byte_fallback=True))
        >>> Tokenizer(backend).token_bytes()
        (b'a', b' the', b'\\n')
        """
        return self._token_bytes

    @functools.cached_property
    def _token_bytes(self) -> tuple[bytes, ...]:
        description = json.loads(self.backend.to_str())
        added = {t["id"]: t["special"] for t in description["added_tokens"]}
        byte_level = "ByteLevel" in json.dumps(
            [description["pre_tokenizer"], description["decoder"]]
        )
        out = [b""] * self.vocab_size
        for text, id_ in self.backend.get_vocab(with_added_tokens=True).items():
            if added.get(id_):
                continue  # of no text
            # An added token is plain text, also in byte-level vocabularies.
            if byte_level and id_ not in added:
                out[id_] = b"".join(_BYTE_OF[c] if c in _BYTE_OF else c.encode() for c in text)
            elif _BYTE.fullmatch(text):
                out[id_] = bytes([int(text[3:5], 16)])
            else:
                # SentencePiece's space.
                out[id_] = text.replace("▁", " ").encode()
        return tuple(out)

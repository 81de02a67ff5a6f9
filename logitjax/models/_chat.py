"""Chat templates, and which tokens of a conversation a model should learn to predict."""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from logitjax.models._tokenizer import Tokenizer
from logitjax.storage import require


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation under the tokenizer's chat template.

    The template runs in jinja2's sandbox, as it comes with a downloaded model.

    Args:
      tokenizer: one with a ``chat_template``.
      messages: dicts with ``role`` and ``content``.
      add_generation_prompt: end where the assistant's next answer begins.
      **variables: more names the template may use (``tools``, ``enable_thinking``...).

    Returns:
      The text, special tokens written out.

    Raises:
      ValueError: without a template, or where the template refuses the messages.
    """
    if tokenizer.chat_template is None:
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
        f"{name}_token": "" if id is None else tokenizer.token(id)
        for name, id in (
            ("bos", tokenizer.bos_id),
            ("eos", tokenizer.eos_id),
            ("pad", tokenizer.pad_id),
        )
    }
    try:
        return environment.from_string(tokenizer.chat_template).render(
            messages=[dict(m) for m in messages],
            add_generation_prompt=add_generation_prompt,
            **names,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"messages: the chat template refuses them ({error})") from None


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    learn: str = "assistant",
    **variables: Any,
) -> tuple[list[int], list[bool]]:
    """Tokens of a conversation, and which of them are to be learnt.

    The conversation is rendered up to every message; what a message of the role ``learn`` adds
    beyond the generation prompt (its text and its end-of-turn token) is to be predicted, the rest
    is context. The whole text is encoded at once, so that no token boundary is invented; a token
    counts as learnt where it begins inside such a part.

    Args:
      tokenizer: one with a chat template.
      messages: dicts with ``role`` and ``content``.
      learn: the role to learn from.
      **variables: more names the template may use.

    Returns:
      ``(tokens, loss_mask)``, equally long; ``loss_mask[t]`` says that ``tokens[t]`` is a target.

    Raises:
      ValueError: as `render_chat`, and where the template rewrites earlier turns when later ones
        follow, so that the parts cannot be told apart.
    """
    text = render_chat(tokenizer, messages, **variables)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != learn:
            continue
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True, **variables)
        after = render_chat(tokenizer, messages[: i + 1], **variables)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"messages: the chat template changes message {i} when others follow, "
                "so its tokens cannot be told apart"
            )
        spans.append((len(before), len(after)))
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    mask = [any(a <= start < b for a, b in spans) for start, _ in encoded.offsets]
    return encoded.ids, mask

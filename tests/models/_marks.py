"""A tokenizer whose model expects a beginning mark."""

import tokenizers

from logitjax.models import Tokenizer


def with_mark(tokenizer: Tokenizer, mark: int) -> Tokenizer:
    """The same vocabulary; texts begin with the token of id `mark`, as its file says."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    text = tokenizer.token(mark)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[text, "$A"], special_tokens=[(text, mark)]
    )
    return Tokenizer(
        backend,
        bos_id=mark,
        eos_id=tokenizer.eos_id,
        pad_id=tokenizer.pad_id,
        chat_template=tokenizer.chat_template,
    )

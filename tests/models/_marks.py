"""Tokenizers that treat the beginning of a text in a way of its own."""

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


def llama_like() -> Tokenizer:
    """A few words; a space at the beginning of a text is taken off, as by Llama-2's decoder."""
    pieces = ["<s>", "▁The", "▁capital", "▁is", "▁Paris", "▁now", "."]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({piece: i for i, piece in enumerate(pieces)}, [])
    )
    backend.add_special_tokens(["<s>"])
    decoders = tokenizers.decoders
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, bos_id=0)

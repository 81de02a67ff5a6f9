"""What a student has written, in the tokens of a teacher of another tokenizer."""

from collections.abc import Mapping

import numpy as np

from logitjax.distillation.tokenizers._token_pieces import prefix_bytes
from logitjax.models import Tokenizer


class Rereader:
    """Encodes a student's rows anew.

    Sampled tokens are often not what their text encodes to, and may end inside a character: the
    text is taken from their bytes, up to the first that is no UTF-8. Bytes then align the rows, and
    nothing is learned behind.
    """

    def __init__(self, ours: Tokenizer, theirs: Tokenizer):
        self._bytes, self._prefix, self._theirs = ours.token_bytes(), prefix_bytes(ours), theirs

    def row(self, tokens: np.ndarray, length: int, *, stopped: bool) -> Mapping[str, np.ndarray]:
        """Columns `[length]` of a document; all of its tokens but the first are predicted."""
        # The space that the student's tokenizer writes first is none of the text.
        raw = b"".join(self._bytes[token] for token in tokens.tolist())[self._prefix :]
        try:
            text, whole = raw.decode(), True
        except UnicodeDecodeError as error:
            text, whole = raw[: error.start].decode(), False
        tokenizer = self._theirs
        ids = tokenizer.encode(text, add_bos=tokenizer.add_bos)
        # A text that was cut short did not end there, so it teaches no stop.
        if stopped and whole and tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
        here, place = np.array(ids[:length], np.int32), np.arange(length, dtype=np.int32)
        inside = place < len(here)
        return {
            "tokens": np.pad(here, (0, length - len(here))),
            "segment_ids": inside.astype(np.int32),
            "positions": np.where(inside, place, 0),
            "loss_mask": inside & (place > 0),
        }

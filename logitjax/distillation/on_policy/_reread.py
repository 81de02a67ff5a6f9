from collections.abc import Mapping

import numpy as np

from logitjax.distillation.tokenizers._token_pieces import prefix_bytes, turn_ends
from logitjax.models import Tokenizer


class Rereader:
    """Re-encodes a student's rows from the bytes of its tokens, up to the first invalid UTF-8.

    Sampled tokens often differ from the encoding of their text, and may end inside a character.
    Bytes then align the rows, and nothing after that is learned. In a conversation (`chat`) only
    the answer is encoded, because the preceding text has another template here.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer, *, chat: bool = False):
        if chat and prefix_bytes(teacher):
            # Bytes of an answer are counted from its beginning, where a space would add one.
            raise ValueError("teacher: expected a tokenizer that adds no space, got one that does")
        self._bytes, self._theirs, self._chat = student.token_bytes(), teacher, chat
        self._prefix = 0 if chat else prefix_bytes(student)
        ends = [] if teacher.eos_id is None else [teacher.eos_id]
        self._ends = turn_ends(teacher) if chat else ends

    def row(
        self, tokens: np.ndarray, text_row: Mapping[str, np.ndarray], *, start: int, stopped: bool
    ) -> Mapping[str, np.ndarray]:
        """The teacher's columns `[length]`; the first `start` tokens are those of a row of text."""
        length = len(text_row["tokens"])
        before = int(np.argmax(text_row["loss_mask"])) if self._chat else 0
        written = tokens[start if self._chat else 0 :]
        # The space that the student's tokenizer writes first is not part of the text.
        raw = b"".join(self._bytes[token] for token in written.tolist())[self._prefix :]
        try:
            text, whole = raw.decode(), True
        except UnicodeDecodeError as error:
            text, whole = raw[: error.start].decode(), False
        ids = self._theirs.encode(text, add_bos=self._theirs.add_bos and not self._chat)
        # A truncated text did not end there, so it teaches no stop.
        ids = [*text_row["tokens"][:before], *ids, *(self._ends if stopped and whole else ())]
        here, location = np.array(ids[:length], np.int32), np.arange(length, dtype=np.int32)
        inside = location < len(here)
        return {
            "tokens": np.pad(here, (0, length - len(here))),
            "segment_ids": inside.astype(np.int32),
            "positions": np.where(inside, location, 0),
            "loss_mask": inside & (location >= max(before, 1)),
        }

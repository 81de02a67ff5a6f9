from collections.abc import Mapping

import numpy as np

from logitjax.distillation.tokenizers._token_pieces import prefix_bytes, turn_ends
from logitjax.models import Tokenizer


class Rereader:
    """Re-encode a student's rows, from the bytes of its tokens up to the first invalid UTF-8.

    Sampled tokens often differ from what their text encodes to, and may end inside a character.
    Rows are aligned by bytes, and nothing is learned after invalid ones. In a conversation (`chat`)
    only the answer is encoded, since the teacher's template differs before it.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer, *, chat: bool = False):
        if chat and prefix_bytes(teacher):
            # The bytes of an answer are counted from its beginning, where a space would add one.
            raise ValueError("teacher: expected a tokenizer that adds no space, got one that does")
        self._bytes, self._teacher, self._chat = student.token_bytes(), teacher, chat
        self._prefix = 0 if chat else prefix_bytes(student)
        ends = [] if teacher.eos_id is None else [teacher.eos_id]
        self._ends = turn_ends(teacher) if chat else ends

    def row(
        self, tokens: np.ndarray, text_row: Mapping[str, np.ndarray], *, start: int, stopped: bool
    ) -> Mapping[str, np.ndarray]:
        """Return the teacher's columns `[length]`; the first `start` tokens are a row of text's."""
        length = len(text_row["tokens"])
        before = int(np.argmax(text_row["loss_mask"])) if self._chat else 0
        written = tokens[start if self._chat else 0 :]
        # The space that the student's tokenizer writes first is not part of the text.
        raw = b"".join(self._bytes[token] for token in written.tolist())[self._prefix :]
        try:
            text, complete = raw.decode(), True
        except UnicodeDecodeError as error:
            text, complete = raw[: error.start].decode(), False
        ids = self._teacher.encode(text, add_bos=self._teacher.add_bos and not self._chat)
        # A text that was cut short did not end there, so it gets no stop token.
        ids = [*text_row["tokens"][:before], *ids, *(self._ends if stopped and complete else ())]
        here, location = np.array(ids[:length], np.int32), np.arange(length, dtype=np.int32)
        inside = location < len(here)
        return {
            "tokens": np.pad(here, (0, length - len(here))),
            "segment_ids": inside.astype(np.int32),
            "positions": np.where(inside, location, 0),
            "loss_mask": inside & (location >= max(before, 1)),
        }

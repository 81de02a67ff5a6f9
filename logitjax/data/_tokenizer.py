"""Methods of a tokenizer that packing and scoring need."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class TokenizerLike(Protocol):
    """Text to token ids and back, like `logitjax.models.Tokenizer`.

    ``fingerprint`` changes whenever any encoding could. A tokenizer whose model expects a
    beginning-of-sequence token may have ``add_bos = True``, which :func:`logitjax.data.pack` obeys.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def pad_id(self) -> int | None: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, text: str, add_bos: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

"""Heads that write themselves to a directory."""

import os
from typing import Any

import numpy as np

from logitjax.heads import VocabularyHead
from logitjax.storage import write_head


class SavedHead(VocabularyHead):
    """A head with `save`."""

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``head.safetensors`` and ``head.json``, which `load_head` reads."""
        tensors, options = self._record()
        write_head(directory, {"kind": type(self).__name__, "options": options}, tensors)

    def _record(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays, and the other arguments of the constructor."""
        raise NotImplementedError

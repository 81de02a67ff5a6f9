import dataclasses
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from logitjax import decoding, training


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Options of on-policy distillation: how much of each batch the student writes, and how.

    A row that it writes begins like a row of the text: with everything before the first answer of a
    conversation, or with the beginning of a document.

    Attributes:
        share: Share of the rows of a batch that the student writes; the others are rows of the
            text.
        generate_every: Number of updates per round of sampling. All but the first of them learn
            from samples of an older student.
        prompt_tokens: Maximum number of tokens of a prompt; half of a row if 0. Conversations with
            a longer one remain text.
        new_tokens: Maximum number of new tokens; the rest of a row if 0.
        temperature: Sampling temperature.
        sample_top_k: Number of most likely tokens to sample from; all if 0.
        sample_top_p: Total probability of the most likely tokens to sample from.
        truncated: Whether samples cut off at the maximum length are learned from (`'keep'`) or not
            (`'drop'`); `'auto'` drops answers in conversations, which should have an end.
    """

    share: float = 0.0
    generate_every: int = 1
    prompt_tokens: int = 0
    new_tokens: int = 0
    temperature: float = 1.0
    sample_top_k: int = 0
    sample_top_p: float = 1.0
    truncated: Literal["auto", "keep", "drop"] = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"on_policy: expected a share of the rows, got {self.share}")
        for name, least in (("generate_every", 1), ("prompt_tokens", 0), ("new_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.truncated not in ("auto", "keep", "drop"):
            raise ValueError(
                f"truncated: expected 'auto', 'keep' or 'drop', got {self.truncated!r}"
            )
        # Building it validates the options.
        _ = self.sampling

    @property
    def sampling(self) -> decoding.Sampling:
        """The sampling options of the decoder."""
        return decoding.Sampling(
            temperature=self.temperature, top_k=self.sample_top_k, top_p=self.sample_top_p
        )

    def lengths(self, seq_len: int) -> tuple[int, int]:
        """Maximum lengths of a prompt and of its continuation; ValueError if they exceed a row."""
        prompt = self.prompt_tokens or seq_len // 2
        new = self.new_tokens or seq_len - prompt
        if new < 1 or prompt + new > seq_len:
            raise ValueError(
                f"new_tokens: expected at most {seq_len - prompt}, as prompts of {prompt} tokens "
                f"leave of seq_len={seq_len}, got {new}"
            )
        return prompt, new

    def rows(self, batch_size: int) -> np.ndarray:
        """Rows of a global batch that the student writes, evenly spaced; ValueError for none.

        >>> OnPolicy(share=0.5).rows(4)
        array([1, 3])
        """
        # Rounded first: 0.3 * 10 is 3.0000000000000004 - 4e-16 on a bad day.
        before = np.floor(np.round(np.arange(batch_size + 1) * self.share, 6))
        rows = np.flatnonzero(np.diff(before))
        if self.share and not len(rows):
            raise ValueError(
                f"on_policy: expected a share of at least one of {batch_size} rows, got "
                f"{self.share}"
            )
        return rows

    def expected(self, batch_size: int, seq_len: int, mesh: Mesh) -> dict[str, Any]:
        """Return zeros of the shapes that this process's rows will have once they are written."""
        if not self.share:
            return {}
        log_probs = np.full((batch_size, seq_len - 1), np.nan, np.float32)
        log_probs[self.rows(batch_size)] = 0.0
        return {"columns": {"log_probs": log_probs[training.BatchLayout(mesh).rows(batch_size)]}}

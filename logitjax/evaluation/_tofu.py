"""The TOFU benchmark."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from logitjax.data import TofuItem, Tokenizer
from logitjax.evaluation._encode import PromptTemplate
from logitjax.evaluation._nll import NllFn

# (prompts, most new tokens) -> what follows each prompt, without the prompt.
GenerateFn = Callable[[list[np.ndarray], int], Sequence[Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TofuEvaluation:
    """What TOFU says about a model."""

    model_utility: float | None
    forget_quality: Any

    def table(self) -> str:
        """A Markdown table."""
        raise NotImplementedError


def evaluate_tofu(
    nll_fn: NllFn,
    generate_fn: GenerateFn | None,
    tokenizer: Tokenizer,
    sets: Mapping[str, Sequence[TofuItem]],
    *,
    template: PromptTemplate,
    reference_logs: Any = None,
    workdir: str | os.PathLike[str] | None = None,
    model_fingerprint: str = "",
    batch_size: int = 16,
    max_length: int = 200,
    max_new_tokens: int = 200,
) -> TofuEvaluation:
    """Runs the benchmark."""
    raise NotImplementedError

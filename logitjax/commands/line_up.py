"""The models that `generate` and `serve` load: one, several fused, or one less its assistant."""

from typing import Any

from logitjax import decoding, models, unlearning
from logitjax.commands.strategies import strategy


def load_line_up(config: Any) -> tuple[decoding.Ensemble, models.Tokenizer, tuple[int, ...]]:
    """What a command's flags name.

    Args:
        config: With `model`, `expert`, `base`, `fusion`, `assistant`, `alpha` and `dtype`.

    Returns:
        As `decoding.load_ensemble`.

    Raises:
        FileNotFoundError: There is no such assistant.
        ValueError: Flags that do not fit together, or models that do not.
    """
    if config.assistant is None:
        if config.alpha is not None:
            raise ValueError("alpha: expected an assistant to weigh, got none")
        return decoding.load_ensemble(
            config.model, config.expert, config.base, strategy(config.fusion), dtype=config.dtype
        )
    if config.expert or config.base or config.fusion:
        raise ValueError("assistant: expected no expert, base or fusion beside it")
    model, tokenizer = models.load(
        config.model, dtype=config.dtype, param_dtype=config.dtype, layout="listed"
    )
    deployed = unlearning.load_assistant(
        config.assistant, models.with_layout(model, "listed"), alpha=config.alpha
    )
    ends = {*model.config.eos_ids, *[i for i in (tokenizer.eos_id,) if i is not None]}
    return deployed.line_up(), tokenizer, tuple(sorted(ends))

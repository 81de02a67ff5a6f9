"""The models that `generate` and `serve` load: one, several fused, or one less its assistant."""

from typing import Protocol, runtime_checkable

from etils import epath

from logitjax import decoding, models, unlearning
from logitjax.commands.strategies import strategy


@runtime_checkable
class LineUp(Protocol):
    """The flags that name models."""

    @property
    def model(self) -> str: ...
    @property
    def expert(self) -> tuple[str, ...]: ...
    @property
    def base(self) -> tuple[str, ...]: ...
    @property
    def fusion(self) -> str | None: ...
    @property
    def assistant(self) -> str | None: ...
    @property
    def alpha(self) -> float | None: ...
    @property
    def dtype(self) -> str: ...


def load_line_up(config: LineUp) -> tuple[decoding.Ensemble, models.Tokenizer, tuple[int, ...]]:
    """What a command's flags name.

    Args:
        config: A command's.

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
    # Before the model's weights are read.
    record = epath.Path(config.assistant) / "assistant.json"
    if not record.exists():
        raise FileNotFoundError(f"assistant: no such file: {record}")
    model, tokenizer = models.load(
        config.model, dtype=config.dtype, param_dtype=config.dtype, layout="listed"
    )
    deployed = unlearning.Deployed.load(
        models.with_layout(model, "listed"), config.assistant, alpha=config.alpha
    )
    ends = {*model.config.eos_ids, *[i for i in (tokenizer.eos_id,) if i is not None]}
    return deployed.line_up(), tokenizer, tuple(sorted(ends))


def longest(*specs: str) -> int:
    """Most tokens that each of some models can read; no weights are read for it."""
    return min(models.load_config(spec).max_length for spec in specs)

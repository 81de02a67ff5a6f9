"""Load several models by name as one ensemble."""

from collections.abc import Callable, Sequence
from typing import Any

from logitjax import fusion, models
from logitjax.decoding._ensemble import Ensemble


def load_ensemble(
    large: str,
    experts: Sequence[str] = (),
    bases: Sequence[str] = (),
    fuse: Any = None,
    *,
    dtype: str = "float32",
    quantize: str | None = None,
    head: Callable[[models.Decoder], Any] | None = None,
) -> tuple[Ensemble, models.Tokenizer, tuple[int, ...]]:
    """Load models by name as one ensemble.

    Small models with another tokenizer than the large one are fused over their common tokens.

    Args:
        large: The model that is steered, or that decodes alone; as for `logitjax.models.load`.
        experts: Tuned small models.
        bases: Models that the experts were tuned from: one for all, or one for each.
        fuse: Strategy of `logitjax.fusion`; None for the large model alone.
        dtype: Type of parameters and computation.
        quantize: Type of the weights, as for `logitjax.models.load_model`; None for `dtype`.
        head: Gives the head that the large model decodes with, from the model as loaded; None for
            its own.

    Returns:
        The ensemble, the large model's tokenizer, and the tokens that end an answer, ascending.

    Raises:
        ValueError: Small models without a strategy, a strategy with the wrong number of models, or
            small models that number their tokens differently.
    """
    small = (*experts, *bases)
    if (fuse is None) == bool(small):
        raise ValueError("fusion: experts or bases need a strategy, and a strategy needs them")
    # Before any weights are read.
    _check_members(fuse, len(experts), len(bases))
    tokenizer = models.load_tokenizer(large)
    maps = {fusion.vocabulary_map(tokenizer, models.load_tokenizer(s)) for s in small}
    if len(maps) > 1:
        raise ValueError("expert, base: the small models number their tokens differently")
    # One map at most: experts and bases are subtracted from each other, id by id.
    for mapping in maps:
        if not mapping.is_identity:
            fuse = fusion.OverlapFusion(strategy=fuse, token_map=mapping)
    # Loaded once each: a model may be its own base, with another prompt.
    distinct = {}
    for name in dict.fromkeys((large, *small)):
        kinds: Any = dict(dtype=dtype, param_dtype=dtype, layout="listed")
        # A head comes from weights that are not quantized.
        new_head = head if name == large else None
        model, _ = models.load(name, **kinds, quantize=None if new_head else quantize)
        new = None if new_head is None else new_head(model)
        if new_head and quantize:
            model = models.load_model(name, **kinds, quantize=quantize)
        distinct[name] = model if new is None else model.with_head(new)
    loaded = [distinct[name] for name in (large, *small)]
    ends = {*loaded[0].config.eos_ids, *[i for i in (tokenizer.eos_id,) if i is not None]}
    count = 1 + len(experts)
    ensemble = Ensemble(loaded[0], experts=loaded[1:count], bases=loaded[count:], fuse=fuse)
    return ensemble, tokenizer, tuple(sorted(ends))


def _check_members(fuse: Any, experts: int, bases: int) -> None:
    """Refuse numbers of small models that a strategy of `logitjax.fusion` would refuse later."""
    kind = type(fuse).__name__
    for name, count in (("expert", experts), ("base", bases)):
        # Any function may fuse; only strategies declare which models they take.
        both = True if isinstance(fuse, fusion.DynamicFusion) else None
        takes = getattr(fuse, f"takes_{name}s", both)
        if takes is not None and takes != bool(count):
            expected = f"a model, which {kind} needs" if takes else f"none, {kind} takes none"
            raise ValueError(f"{name}: expected {expected}, got {count}")
    if isinstance(fuse, fusion.LogitDifference) and experts > 1:
        raise ValueError(f"expert: expected one, because {kind} subtracts it, got {experts}")
    if bases not in (0, 1, max(1, experts)):
        expected = f"one or {experts}, the number of experts" if experts > 1 else "one"
        raise ValueError(f"base: expected {expected}, got {bases}")

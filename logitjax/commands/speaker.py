"""What `generate` is made of: models by flags, strategies by name, conversations."""

import ast
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from logitjax import fusion, models
from logitjax.decoding import DraftControl, Ensemble, Sampling, generate, speculative_generate
from logitjax.models import Tokenizer, render_chat

STRATEGIES: dict[str, type] = {
    "contrastive": fusion.ContrastiveDecoding,
    "dexperts": fusion.DExperts,
    "dynamic": fusion.DynamicFusion,
    "eft": fusion.EmulatedFineTuning,
    "logit_difference": fusion.LogitDifference,
    "proxy": fusion.ProxyTuning,
}


def strategy(spec: str) -> Any:
    """A fusion strategy from ``name`` or ``name:field=value,...``.

    >>> strategy("dynamic:method=grid,num=11").num
    11
    """
    name, _, settings = spec.partition(":")
    if name not in STRATEGIES:
        raise ValueError(f"fusion: expected one of {', '.join(STRATEGIES)}, got {name!r}")
    fields = {field.name for field in dataclasses.fields(STRATEGIES[name])}
    arguments = {}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            raise ValueError(
                f"fusion: {name} takes {', '.join(sorted(fields))} as key=value, got {setting!r}"
            )
        try:
            arguments[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            arguments[key] = value
    return STRATEGIES[name](**arguments)


def load_ensemble(
    large: str, experts: Sequence[str], bases: Sequence[str], fuse: str | None, *, dtype: str
) -> tuple[Ensemble, Tokenizer, tuple[int, ...]]:
    """All models by name in one ensemble, the large one's tokenizer, and the tokens that end it.

    Raises:
      ValueError: where a small model's tokenizer is not the large one's, saying how that shows;
        or models without a strategy, or a strategy without models.
    """
    if bool(fuse) != bool([*experts, *bases]):
        raise ValueError("fusion: experts or bases need a strategy, and a strategy needs them")
    # Before any weights are read.
    chosen = None if fuse is None else strategy(fuse)
    small = (*experts, *bases)
    tokenizer = models.load_tokenizer(large)
    maps = {fusion.vocabulary_map(tokenizer, models.load_tokenizer(s)) for s in small}
    if len(maps) > 1:
        raise ValueError("expert, base: the small models number their tokens differently")
    for mapping in maps:
        if not mapping.is_identity:
            chosen = fusion.OverlapFusion(strategy=chosen, token_map=mapping)
    loaded = [models.load(s, dtype=dtype, layout="listed")[0] for s in (large, *small)]
    ends = {*loaded[0].config.eos_ids, *[i for i in (tokenizer.eos_id,) if i is not None]}
    count = 1 + len(experts)
    ensemble = Ensemble(loaded[0], experts=loaded[1:count], bases=loaded[count:], fuse=chosen)
    return ensemble, tokenizer, tuple(sorted(ends))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How an answer is made and when it ends."""

    sampling: Sampling
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()


class Speaker:
    """Goes on from texts, by plain or by speculative steps (``draft``: who drafts)."""

    def __init__(
        self, ensemble: Ensemble, tokenizer: Tokenizer, limits: Limits, draft: str | None = None
    ):
        self.ensemble = ensemble
        self.tokenizer = tokenizer
        self.limits = limits
        self.draft = draft
        self.tokens = 0
        self._control = DraftControl()

    def go_on(self, prompt: str, show: Callable[[str], None]) -> str:
        """Continue ``prompt``, showing text as it comes; the whole text.

        Raises:
          ValueError: for a prompt that leaves no room in what the models can read.
        """
        tokenizer = self.tokenizer
        tokens = tokenizer.encode(prompt)
        if not tokens and tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id]
        most = self.ensemble.max_length
        room = self.limits.max_new_tokens if most is None else most - len(tokens)
        if room < 1:
            raise ValueError(f"prompt: {len(tokens)} tokens, the models read at most {most}")
        arguments: dict[str, Any] = dict(
            max_new_tokens=min(self.limits.max_new_tokens, room),
            sampling=self.limits.sampling,
            stop_ids=self.limits.stop_ids,
            stop_strings=self.limits.stop_strings,
            tokenizer=tokenizer,
            stream=lambda row, new, text: show(text),
        )
        prompts = [np.array(tokens, np.int32)]
        if self.draft is None:
            out = generate(self.ensemble, prompts, chunk=4, **arguments)
        else:
            out = speculative_generate(
                self.ensemble,
                prompts,
                draft=self.draft,
                control=self._control,
                **arguments,
            )
        assert out.texts is not None
        self.tokens = int(out.lengths[0])
        return out.texts[0]


class Conversation:
    """Turns so far, and what the model is asked to go on from."""

    def __init__(self, tokenizer: Tokenizer, system: str | None = None):
        self._tokenizer = tokenizer
        self._messages = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, text: str) -> str:
        self._messages.append({"role": "user", "content": text})
        return render_chat(self._tokenizer, self._messages, add_generation_prompt=True)

    def answered(self, text: str) -> None:
        self._messages.append({"role": "assistant", "content": text})

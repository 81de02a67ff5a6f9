"""The models that `generate` and `serve` load: one, several fused, or one minus an assistant."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from etils import epath
from flax import nnx

from logitjax import decoding, fusion, models, unlearning, vq
from logitjax.commands.strategies import strategy


@dataclasses.dataclass(frozen=True, kw_only=True)
class LineUp:
    """Models that answer, and how they are fused.

    Attributes:
        model: Model that answers, alone or steered by others.
        expert: Small model that was fine-tuned.
        base: Model that the experts were fine-tuned from: one for all, or one each.
        fusion: Strategy that fuses their logits: NAME, or NAME:key=value with commas between
            settings.
        assistant: Folder of an assistant from `logitjax unlearn`; the model forgets what the
            assistant knows.
        alpha: Weight of the assistant. By default the one stored with it.
        dtype: Type of weights and computation.
        quantize: Weights in 8 or 4 bits; sums and activations stay in `dtype`. `file` keeps those
            that a GGUF file has.
        head: Folder of a head from `logitjax convert-head`, which replaces the model's own.
        draft: Drafter of tokens for all models to verify: `expert` or `base`, `prompt` (what
            followed the last tokens earlier in the text), another model, or the folder of a draft
            head from `logitjax distill --draft_head`.
    """

    model: str = "smollm2"
    expert: tuple[str, ...] = ()
    base: tuple[str, ...] = ()
    fusion: str | None = None
    assistant: str | None = None
    alpha: float | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "int4", "file"] | None = None
    head: str | None = None
    draft: str | None = None

    @property
    def longest(self) -> int:
        """Maximum number of tokens that all models can read; no weights are loaded for it."""
        specs = (self.model, *self.expert, *self.base)
        return min(models.load_config(spec).max_length for spec in specs)

    @property
    def _head_drafts(self) -> bool:
        return self.draft is not None and models.DraftHead.is_at(self.draft)

    def check(self) -> None:
        """Refuse models, files and drafters that are not there, before anything is loaded."""
        for spec in (self.model, *self.expert, *self.base):
            models.load_config(spec, quantize=self.quantize)
        if self.draft in ("expert", "base") and not getattr(self, self.draft):
            raise ValueError(f"draft: expected a model from --{self.draft}, got none")
        if self.draft not in (None, "expert", "base", "prompt") and not self._head_drafts:
            try:
                models.load_config(self.draft)
            except ValueError as error:
                raise ValueError(f"draft: expected expert, base, prompt or a {error}") from None

    def drafts(self, tokenizer: Any) -> decoding.DraftControl | None:
        """The drafter for models with this tokenizer, loaded if necessary."""
        if self.draft is None or self.draft in ("expert", "base", "prompt"):
            return None if self.draft is None else decoding.DraftControl(self.draft)
        if self._head_drafts:
            shape, dtype = models.load_config(self.model), jnp.dtype(self.dtype)
            return decoding.DraftControl(models.DraftHead.load(self.draft, shape, dtype=dtype))
        mapping = fusion.vocabulary_map(tokenizer, models.load_tokenizer(self.draft))
        token_map = None if mapping.is_identity else mapping
        return decoding.DraftControl(self._one(self.draft), token_map=token_map)

    def load(self) -> tuple[decoding.Ensemble, models.Tokenizer, tuple[int, ...]]:
        """Load the models, as `decoding.load_ensemble` returns them."""
        if self.assistant is None:
            if self.alpha is not None:
                raise ValueError("alpha: expected an assistant to weigh, got none")
            kinds: Any = dict(dtype=self.dtype, quantize=self.quantize, head=self._head_for())
            fuse = strategy(self.fusion)
            return decoding.load_ensemble(self.model, self.expert, self.base, fuse, **kinds)
        if self.expert or self.base or self.fusion or self.head:
            raise ValueError("assistant: expected no expert, base, fusion or head with it")
        # Before the model's weights are read.
        record = epath.Path(self.assistant) / "assistant.json"
        if not record.exists():
            raise FileNotFoundError(f"assistant: no such file: {record}")
        tokenizer, model = models.load_tokenizer(self.model), self._one(self.model)
        deployed = unlearning.Deployed.load(model, self.assistant, alpha=self.alpha)
        # Some tokenizers name another end token than the generation settings: either ends.
        ends = {*model.config.eos_ids, *[i for i in (tokenizer.eos_id,) if i is not None]}
        return deployed.line_up(), tokenizer, tuple(sorted(ends))

    def _one(self, spec: str) -> models.Decoder:
        kinds: Any = dict(param_dtype=self.dtype, layout="listed", quantize=self.quantize)
        model, _ = models.load(spec, dtype=self.dtype, **kinds)
        return models.with_layout(model, "listed")

    def _head_for(self) -> Callable[[models.Decoder], Any] | None:
        """Reads the new head for the loaded model; a wrong one is refused before weights are."""
        if self.head is None:
            return None
        folder = epath.Path(self.head)
        # The command's folder, or the head's own.
        folder = folder / "head" if (folder / "head" / "head.json").exists() else folder
        read = functools.partial(vq.load_head, folder, dtype=jnp.dtype(self.dtype))
        read(model=models.load_config(self.model))

        def head_for(model: models.Decoder) -> Any:
            head = read(model=model)
            if self.quantize is not None and getattr(head, "rows", 0) is None:
                # The embedding is quantized; exact rows stay exact.
                head.rows = nnx.data(nnx.Param(model.embedding[...]))
            return head

        return head_for

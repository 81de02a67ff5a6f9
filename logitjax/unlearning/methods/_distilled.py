"""Distillation of a filter: the weights learn the model's logits minus its assistant's."""

import dataclasses
from typing import Any

import jax
from etils import epath
from flax import nnx

from logitjax.models import Decoder, DecoderConfig, Lora, first_layers
from logitjax.ops import masked_mean
from logitjax.storage import read_json
from logitjax.unlearning._method import Means, Method, divergence
from logitjax.unlearning._questions import Questions
from logitjax.unlearning._reads import Need, Read
from logitjax.unlearning.assistant._assistant import relative_states


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distilled(Method):
    """Teach the weights a model's logits minus its assistant's, which then cannot be left out.

    The loss is `mean_{forget} KL(served || model) + beta mean_{retain} KL(served || model)`.

    Attributes:
        of: Folder of the assistant that `difference` wrote.
        retain_weight: Beta.

    References:
        As in divergence decoding, 2026 (arXiv 2605.31293), there on answers to forget alone.
    """

    of: str = ""
    retain_weight: float = 8.0

    peak = 2e-3
    packs = True
    needs = tuple(
        Need(side, "states", before) for side in ("forget", "retain") for before in (False, True)
    )

    def __post_init__(self) -> None:
        if self.of and not (epath.Path(self.of) / "assistant.json").exists():
            raise FileNotFoundError(f"of: expected a folder with an assistant, got {self.of!r}")

    def check(self, model: Decoder, questions: Questions) -> None:
        if not self.of:
            raise ValueError("of: expected a folder with an assistant, got none")
        if model.config.logits_softcap is not None:
            raise ValueError("of: expected a model whose head is linear, got one with a soft cap")

    def fixed(self, config: DecoderConfig, key: Any) -> Any:
        if not self.of:
            return None
        record = read_json(epath.Path(self.of) / "assistant.json", form=dict)
        if not record["relative"]:
            raise ValueError("of: expected a relative assistant, got one that is not")
        shapes = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"))
        return Lora.load(self.of, first_layers(shapes, record["layers"]).config), record["alpha"]

    def states_before(self, model: Decoder, tokens: Any, fixed: Any, segments: Any = None) -> Any:
        hidden = super().states_before(model, tokens, fixed, segments)
        if fixed is None:
            return hidden
        lora, alpha = fixed
        base = first_layers(model, sum(map(len, lora.layers)))
        # The head is linear, so the fused logits are those of fused hidden states.
        return hidden - alpha * relative_states(base, lora, tokens, segments)

    def loss(self, read: Read, state: Any) -> tuple[jax.Array, Means]:
        means = {s: masked_mean(divergence(read, s), read.where(s)) for s in self.sides}
        return means["forget"] + self.retain_weight * means["retain"], means

"""A model's first layers with adapters of their own: a small model that owns no other weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.models import Cache, Decoder, Lora, first_layers
from logitjax.ops import Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Assistant:
    """A model's first layers, and the adapters that make something else of them.

    Attributes:
      base: from `first_layers`; its arrays are the large model's.
      lora: in the layout of ``base``. All that is trained.

    >>> from flax import nnx
    >>> from logitjax.models import DecoderConfig
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=3,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> @nnx.jit
    ... def logits(tokens):
    ...     model = Decoder(config, rngs=nnx.Rngs(0), layout="listed")
    ...     assistant = Assistant.init(model, 2, rank=4, key=jax.random.key(0))
    ...     return assistant.logits(assistant.hidden_states(tokens)[0])
    >>> logits(jnp.array([[1, 2, 3]])).shape
    (1, 3, 8)

    References:
      Ji et al., Reversing the forget-retain objectives, 2024 (arXiv 2406.08607), section 2.5.
    """

    base: Decoder
    lora: Lora

    @classmethod
    def init(
        cls,
        model: Decoder,
        layers: int,
        *,
        rank: int = 32,
        alpha: float | None = None,
        key: Array,
        targets: Sequence[str] | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> "Assistant":
        """The first layers of a model, with fresh adapters that change nothing yet.

        Args:
            model: the large model.
            layers: how many of its layers, 8 of 32 in the paper.
            rank: of the adapters; 32 in the paper, 16 in its code.
            alpha: scale times rank, as in `Lora.init`; 32 in both, so a scale of 1 or of 2.
            key: PRNG key.
            targets: linear maps to adapt; all when omitted.
            dtype: of the adapters.

        Returns:
            An `Assistant`.

        Raises:
            ValueError: as `first_layers` and `Lora.init`.
        """
        base = first_layers(model, layers)
        lora = Lora.init(
            base.config,
            rank,
            key=key,
            alpha=alpha,
            targets=targets,
            dtype=dtype,
            layout=base.layout,
        )
        return cls(base=base, lora=lora)

    @property
    def layers(self) -> int:
        return self.base.config.num_layers

    def hidden_states(
        self, tokens: Int[Array, "batch time"], **options: Any
    ) -> tuple[Float[jax.Array, "batch time hidden"], Cache | None]:
        """As `Decoder.hidden_states`, with the adapters."""
        return self.base.hidden_states(tokens, lora=self.lora, **options)

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[jax.Array, "*batch vocab"]:
        """As `Decoder.logits`."""
        return self.base.logits(hidden)

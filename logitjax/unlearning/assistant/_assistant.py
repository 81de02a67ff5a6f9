"""A model's first layers with adapters of their own: a small model that owns no other weights."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from logitjax.models import Cache, Decoder, Lora, first_layers
from logitjax.ops import Array


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Assistant:
    """An assistant: a model's first layers with adapters that know what to forget.

    Attributes:
        base: from `first_layers`; its arrays are the large model's.
        lora: adapters in the layout of ``base``, the only trained parameters.
        relative: its logits are what the adapters add to the base's: zero before training. The
            paper's assistant (False) begins with the logits of the first layers, and has to unlearn
            these first; a few dozen steps do not silence it on other text.

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
    relative: bool = False

    @classmethod
    def init(
        cls,
        model: Decoder,
        layers: int,
        *,
        rank: int = 32,
        alpha: float | None = None,
        key: Array,
        relative: bool = False,
    ) -> "Assistant":
        """The first layers of a model, with fresh adapters that change nothing yet.

        Args:
            model: the large model.
            layers: number of its layers, 8 of 32 in the paper.
            rank: rank of the adapters; 32 in the paper, 16 in its code.
            alpha: scale times rank, as in `Lora.init`; 32 in both, so a scale of 1 or of 2.
            key: PRNG key.
            relative: see the class.

        Returns:
            An `Assistant`.

        Raises:
            ValueError: as `first_layers` and `Lora.init`.
        """
        base = first_layers(model, layers)
        lora = Lora.init(base.config, rank, key=key, alpha=alpha, layout=base.layout)
        return cls(base=base, lora=lora, relative=relative)

    @property
    def layers(self) -> int:
        return self.base.config.num_layers

    def hidden_states(
        self, tokens: Int[Array, "batch time"], **options: Any
    ) -> tuple[Float[jax.Array, "batch time hidden"], Cache | None]:
        """As `Decoder.hidden_states`, with the adapters; a relative assistant takes no cache."""
        if not self.relative:
            return self.base.hidden_states(tokens, lora=self.lora, **options)
        return relative_states(self.base, self.lora, tokens), None

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[jax.Array, "*batch vocab"]:
        """As `Decoder.logits`."""
        return self.base.logits(hidden)


def relative_states(
    base: Decoder, lora: Lora, tokens: Int[Array, "batch time"]
) -> Float[jax.Array, "batch time hidden"]:
    """What adapters add to normed hidden states, and by the head, which is linear, to logits."""
    before = jax.lax.stop_gradient(base.hidden_states(tokens)[0])
    return added(base.hidden_states(tokens, lora=lora)[0], before)


def added(hidden: jax.Array, before: jax.Array) -> jax.Array:
    """The difference, of two near numbers in float32."""
    return (hidden.astype(jnp.float32) - before.astype(jnp.float32)).astype(hidden.dtype)

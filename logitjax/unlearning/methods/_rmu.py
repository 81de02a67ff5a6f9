"""RMU: hidden states of one layer are moved to a random direction."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from logitjax.models import DecoderConfig
from logitjax.ops import Array, checks
from logitjax.unlearning._losses import as_losses
from logitjax.unlearning._method import Retain, TwoSided
from logitjax.unlearning._reads import Need, Read


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMU(TwoSided):
    """Representation misdirection: states of one layer are moved to a random direction.

    The loss is `mean_d (h_d - target_d)^2`; on rows to keep, the target is the states before.

    Attributes:
        retain: `'hidden'` keeps the states of rows to keep as they were before.
        layers: Number of layers below the moved states; a quarter of the model's if None.
        scale: Length of the direction. 2 in OpenUnlearning's TOFU runs, and 20 to 300 elsewhere,
            because it has to stand out against the layer's own norm.

    References:
        Li et al., The WMDP benchmark, 2024 (arXiv 2403.03218), section 4; OpenUnlearning's `RMU`
        (`EMBED_DIFF` is the retain term), which divides sums of sequences by counts of shape
        `[batch, 1]`: the mean of all sums times the mean of all inverse counts, for answers of
        different lengths neither a mean over tokens nor one over sequences.
    """

    retain: str = "hidden"
    layers: int | None = None
    scale: float = 2.0

    peak = 3e-3
    reads = (Need("forget", "layer"),)
    retains: ClassVar[Mapping[str, Retain]] = {
        "hidden": Retain(
            needs=(Need("retain", "layer"), Need("retain", "layer", before=True)),
            values=lambda read: RMU.values(read.layer("retain"), read.layer("retain", before=True)),
        )
    }

    def layer(self, depth: int) -> int:
        return super().layer(depth) if self.layers is None else self.layers

    def fixed(self, config: DecoderConfig, key: Any) -> Any:
        if key is None:
            raise ValueError("RMU: key: expected a PRNG key for its direction, got None")
        # As released: positive entries, drawn once.
        direction = jax.random.uniform(key, (config.hidden_size,), jnp.float32)
        # Scaled to length `scale`.
        return self.scale * direction / jnp.linalg.norm(direction)

    @staticmethod
    def values(
        hidden: Float[Array, "*batch hidden"], target: Float[Array, "..."]
    ) -> Float[jax.Array, "*batch"]:
        """Losses of hidden states; the target is a vector or has their shape.

        >>> RMU().values(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([1.0, 0.0]))
        Array([2. , 0.5], dtype=float32)
        """
        hidden = checks.as_float(hidden, "hidden")
        target = lax.stop_gradient(as_losses(target, "target"))
        if target.shape not in (hidden.shape[-1:], hidden.shape):
            raise ValueError(
                f"target: expected shape {hidden.shape[-1:]} or that of hidden, {hidden.shape}, "
                f"got {target.shape}"
            )
        return jnp.square(hidden - target).mean(-1)

    def forget(self, read: Read) -> Any:
        return self.values(read.layer("forget"), read.fixed), read.where("forget")

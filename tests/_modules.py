"""What tests ask of any flax module."""

import jax
from flax import nnx


def num_params(model: nnx.Module) -> int:
    """Trainable numbers: running statistics are not among them."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))

"""Shapes of the decoders that presets name, so that planning for them fetches nothing."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax import models, training
from logitjax.ops.sharding import ShardingRules

# Those in the form of the hub say their `model_type`.
_TABLE = json.loads(Path(__file__).with_name("decoders.json").read_text())


def decoder_config(spec: str) -> models.DecoderConfig:
    """The shape of a model, from a known name or its own files."""
    if existing := _TABLE.get(spec):
        of_hub = "model_type" in existing
        return models.config_from_hf(existing) if of_hub else models.DecoderConfig(**existing)
    return models.load_config(spec)


def abstract_decoder(config: models.DecoderConfig, **options: Any) -> tuple[Any, Any]:
    """Graph definition and abstract parameters, without any values."""
    model = nnx.eval_shape(lambda: models.Decoder(config, rngs=nnx.Rngs(0), **options))
    apply_fn, params = models.from_nnx(model)
    return apply_fn.graphdef, params


def rows(mesh: Any, count: int, **columns: tuple[Any, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch: by name a dtype and the shape of one row, split as training splits it."""
    sharding = training.BatchLayout(mesh).sharding
    return {
        name: jax.ShapeDtypeStruct((count, *shape), jnp.dtype(dtype), sharding=sharding)
        for name, (dtype, *shape) in columns.items()
    }


def replicated(mesh: Any, tree: Any) -> Any:
    """Abstract arrays of which every device holds a copy."""
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def placed(mesh: Any, tree: Any, rules: ShardingRules = models.DECODER_RULES) -> Any:
    """Abstract arrays with the sharding that rules give them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        rules.shardings(tree, mesh),
    )


def packed(mesh: Any, count: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of packed text."""
    names = ("tokens", "segment_ids", "positions")
    columns = dict.fromkeys(names, (jnp.int32, length))
    return rows(mesh, count, **columns, loss_mask=(jnp.bool_, length))

"""Sharding rules of a decoder's parameters over a mesh with axes `fsdp`, `tensor` and `expert`."""

from jax.sharding import PartitionSpec as P

from logitjax.ops.sharding import ShardingRules

#: `fsdp` on the model dimension; `tensor` on heads, feed-forward and vocabulary, in Megatron's
#: pairing: maps into heads and MLP by column, maps out of them by row, so that one reduction per
#: block suffices. A bias is split like its map's outputs, which a split by row leaves whole.
DECODER_RULES = ShardingRules(
    rules=(
        (r"(^|/)embedding$", P("tensor", "fsdp")),
        (r"/experts/(gate|up)/kernel$", P("expert", "fsdp", "tensor")),
        (r"/experts/down/kernel$", P("expert", "tensor", "fsdp")),
        (r"/(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
        (r"/(query|key|value|gate|up)/bias$", P("tensor")),
        (r"/(output|down)/kernel$", P("tensor", "fsdp")),
        (r"(^|/)head/kernel$", P("fsdp", "tensor")),
        (r"(scale|bias|norm)", P()),
    ),
    unmatched="fsdp",
    optional=("expert",),
)

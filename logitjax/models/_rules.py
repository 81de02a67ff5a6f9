"""How a decoder's parameters are usually split over a mesh with axes ``fsdp`` and ``tensor``."""

from jax.sharding import PartitionSpec as P

# Megatron's pairing: the maps into heads and MLP by column, those out of them by row, so that one
# reduction a block suffices. Vocabulary over ``tensor``. Last dimensions; first match decides.
DECODER_RULES: tuple[tuple[str, P], ...] = (
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(query|key|value|gate|up)/bias$", P("tensor")),
    (r"(output|down)/kernel$", P("tensor", "fsdp")),
    (r"^embedding$", P("tensor", "fsdp")),
    (r"^head/kernel$", P("fsdp", "tensor")),
)

"""Files written whole or not at all, the on-disk cache, and weights in the formats people have."""

from logitjax.storage._files import write_atomic as write_atomic

"""Files written whole or not at all, the on-disk cache, and weights in the formats people have."""

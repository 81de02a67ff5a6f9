from typing import Any


class Static:
    """A static argument that `jax.jit` compares by value; its hash is computed once.

    A value that cannot be hashed, such as a strategy with arrays, equals only itself.

    >>> Static((1, 2)) == Static((1, 2))
    True
    """

    def __init__(self, value: Any):
        self.value = value
        try:
            # Hashing a graphdef walks the whole model.
            self._hash, self._hashable = hash(value), True
        except TypeError:
            # No other object gets this id while this one exists.
            self._hash, self._hashable = id(value), False

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Static) or self._hash != other._hash:
            return False
        return self.value is other.value or (self._hashable and self.value == other.value)

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadCost:
    """The cost of a head.

    Attributes:
        parameters: number of its own trained parameters; a tied embedding is not counted.
        stored_bytes: parameters and look-up tables, including assignments and tables for decoding
            (a sorted copy of tokens and biases).
        read_bytes: bytes that greedy decoding reads for one token of one sequence.
        decode_flops: multiplications and additions to decode one token.
        train_flops: the same for loss and gradient of one token.
        exact: whether it can represent the full head.
    """

    parameters: int
    stored_bytes: int
    read_bytes: int
    decode_flops: int
    train_flops: int
    exact: bool = False

    def with_rows(self, rows: int, hidden: int, *, kept: int = 0, itemsize: int = 4) -> "HeadCost":
        """The cost of this head together with exact rows that re-score some of its tokens.

        Args:
            rows, hidden, itemsize: rows read per token, numbers per row, bytes per number.
            kept: rows that are stored for this; 0 if they are a tied embedding's.

        >>> cheap = HeadCost(parameters=8, stored_bytes=32, read_bytes=32, decode_flops=16,
        ...                  train_flops=48)
        >>> cheap.with_rows(10, 4).read_bytes
        192
        """
        # A product and a sum each.
        flops = 2 * rows * hidden
        return HeadCost(
            parameters=self.parameters + kept * hidden,
            stored_bytes=self.stored_bytes + kept * hidden * itemsize,
            read_bytes=self.read_bytes + rows * hidden * itemsize,
            decode_flops=self.decode_flops + flops,
            # Forward, and both gradients.
            train_flops=self.train_flops + 3 * flops,
        )

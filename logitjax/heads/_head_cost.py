"""What heads cost, counted rather than timed: parameters, bytes and operations a token."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadCost:
    """The cost of a head.

    Attributes:
      parameters: trained numbers of its own; a tied embedding is not counted.
      stored_bytes: parameters and look-up tables, assignments included. Tables of decoding (a
        sorted copy of tokens and biases) count too.
      read_bytes: what decoding one token greedily has to read, for one sequence.
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


def full_cost(
    vocab: int, hidden: int, *, bias: bool = False, tied: bool = False, itemsize: int = 4
) -> HeadCost:
    """A full softmax. Tied, it stores nothing of its own but is read all the same.

    >>> full_cost(49152, 576).read_bytes
    113246208
    """
    extra = vocab if bias else 0
    own = (0 if tied else vocab * hidden) + extra
    return HeadCost(
        parameters=own,
        stored_bytes=own * itemsize,
        read_bytes=(vocab * hidden + extra) * itemsize,
        decode_flops=2 * vocab * hidden,
        train_flops=6 * vocab * hidden,
        exact=True,
    )


def vq_cost(
    vocab: int, hidden: int, codes: int, *, bias: bool = True, itemsize: int = 4
) -> HeadCost:
    """Codebook and, if wanted, biases. Exact only for codes = vocab.

    Decoding reads the codebook and, per cluster, log-mass, best token and its bias.

    >>> cost = vq_cost(49152, 576, 4096)
    >>> round(cost.read_bytes / full_cost(49152, 576).read_bytes, 3)
    0.084
    """
    parameters = codes * hidden + (vocab if bias else 0)
    tables = 2 * vocab * 4 + codes * 16
    return HeadCost(
        parameters=parameters,
        stored_bytes=parameters * itemsize + tables,
        read_bytes=codes * hidden * itemsize + codes * 12,
        decode_flops=2 * codes * hidden,
        train_flops=6 * codes * hidden,
        exact=codes == vocab,
    )


def shortlist_cost(
    vocab: int,
    hidden: int,
    codes: int,
    *,
    pages: int,
    size: int,
    num_pages: int,
    own_rows: bool = False,
    product_groups: int = 0,
    product_codes: int = 256,
    itemsize: int = 4,
) -> HeadCost:
    """VQ scores, then better rows for ``num_pages * size`` tokens.

    The rows are the tied embedding's, the head's own (``own_rows``), or product-quantised. Exact
    for the tokens in the shortlist, if the rows are.

    >>> cost = shortlist_cost(49152, 576, 2048, pages=5000, size=16, num_pages=32)
    >>> round(cost.read_bytes / full_cost(49152, 576).read_bytes, 3)
    0.053
    """
    listed = num_pages * size
    parameters = codes * hidden + vocab
    tables = vocab * 4 + pages * (size * 8 + 12)
    product = product_codes * hidden * itemsize
    if product_groups:
        parameters += product_codes * hidden
        tables += vocab * product_groups
        read_rows = product + listed * (product_groups + itemsize)
        flops = 2 * product_codes * hidden + listed * product_groups
    else:
        parameters += vocab * hidden if own_rows else 0
        read_rows = listed * hidden * itemsize
        flops = 2 * listed * hidden
    return HeadCost(
        parameters=parameters,
        stored_bytes=parameters * itemsize + tables,
        read_bytes=codes * hidden * itemsize + pages * 12 + listed * 4 + read_rows,
        decode_flops=2 * codes * hidden + flops,
        train_flops=6 * codes * hidden + 3 * flops,
    )


def product_cost(
    vocab: int,
    hidden: int,
    groups: int,
    *,
    codes: int = 256,
    packed: bool = False,
    itemsize: int = 4,
) -> HeadCost:
    """Product quantisation with biases: a look-up a group and token, in training a full head.

    ``packed``: codes take half a byte each, see `pack_codes`.

    >>> round(product_cost(49152, 576, 16).read_bytes / full_cost(49152, 576).read_bytes, 3)
    0.014
    """
    parameters = codes * hidden + vocab
    assignment = vocab * groups * (1 if codes <= 256 else 2)
    if packed:
        # Of whole blocks of 32 tokens, and pairs of groups.
        assignment = -(-vocab // 32) * 32 * -(-groups // 2)
    return HeadCost(
        parameters=parameters,
        stored_bytes=parameters * itemsize + assignment,
        read_bytes=parameters * itemsize + assignment,
        decode_flops=2 * codes * hidden + vocab * groups,
        train_flops=6 * vocab * hidden,
    )


def low_rank_cost(vocab: int, hidden: int, rank: int, *, itemsize: int = 4) -> HeadCost:
    """A bottleneck, with biases.

    >>> low_rank_cost(100, 10, 2).parameters
    320
    """
    parameters = rank * (vocab + hidden) + vocab
    return HeadCost(
        parameters=parameters,
        stored_bytes=parameters * itemsize,
        read_bytes=parameters * itemsize,
        decode_flops=2 * rank * (vocab + hidden),
        train_flops=6 * rank * (vocab + hidden),
        exact=rank >= hidden,
    )


def adaptive_cost(
    hidden: int,
    first: int,
    tails: list[tuple[int, int, float, float]],
    *,
    itemsize: int = 4,
) -> HeadCost:
    """An adaptive softmax.

    Args:
      hidden: d.
      first: frequent tokens.
      tails: per tail its tokens, its width, how often decoding has to look into it and how often a
        label lies in it.
      itemsize: bytes a number.

    >>> adaptive_cost(576, 4000, [(45152, 144, 0.5, 0.2)]).parameters
    8938561
    """
    head = (first + len(tails)) * (hidden + 1)
    sizes = [width * (hidden + tokens) + tokens for tokens, width, _, _ in tails]
    parameters = head + sum(sizes)
    read = head + sum(size * tail[2] for size, tail in zip(sizes, tails))
    train = head + sum(size * tail[3] for size, tail in zip(sizes, tails))
    vocab = first + sum(tail[0] for tail in tails)
    return HeadCost(
        parameters=parameters,
        stored_bytes=parameters * itemsize + 2 * vocab * 4,
        read_bytes=int(read * itemsize),
        decode_flops=int(2 * read),
        train_flops=int(6 * train),
    )


def screened_cost(
    screen: HeadCost,
    vocab: int,
    hidden: int,
    *,
    num_candidates: int,
    own_rows: bool = False,
    itemsize: int = 4,
) -> HeadCost:
    """A cheap head over the whole vocabulary, then exact rows for some of it.

    The rows are the tied embedding's, or the head's own (``own_rows``).

    >>> cost = screened_cost(product_cost(49152, 576, 96), 49152, 576, num_candidates=512)
    >>> round(cost.read_bytes / full_cost(49152, 576).read_bytes, 3)
    0.059
    """
    rows = vocab * hidden if own_rows else 0
    exact = 2 * num_candidates * hidden
    return HeadCost(
        parameters=screen.parameters + rows,
        stored_bytes=screen.stored_bytes + rows * itemsize,
        read_bytes=screen.read_bytes + num_candidates * hidden * itemsize,
        decode_flops=screen.decode_flops + exact,
        train_flops=screen.train_flops + 3 * exact,
    )

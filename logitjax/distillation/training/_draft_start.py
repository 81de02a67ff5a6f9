"""Where the training of a draft head begins: at a head that copies what followed before."""

import jax.numpy as jnp
import numpy as np

from logitjax.models import Decoder, DraftHead

# Nats by which a key of the same token exceeds others; nats of a copied token in a stream of size
# 1; sizes of the code, of all that passes through, and of the last norm, which keeps logits small.
_MATCH, _COPY, _CODE, _PASSED, _CALM = 10.0, 25.0, 0.7, 0.15, 0.3


def make_copying(
    head: DraftHead, model: Decoder, features: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Make an untrained head an induction head, and return the units of its features.

    Models repeat themselves. At t the head knows x_{t+1}; if that occurred at s + 1 before, then
    x_{s+2} is a good draft. Training finds this late, but it has a closed form: `fuse` adds a code
    of each position's token in the directions that the stream uses least, keys read it, queries
    are the code of x_{t+1}, and values are x_{s+2} as the output head sees it.

    Args:
        features: `[tokens, features]`, what the head reads at some positions.
        tokens: their tokens, `[tokens]`.

    Returns:
        The usual size of each feature. `fuse` expects features in these units, in which all its
        rows learn equally fast.
    """
    config, scale = head.config, np.asarray(head.final_norm.scale[...])
    width, groups, size = config.hidden_size, config.num_kv_heads, config.head_dim
    units = np.sqrt(np.square(features).mean(axis=0))
    units = np.maximum(units, 0.05 * np.median(units))
    # Of a typical token, as the first one's stream is often a hundred times larger.
    typical = np.median(_size(features[:, -width:]))
    last = features[:, -width:] / typical
    features = features / units
    ids, places = np.unique(tokens, return_inverse=True)
    embedded = np.asarray(model.embedding[...])[ids].astype(np.float32)
    embedded = embedded / (_size(embedded)[:, None] + 1e-6)
    given = embedded[places]
    # Directions in which tokens differ, frequent and rare ones alike.
    count = min(groups * (size // 2), width // 4)
    coder = _whitening(embedded, count)
    common = given.mean(axis=0)
    coder -= np.outer(common, common @ coder) / (common @ common)
    code = given @ coder
    free = np.linalg.eigh(last.T @ last)[1][:, :count]
    fuse = _fit(features, code) @ (_CODE / code.std() * free.T)
    fuse[-width:] += units[-width:, None] / typical * (np.eye(width) - free @ free.T)
    stream = features @ fuse
    keys = stream / _size(stream)[:, None] @ free
    rows = np.asarray(model.head_of().rows[...])[ids].astype(np.float32)
    rows = (rows * scale)[places]
    rows -= rows.mean(axis=0)
    shown = _whitening(rows, groups * size)
    read = _fit(given, rows @ shown)
    copied = np.median(((given @ read) * (rows @ shown)).sum(axis=1))
    key, query = np.zeros((2 * width, groups, size)), np.zeros((2 * width, groups, size))
    # RoPE turns the second half of either half slowly.
    slow = np.r_[size // 4 : size // 2, size - size // 4 : size]
    for group in range(groups):
        part = (np.arange(len(slow)) * groups + group) % count
        some = np.random.default_rng(group).integers(len(tokens), size=(2, 2000))
        scores = (code[:, part][some[0]] * keys[:, part][some[1]]).sum(axis=1)
        equal = (code[:, part] * keys[:, part]).sum(axis=1)
        gain = _MATCH * size**0.5 / max(np.median(equal) - np.median(scores), 1e-2)
        key[width:, group, slow], query[:width, group, slow] = free[:, part], gain * coder[:, part]
    repeats = config.num_heads // groups
    value = np.concatenate([read, np.zeros_like(read)])
    output = np.repeat(shown.T.reshape(groups, 1, size, width), repeats, axis=1) / repeats
    for name, kernel in {
        "key": key, "query": np.repeat(query, repeats, axis=1), "value": value,
        "output": _COPY / copied * output,
    }.items():  # fmt: skip
        param = getattr(head.attention, name).kernel
        param[...] = jnp.asarray(kernel.reshape(param.shape).astype(param.dtype))
    head.fuse.kernel[...] = jnp.asarray((_PASSED * fuse).astype(units.dtype))
    head.final_norm.scale[...] = jnp.asarray(_CALM * scale)
    return units


def _size(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(x).mean(axis=-1))


def _whitening(rows: np.ndarray, count: int) -> np.ndarray:
    """`[width, count]` for the largest principal components, each in units of its size."""
    sizes, directions = np.linalg.eigh(np.cov(rows.T))
    sizes, directions = sizes[::-1], directions[:, ::-1]
    return directions[:, :count] / np.sqrt(np.maximum(sizes[:count], 1e-6))


def _fit(features: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Ridge regression."""
    products = features.T @ features
    products[np.diag_indices(len(products))] += 0.03 * np.trace(products) / len(products)
    return np.linalg.solve(products, features.T @ target)

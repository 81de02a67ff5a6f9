"""Models of one tokenizer whose vocabularies are padded, extended or numbered differently."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from logitjax.ops import Array, AxisName, checks, log_softmax, logsumexp

# Text that tokenizers often split or normalise differently: spaces, digits, case, accents, code,
# emoji; compatibility characters, which NFKC replaces, and ends of lines. Not combining accents:
# Qwen's tokenizer joins them, the same in tiktoken leaves that to its caller.
_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  Two spaces, a\ttab\nand a line; 3.14159 and 2,024 are numbers, and so is 1000000.",
    "It's the student's don't-care ANTIDISESTABLISHMENTARIANISM, naïve café Ærøskøbing.",
    "for (int i = 0; i < n; ++i) { sum += x[i] * y[i]; }  # 注释 コメント 🙂",
    "ﬁne ① Ａ½ x² ™\u00a0…",
    "one\r\ntwo\rthree\n\n\nfour \n",
    " lead and trail ",
)
_LEAST_OVERLAP = 0.9
_LEAST_ORDER = 0.99
# A logit whose exponential is 0 next to any other, but finite, so that it cancels.
_NOWHERE = -1e30


@dataclasses.dataclass(frozen=True)
class TokenMap:
    """The small vocabulary's token for each of a large one, -1 for none; hashable.

    `stand_ins` are what the small model reads in place of tokens that it lacks, int32 `[large]`; by
    default its token 0.
    """

    small_ids: np.ndarray
    small_size: int
    stand_ins: Any = None

    def __post_init__(self) -> None:
        ids = np.array(self.small_ids, np.int32)
        if ids.ndim != 1 or ids.max(initial=-1) >= self.small_size or ids.min(initial=-1) < -1:
            raise ValueError(
                f"small_ids: expected one id below {self.small_size} (or -1) a token, got shape "
                f"{ids.shape} with values up to {ids.max(initial=-1)}"
            )
        instead = np.zeros_like(ids) if self.stand_ins is None else np.array(self.stand_ins)
        read = np.where(ids < 0, instead, ids).astype(np.int32)
        for name, value in (("small_ids", ids), ("stand_ins", read)):
            # Its hash depends on its numbers, which must then not change.
            value.setflags(write=False)
            object.__setattr__(self, name, value)

    def _key(self) -> tuple[bytes, bytes, int]:
        return self.small_ids.tobytes(), self.stand_ins.tobytes(), self.small_size

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return self._key() == other._key() if isinstance(other, TokenMap) else NotImplemented

    @property
    def large_size(self) -> int:
        return len(self.small_ids)

    @property
    def overlap(self) -> np.ndarray:
        """Bool `[large]`: the tokens that both have."""
        return self.small_ids >= 0

    @property
    def is_identity(self) -> bool:
        """Whether the ids are equal and both vocabularies have the same tokens."""
        same = np.array_equal(self.small_ids, np.arange(self.large_size))
        return same and self.large_size == self.small_size

    def to_small(self, tokens: Int[Array, "*batch"]) -> Int[Array, "*batch"]:
        """The small model's ids of the large model's tokens, or what stands in for them."""
        # Prompts are mapped on the host: on the device, each length would need its own programs.
        xp = np if isinstance(tokens, np.ndarray) else jnp
        return xp.asarray(self.stand_ins)[tokens]

    def to_large(
        self,
        logits_small: Float[Array, "*batch small"],
        *,
        vocab_where: Bool[Array, "..."] | None = None,
        name: str = "logits_small",
    ) -> Float[jax.Array, "*batch large"]:
        """Log-probabilities of the small model at the large model's ids.

        Logits of different vocabularies differ by an unknown constant; log-probabilities do not.
        Off the overlap all models get the same vanishing value, so the difference of two of them is
        0 there and divergences are those on the overlap. Entries beyond the vocabulary are padding.
        """
        logits = checks.as_float(logits_small, name)
        if logits.shape[-1] < self.small_size:
            raise ValueError(
                f"{name}: expected at least {self.small_size} entries, got {logits.shape[-1]}"
            )
        exists = jnp.arange(logits.shape[-1]) < self.small_size
        log_p = log_softmax(jnp.where(exists, logits, -jnp.inf), vocab_where=vocab_where)
        result = jnp.take(log_p, np.maximum(self.small_ids, 0), axis=-1)
        # Not `> -inf`: a nan must stay a nan instead of counting as padding.
        return jnp.where(self.overlap & (result != -jnp.inf), result, _NOWHERE)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class OverlapFusion:
    """A strategy for experts and bases whose vocabulary is not the large model's.

    On tokens that both have, the fused logits are the strategy's, by differences of
    log-probabilities. Other tokens keep the large model's logits, up to normalisation. A token
    that some of the small models have at ``-inf`` and others do not is ``-inf``.

    `strategy` is any of this package. Experts and bases share `token_map`, from `vocabulary_map`.

    >>> mapping = vocabulary_map(["a", "b", "c", "new"], ["a", "b", "c"], least_overlap=0.7)
    >>> from logitjax.fusion import ProxyTuning
    >>> fuse = jax.jit(OverlapFusion(strategy=ProxyTuning(), token_map=mapping))
    >>> fused, _ = jax.device_get(fuse(np.zeros(4), np.log([0.5, 0.25, 0.25]), np.zeros(3)))
    >>> print((fused - fused[-1]).round(2))
    [ 0.41 -0.29 -0.29  0.  ]
    """

    strategy: Any
    token_map: TokenMap

    def __call__(
        self,
        logits_large: Float[Array, "*batch vocab"],
        logits_experts: Float[Array, "..."] | None,
        logits_bases: Float[Array, "..."] | None,
        *,
        vocab_where: Bool[Array, "..."] | None = None,
        axis_name: AxisName | None = None,
    ) -> tuple[Float[jax.Array, "*batch vocab"], Any]:
        """Apply the strategy, with `[..., small]` logits of experts and bases.

        Raises:
            ValueError: the vocabulary is sharded, or sizes do not fit the map.
        """
        if axis_name is not None:
            raise ValueError(
                f"axis_name={axis_name!r}: a token map gathers from the whole vocabulary; map the "
                "small models' logits with to_large before sharding them"
            )
        checks.shapes(logits_large=(logits_large, "float *batch vocab"))
        checks.where(vocab_where, logits_large.shape, "vocab_where")
        size, known = logits_large.shape[-1], self.token_map.large_size
        if size < known:
            raise ValueError(f"logits_large: expected at least {known} entries, got {size}")
        if vocab_where is not None:
            vocab_where = jnp.broadcast_to(vocab_where, logits_large.shape)[..., :known]
        large = jnp.asarray(logits_large)[..., :known]
        log_z = logsumexp(large, vocab_where=vocab_where)[..., None]
        # A leading axis of length 0 means no models, not no rows.
        experts, bases = (
            None
            if x is None or (jnp.ndim(x) > large.ndim and not len(x))
            else self.token_map.to_large(x, name=name)
            for x, name in ((logits_experts, "logits_experts"), (logits_bases, "logits_bases"))
        )
        # If only a base has no such token, subtracting it would add without bound.
        items = [
            x[None] if x.ndim == large.ndim else x
            for x in (experts, bases)
            if x is not None and large.shape in (x.shape, x.shape[1:])
        ]
        if items:
            models = jnp.concatenate(items) != _NOWHERE
            present = models.all(0) | ~models.any(0)
            vocab_where = present if vocab_where is None else present & vocab_where
        fused, info = self.strategy(large - log_z, experts, bases, vocab_where=vocab_where)
        # Off the overlap only a difference of two small models cancels.
        lost = jnp.isfinite(fused) & (jnp.abs(fused) > 1e20)
        fused = jnp.where(lost, large, fused + log_z)
        padding = [(0, 0)] * (fused.ndim - 1) + [(0, size - large.shape[-1])]
        return jnp.pad(fused, padding, constant_values=-jnp.inf), info


def vocabulary_map(large: Any, small: Any, *, least_overlap: float = _LEAST_OVERLAP) -> TokenMap:
    """The token map of two vocabularies of one tokenizer; different tokenizers are refused.

    Fusing next-token distributions makes sense only if both models split text into the same tokens.
    With tokenizers, texts that others split differently test this. Plain vocabularies can be judged
    only by their spelling and numbering: tokenizers that were derived from one another keep the
    order of ids. A model that lacks a token reads the longest ending of it that it knows.

    Args:
        large, small: a tokenizer (with `encode` and `get_vocab`, itself or in its `backend`), a
            `tiktoken.Encoding`, a mapping from token to id, or the tokens in the order of their
            ids. Tokens are strings or bytes; beside bytes, a tokenizer has `token_bytes`.
        least_overlap: share of the small vocabulary that must be in the large one.

    Raises:
        ValueError: the two are different tokenizers; the message gives the evidence.

    >>> vocabulary_map(["a", "b", "ab", "<new>"], {"a": 0, "b": 1, "ab": 2}).small_ids
    array([ 0,  1,  2, -1], dtype=int32)
    >>> vocabulary_map(["the", "cat"], ["le", "chat"])
    Traceback (most recent call last):
    ValueError: these are different tokenizers: 0 of the small vocabulary's 2 tokens are in ...
    """
    large_vocab, small_vocab = _vocabulary(large, "large"), _vocabulary(small, "small")
    if any(isinstance(next(iter(v)), bytes) for v in (large_vocab, small_vocab)):
        large_vocab, small_vocab = _in_bytes(large, large_vocab), _in_bytes(small, small_vocab)
    large_size, small_size = (max(v.values()) + 1 for v in (large_vocab, small_vocab))
    ids = np.full(large_size, -1, np.int32)
    common = [token for token in small_vocab if token in large_vocab]
    for token in common:
        ids[large_vocab[token]] = small_vocab[token]
    if len(common) < least_overlap * len(small_vocab):
        raise ValueError(
            f"these are different tokenizers: {len(common)} of the small vocabulary's "
            f"{len(small_vocab)} tokens are in the large one, expected at least "
            f"{least_overlap:.0%}. {_ADVICE}"
        )
    encoders = [_encoder(t) for t in (large, small)]
    if all(encoders):
        _check_probes(encoders, ids)
    else:
        # Plain vocabularies cannot split text: their numbering is the only evidence.
        stored = ids[ids >= 0]
        ordered = float((np.diff(stored) > 0).mean()) if len(stored) > 1 else 1.0
        if ordered < _LEAST_ORDER:
            raise ValueError(
                "these look like different tokenizers: they number their common tokens in another "
                f"order ({ordered:.0%} of neighbours keep it, expected {_LEAST_ORDER:.0%}). "
                f"{_ADVICE}; if it is the same one, hand in the tokenizers instead of their "
                "vocabularies"
            )
    stand_ins = np.zeros_like(ids)
    for token in large_vocab.keys() - small_vocab.keys():
        endings = (token[start:] for start in range(1, len(token)))
        known = next((small_vocab[text] for text in endings if text in small_vocab), 0)
        stand_ins[large_vocab[token]] = known
    return TokenMap(ids, small_size, stand_ins)


_ADVICE = (
    "Next-token distributions can be fused only where all models cut text alike; take an expert of "
    "the large model's family, or distil across tokenizers (distillation.universal_logit_distance)"
)


def _vocabulary(source: Any, name: str) -> Mapping[Any, int]:
    holder = getattr(source, "backend", source)
    if hasattr(holder, "get_vocab"):
        source = holder.get_vocab()
    elif hasattr(holder, "token_byte_values"):  # of tiktoken
        return {text: holder.encode_single_token(text) for text in holder.token_byte_values()}
    if isinstance(source, Mapping):
        vocabulary = dict(source)
    elif isinstance(source, Sequence) and not isinstance(source, str):
        vocabulary = {token: i for i, token in enumerate(source)}
    else:
        raise TypeError(
            f"{name}: expected a tokenizer, a mapping from token to id or a list of tokens, got "
            f"{type(source).__name__}"
        )
    if not vocabulary:
        raise ValueError(f"{name}: the vocabulary is empty")
    return vocabulary


def _in_bytes(source: Any, vocabulary: Mapping[Any, int]) -> Mapping[bytes, int]:
    """A vocabulary spelled in bytes, without special tokens."""
    if isinstance(next(iter(vocabulary)), bytes):
        return vocabulary
    if not hasattr(source, "token_bytes"):
        raise TypeError("large, small: expected a tokenizer beside a vocabulary in bytes")
    return {text: id_ for id_, text in enumerate(source.token_bytes()) if text}


def _encoder(source: Any) -> Callable[[str], list[int]] | None:
    backend = getattr(source, "backend", source)
    if not hasattr(backend, "encode"):
        return None

    def encode(text: str) -> list[int]:
        try:
            tokens = backend.encode(text, add_special_tokens=False)
        except TypeError:
            tokens = backend.encode(text)
        return list(getattr(tokens, "ids", tokens))

    return encode


def _check_probes(encoders: Any, ids: np.ndarray) -> None:
    encode_large, encode_small = encoders
    for text in _PROBES:
        large_ids, small_ids = encode_large(text), encode_small(text)
        mapped = [int(ids[token]) for token in large_ids]
        if mapped != small_ids:
            location = next(
                (i for i, (a, b) in enumerate(zip(mapped, small_ids)) if a != b),
                min(len(mapped), len(small_ids)),
            )
            raise ValueError(
                f"these are different tokenizers: they cut {text!r} into {len(large_ids)} and "
                f"{len(small_ids)} tokens, alike only up to token {location}. {_ADVICE}"
            )

"""Text byte by byte from models of tokens, so that models with any tokenizers write one text."""

import bisect
import dataclasses
import functools
import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from logitjax.decoding._cached_model import CachedModel
from logitjax.decoding._ensemble import Ensemble
from logitjax.decoding._requests import bucket
from logitjax.models import Tokenizer
from logitjax.ops import log_softmax

# Symbol 256: the text ends.
_END = 256
# Number of paths read at once.
_ROWS = 4


@dataclasses.dataclass(eq=False)
class _Path:
    """Tokens that spell the text up to byte `at`, and the model's prediction after them."""

    tokens: tuple[int, ...]
    at: int
    # Logarithm of its share of all paths, up to a common factor.
    weight: float
    # Cumulative probabilities of tokens in the order of their bytes.
    probs: Any = None
    end: float = 0.0


@functools.partial(jax.jit, static_argnames="apply", donate_argnames="cache")
def _read(apply: Any, params: Any, tokens: Any, positions: Any, cache: Any) -> tuple[Any, Any]:
    logits, cache = apply(params, tokens, positions, cache)
    return log_softmax(logits[:, -1].astype(jnp.float32)), cache


class _Reader:
    """One model's distribution of the next byte: the sum over all token paths that spell it."""

    def __init__(self, model: Any, tokenizer: Tokenizer, most: int, least: float, room: int):
        self.model, self.tokenizer = CachedModel.of(model), tokenizer
        self._most, self._least, self._room = most, least, room
        texts = tokenizer.token_bytes()[: self.model.vocab_size]
        self._ids = np.array(
            sorted(filter(texts.__getitem__, range(len(texts))), key=texts.__getitem__)
        )
        self._texts = [texts[i] for i in self._ids]
        # Byte n of each text, -1 after its end.
        self._bytes = np.full((len(self._ids), 1 + max(map(len, self._texts))), -1, np.int16)
        for row, text in zip(self._bytes, self._texts, strict=True):
            row[: len(text)] = list(text)

    def begin_anew(self) -> None:
        self.text, self.lost, self._trunk, self._whole = b"", 0.0, 0, list[int]()
        # Paths go back to the trunk, further than a window's ring keeps.
        plan = Ensemble(self.model).plan.with_ring_slack(self._room)
        self._cache = plan.init_cache(_ROWS, self._room)[0]

    def begin(self, prompt: Sequence[int]) -> None:
        self.begin_anew()
        self._paths = self._scored([_Path(tuple(prompt), 0, 1.0)])

    def probs(self) -> np.ndarray:
        """Probabilities of the next byte, and of the end, `[257]`."""
        out = np.zeros(257)
        for path in self._paths:
            low, high, depth = self._beginning_with(self.text[path.at :])
            following = self._bytes[low:high, depth]
            longer = following >= 0
            out[:256] += path.weight * np.bincount(
                following[longer], path.probs[low:high][longer], 256
            )
            # The text may end only where a token ends.
            out[_END] += path.weight * path.end * (depth == 0)
        return out / out.sum()

    def feed(self, byte: int) -> None:
        """Append the chosen byte."""
        self.text += bytes([byte])
        stay, fresh = [], []
        for path in self._paths:
            low, high, depth = self._beginning_with(self.text[path.at :])
            inside = self._bytes[low:high, depth] >= 0
            # Tokens that end here come first in this order.
            for i in range(low, low + int((~inside).sum())):
                tokens = (*path.tokens, int(self._ids[i]))
                fresh.append(_Path(tokens, len(self.text), path.weight * path.probs[i]))
            mass = path.weight * path.probs[low:high][inside].sum()
            stay += [(mass, path)] if mass > 0 else []
        masses = [*stay, *((path.weight, path) for path in fresh)]
        if not masses:
            raise ValueError(f"text: expected bytes that tokens can spell, got {self.text[-16:]!r}")
        total = sum(mass for mass, _ in masses)
        kept = [pair for pair in masses if pair[0] > self._least * total]
        kept = sorted(kept, key=lambda pair: -pair[0])[: self._most]
        # Only a path that ends here can go on with any byte: the likeliest stays, however unlikely.
        ending = [(p.weight, p) for p in sorted(fresh, key=lambda p: -p.weight)[:1]]
        kept += [pair for pair in ending if pair not in kept]
        kept_mass = sum(mass for mass, _ in kept)
        self.lost += 1 - kept_mass / total
        paths = [path for _, path in kept]
        for path in paths:
            path.weight /= kept_mass
        self._scored([path for path in paths if path.probs is None])
        self._paths = paths
        # The common beginning of all paths need not be read again.
        shortest = min((path.tokens for path in paths), key=len)
        common = 0
        while common < len(shortest) and len({path.tokens[common] for path in paths}) == 1:
            common += 1
        if common > self._trunk:
            self._pass([shortest[self._trunk : common]] * _ROWS)
            self._trunk = common

    def after(self, text: str) -> dict[bytes, float]:
        """Log-probabilities of the next token by its bytes, `b""` for the end; splits anew."""
        tokens = self.tokenizer.encode(text, None) or [self.tokenizer.bos_id or 0]
        known = zip(tokens[:-1], self._whole)
        self._trunk = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], known))
        self._whole = tokens
        logs = self._pass([tokens[self._trunk :]] * _ROWS)[0]
        end = self.tokenizer.eos_id
        law = {} if end is None else {b"": float(logs[end])}
        return law | dict(zip(self._texts, logs[self._ids].tolist(), strict=True))

    def first(self, law: dict[bytes, float], text: bytes) -> float:
        """Log-probability of a token, or of the first of those that spell what is none."""
        if text in law:
            return law[text]
        tokens = self.tokenizer.encode(text.decode()) if text else []
        return law.get(self.tokenizer.token_bytes()[tokens[0]], -np.inf) if tokens else -np.inf

    def _beginning_with(self, text: bytes) -> tuple[int, int, int]:
        low = bisect.bisect_left(self._texts, text)
        # The first that does not match: the next text of the same length, or all.
        rest = text.rstrip(b"\xff")
        after = rest[:-1] + bytes([rest[-1] + 1]) if rest else None
        high = len(self._texts) if after is None else bisect.bisect_left(self._texts, after, low)
        return low, high, min(len(text), self._bytes.shape[1] - 1)

    def _scored(self, paths: list[_Path]) -> list[_Path]:
        for start in range(0, len(paths), _ROWS):
            some = paths[start : start + _ROWS]
            logs = self._pass([path.tokens[self._trunk :] for path in some])
            for path, log_p in zip(some, logs, strict=False):
                p = np.exp(np.asarray(log_p, np.float64))
                path.probs, end = p[self._ids], self.tokenizer.eos_id
                path.end = 0.0 if end is None else float(p[end])
        return paths

    def _pass(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Log-probabilities after tokens that follow the trunk, for at most `_ROWS` rows."""
        time = bucket(max(map(len, rows)), 8)
        tokens = np.zeros((_ROWS, time), np.int32)
        positions = np.full_like(tokens, -1)
        for i, row in enumerate(rows):
            tokens[i, time - len(row) :] = row
            positions[i, time - len(row) :] = self._trunk + np.arange(len(row))
        arguments = (self.model.apply, self.model.params, tokens, positions, self._cache)
        logs, self._cache = _read(*arguments)
        return np.asarray(logs)


class ByteEnsemble:
    """Models with any tokenizers that write one text together, byte by byte.

    The distribution of a model's next byte is the sum over all token paths that spell the text so
    far, so it is the model's own. Paths below `least` of the total, and beyond the `most`
    likeliest, are dropped, except one that ends with the text; `lost` bounds their share. A model's
    end token ends the text.

    Args:
        large: a model, as for `CachedModel.of`, and its tokenizer.
        experts: further pairs.
        bases: further pairs, as for `Ensemble`.
        fuse: any strategy of `logitjax.fusion`, for log-probabilities of bytes; by default the mean
            of the probabilities.
        max_length: maximum number of tokens of a text, prompt included.

    References:
        Sampling bytes from a model of tokens: arXiv 2506.14123, which sums over canonical paths.
    """

    def __init__(
        self,
        large: tuple[Any, Tokenizer],
        *,
        experts: Sequence[tuple[Any, Tokenizer]] = (),
        bases: Sequence[tuple[Any, Tokenizer]] = (),
        fuse: Callable[..., Any] | None = None,
        most: int = 64,
        least: float = 1e-9,
        max_length: int = 1024,
    ):
        members = [large, *experts, *bases]
        self.readers = [_Reader(*pair, most, least, max_length) for pair in members]
        self._experts, self._fuse = len(experts), None if fuse is None else jax.jit(fuse)

    @property
    def lost(self) -> float:
        """An upper bound on the share of probability of dropped paths, over all steps."""
        return max(reader.lost for reader in self.readers)

    def begin(self, prompt: str) -> None:
        """Start after a prompt, which each model reads in its own tokens."""
        for reader in self.readers:
            tokens = reader.tokenizer.encode(prompt, None)
            # At least one token must be read.
            reader.begin(tokens or [reader.tokenizer.bos_id or 0])

    def probs(self) -> np.ndarray:
        """Probabilities of the next byte, and of the end, `[257]`."""
        return self._fused(np.stack([reader.probs() for reader in self.readers]))

    def _fused(self, each: np.ndarray) -> np.ndarray:
        if self._fuse is None:
            return each.mean(0)
        logs = np.log(np.maximum(each, 1e-38)).astype(np.float32)
        experts, bases = logs[1 : 1 + self._experts], logs[1 + self._experts :]
        fused, _ = self._fuse(logs[0], experts, bases)
        return np.asarray(jax.nn.softmax(fused), np.float64)

    def feed(self, text: bytes) -> float:
        """Read a text; returns its log-probability in nats."""
        total = 0.0
        for byte in text:
            with np.errstate(divide="ignore"):
                total += float(np.log(self.probs()[byte]))
            for reader in self.readers:
                reader.feed(byte)
        return total

    def generate(
        self, prompt: str, *, max_bytes: int, temperature: float = 0.0, seed: int = 0
    ) -> bytes:
        """Continue a prompt to the end of the text, or by at most this many bytes."""
        self.begin(prompt)
        rng, out = np.random.default_rng(seed), b""
        while len(out) < max_bytes:
            p = self.probs()
            if temperature > 0:
                p = (p / p.max()) ** (1 / temperature)
                byte = int(rng.choice(257, p=p / p.sum()))
            else:
                byte = int(p.argmax())
            if byte == _END:
                break
            out += bytes([byte])
            for reader in self.readers:
                reader.feed(byte)
        return out

    def generate_union(self, prompt: str, *, max_tokens: int, top: int = 10) -> str:
        """Continue a prompt greedily by the union of each model's `top` likeliest tokens.

        Each step asks every model once, where `generate` asks once a byte; probabilities are shares
        of the union. A model that has no such token gives it the probability of the first of those
        that spell it. Tokens that would leave half a character are not among the candidates.

        References:
            UniTE, 2024 (arXiv 2410.03777); the released code gives 0 to the second of two tokens
            with one beginning, here both have its logit.
        """
        for reader in self.readers:
            reader.begin_anew()
        text, out, size = prompt, "", top * len(self.readers)
        for _ in range(max_tokens):
            laws = [reader.after(text) for reader in self.readers]
            likely = itertools.chain(
                *(heapq.nlargest(top, law, key=law.__getitem__) for law in laws)
            )
            union = [one for one in dict.fromkeys(likely) if _is_text(one)]
            if not union:
                break
            logs = np.full((len(laws), size), -np.inf)
            for row, reader, law in zip(logs, self.readers, laws, strict=True):
                row[: len(union)] = [reader.first(law, one) for one in union]
            each = np.exp(logs - logs.max(1, keepdims=True))
            best = self._fused(each / each.sum(1, keepdims=True))[: len(union)].argmax()
            if not union[best]:
                break
            text, out = text + union[best].decode(), out + union[best].decode()
        return out


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True

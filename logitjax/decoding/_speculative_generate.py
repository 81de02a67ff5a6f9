"""Whole batches by speculative steps, as many drafted tokens at a time as pay."""

import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from logitjax.decoding._chunks import Generated, in_chunks
from logitjax.decoding._draft_control import DraftControl
from logitjax.decoding._engine import Engine
from logitjax.decoding._ensemble import Ensemble
from logitjax.decoding._generate import as_prompts, as_requests, with_room
from logitjax.decoding._requests import Prompt, bucket
from logitjax.decoding._sampling import GREEDY, Sampling
from logitjax.decoding._speculate import Speculation
from logitjax.decoding._step import DecodeOptions, Emitted
from logitjax.models import Tokenizer
from logitjax.ops import Array

# So many chunks at once while drafting does not pay: each look of the host takes its time.
_STRETCH = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculated(Generated):
    """`Generated`, and what speculation brought.

    Attributes:
      rounds: int32 ``[rows]``, speculative rounds that a row took part in.
      tested: int32 ``[rows]``, drafted tokens that were compared.
      accepted: int32 ``[rows]``, those that were accepted.
      calls: (draft length, rounds, seconds) of every call in order, 0 for plain steps.
      speedup: measured, by the control's timing of plain steps; None before it has any.
      predicted: what acceptance and costs predict for the length that was used most.
    """

    rounds: np.ndarray
    tested: np.ndarray
    accepted: np.ndarray
    calls: tuple[tuple[int, int, float], ...]
    speedup: float | None = None
    predicted: float | None = None

    @property
    def acceptance(self) -> float:
        """Share of the compared drafts that were accepted; nan without any."""
        tested = int(self.tested.sum())
        return float(self.accepted.sum()) / tested if tested else float("nan")


def speculative_generate(
    model: Any,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int,
    draft: str | int = "expert",
    lengths: Sequence[int] = (2, 5),
    acceptance: str = "rejection",
    length: int | None = None,
    control: DraftControl | None = None,
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    where: Array | None = None,
    others: Sequence[Sequence[Prompt] | None] | None = None,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    logit_bias: dict[int, float] | None = None,
    tokenizer: Tokenizer | None = None,
    stream: Callable[[int, list[int], str], None] | None = None,
    chunk: int = 6,
    options: DecodeOptions | None = None,
) -> Speculated:
    """What `generate` does, faster where a member of the ensemble guesses the fused tokens.

    The drafting member runs ahead by some tokens, one pass of all members verifies them, and each
    row goes as far as its draft is accepted: by the *fused* distribution, which tokens therefore
    follow exactly, whoever drafts. Greedy tokens are plain decoding's. How much is drafted follows
    measured costs and acceptance; where drafting does not pay, rows go on step by step.

    Args:
      model: an ensemble whose members have passes of their own.
      prompts: as for `generate`, as the arguments not named here.
      max_new_tokens: how many to add at most.
      draft: see `Speculation`.
      lengths: see `Speculation`; each that is used is compiled.
      acceptance: see `Speculation`.
      length: draft always so many, one of ``lengths``, instead of adapting.
      control: of an earlier call of the same kind, whose knowledge of costs and acceptance goes on.
      sampling: for all rows (row i draws with ``seed + i``) or one a row.
      where: bool, like ``prompts``, false at padding.
      others: prompts of the experts, then of the bases.
      stop_ids: rows end after any of these.
      stop_strings: rows end with the token that completes one; needs ``tokenizer``.
      logit_bias: added to the logits of these tokens.
      tokenizer: of the model, to make texts.
      stream: called with (row, new tokens, new text) after every call.
      chunk: about so many tokens between two looks of the host; more where drafting does not pay
        and neither ``stream`` nor ``stop_strings`` wants to see them.
      options: what else to report.

    Returns:
      `Speculated`.

    Raises:
      ValueError: as `generate`; for a drafting member that is not there, or a ``length`` that is
        not one of ``lengths``.

    >>> from flax import nnx
    >>> from logitjax.decoding import generate
    >>> from logitjax.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> large, small = (Decoder(config, rngs=nnx.Rngs(i), layout="listed") for i in range(2))
    >>> def mean(large, experts, bases, vocab_where=None):
    ...     return (large + experts[0]) / 2, {}
    >>> model = Ensemble(large, experts=[small], fuse=mean)
    >>> out = speculative_generate(model, [[1, 2, 3]], max_new_tokens=6, length=2)
    >>> bool((out.tokens == generate(model, [[1, 2, 3]], max_new_tokens=6).tokens).all())
    True

    References:
      Leviathan et al., 2023 (arXiv 2211.17192); coupled acceptance: Daliri, Musco and Suresh,
      Coupling without communication and drafter-invariant speculative decoding, 2024
      (arXiv 2408.07978).
    """
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings: a tokenizer is needed to see them")
    if not isinstance(model, Ensemble):
        kind = type(model).__name__
        raise TypeError(f"model must be an Ensemble, one of whose members drafts, got {kind}")
    speculation = Speculation(draft=draft, lengths=tuple(lengths), acceptance=acceptance)
    if length is not None and length not in speculation.lengths:
        raise ValueError(f"length must be one of lengths={speculation.lengths}, got {length}")
    requests = as_requests(
        as_prompts(prompts, where), sampling, others, max_new_tokens, stop_ids, logit_bias
    )
    options = with_room(DecodeOptions() if options is None else options, requests)
    longest = max(len(p) for request in requests for p in request.streams(model.plan))
    most = max(speculation.lengths)
    engine = Engine(
        model,
        slots=len(requests),
        max_length=bucket(longest + max_new_tokens + most) - most,
        options=options,
        speculation=speculation,
    )
    control = DraftControl(speculation.lengths) if control is None else control
    watched = stream is not None or bool(stop_strings)
    rounds = _Rounds(engine, control, length, chunk, stretch=1 if watched else _STRETCH)
    out = in_chunks(
        engine,
        requests,
        rounds.advance,
        tokenizer=tokenizer,
        stop_strings=stop_strings,
        stream=stream,
    )
    return Speculated(
        **{field.name: getattr(out, field.name) for field in dataclasses.fields(Generated)},
        rounds=rounds.stats[0],
        tested=rounds.stats[1],
        accepted=rounds.stats[2],
        calls=tuple(rounds.calls),
        speedup=control.speedup,
        predicted=rounds.predicted(),
    )


class _Rounds:
    """Calls of an engine whose length a control chooses, timed."""

    def __init__(
        self,
        engine: Engine,
        control: DraftControl,
        length: int | None,
        chunk: int,
        *,
        stretch: int,
    ):
        self._engine = engine
        self._control = control
        self._length = length
        self._chunk = chunk
        self._stretch = stretch
        self._kind: Hashable = (engine.slots, engine.max_length, chunk)
        self.calls: list[tuple[int, int, float]] = []
        self.stats = np.zeros((3, engine.slots), np.int32)

    def advance(self) -> Emitted:
        length = self._control.choose(self._kind) if self._length is None else self._length
        start = time.perf_counter()
        steps = self._chunk
        if length == 0:
            drafts_are_known = self._control.cost(self._control.lengths[0], self._kind) is not None
            steps *= self._stretch if drafts_are_known else 1
            emitted = jax.block_until_ready(self._engine.decode_chunk(steps))
            # Rows may end before the chunk does.
            rounds = max(1, int(np.asarray(emitted.valid).sum(axis=1).max()))
            known: dict[str, Any] = {}
        else:
            rounds = max(1, self._chunk // (length + 1))
            emitted, drafted = jax.block_until_ready(self._engine.speculate(length, rounds))
            stats = np.stack([drafted.rounds, drafted.tested, drafted.accepted])
            self.stats += stats
            rounds, part = int(stats[0].max()), max(1, int(stats[0].sum()))
            known = {
                "tokens": int(np.asarray(emitted.valid).sum()) / part,
                "tested": int(stats[1].sum()),
                "accepted": int(stats[2].sum()),
            }
        seconds = time.perf_counter() - start
        self.calls.append((length, rounds, seconds))
        self._control.record(
            length, seconds=seconds, rounds=rounds, kind=self._kind, program=steps, **known
        )
        return emitted

    def predicted(self) -> float | None:
        counts: dict[int, int] = {}
        for length, rounds, _ in self.calls:
            counts[length] = counts.get(length, 0) + rounds * (length + 1)
        used = max(counts, key=lambda length: counts[length], default=0)
        return 1.0 if used == 0 else self._control.predicted(used, self._kind)

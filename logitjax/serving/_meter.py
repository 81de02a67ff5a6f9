"""Charges for an answer, token by token, if choices are metered."""

import collections
import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from logitjax.decoding import Request
from logitjax.leakage import Ledger
from logitjax.serving._errors import ApiError
from logitjax.serving._policy import Disclosure, advance
from logitjax.serving._schema import CompletionRequest


class Meter:
    """One answer's charges: each context pays before its token is shown, to any client."""

    def __init__(
        self,
        ledger: Ledger,
        disclosure: Disclosure,
        completion: CompletionRequest,
        request: Request,
        vocab: int,
    ):
        policy = disclosure.policy
        self.told: Any = collections.Counter()
        self._ledger, self._token = ledger, math.log(vocab)
        self._draw = np.asarray(request.extra["draw"])
        cells = policy.value_nats(vocab)
        self._values = 0.0 if completion.logprobs is None else cells
        self._echoed = 0.0 if completion.prompt_shown is None else cells
        # Values of the first tokens are the same for all clients; a drawn token's are its own.
        self._same = not policy.sampled
        self._prompt: Sequence[int] = np.asarray(request.prompt).tolist()
        self._wants, self._digest = request.max_new_tokens, hashlib.blake2b(digest_size=8)

    @property
    def most(self) -> float:
        """Maximum number of nats that the answer can reveal."""
        return len(self._prompt) * self._echoed + self._wants * (self._token + self._values)

    def begin(self) -> None:
        """Charge the prompt, if echoed, and the first token, or refuse."""
        enough = True
        for token in self._prompt:
            enough &= self._charge(b"values", self._echoed)
            self._digest.update(token.to_bytes(4, "little"))
        if not (enough and (not self._wants or self._pay())):
            context = self._digest.hexdigest()
            raise ApiError(
                429,
                f"a context may reveal {self._ledger.limit:g} nats: for this one "
                f"{self._ledger[context]:.4g} are used, and this answer may reveal "
                f"{self._token + self._values:.4g} more; they are not renewed",
                code="insufficient_quota",
            )

    def goes_on(self, token: int) -> bool:
        """Take a token that was shown; return whether the next one may be."""
        self._digest.update(token.to_bytes(4, "little"))
        self._draw = advance(self._draw, np.uint32(token))
        return self._pay()

    def _pay(self) -> bool:
        draw = self._draw.tobytes()
        values = self._charge(b"values" if self._same else b"own" + draw, self._values)
        return values and self._charge(draw, self._token)

    def _charge(self, answer: bytes, nats: float) -> bool:
        context = self._digest.hexdigest()
        before = self._ledger[context]
        paid = self._ledger.charge(context, answer, nats)
        self.told[context] += self._ledger[context] - before
        return paid

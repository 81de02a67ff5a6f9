"""One choice of an answer as its tokens arrive, in the forms of OpenAI's API."""

import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from logitjax.decoding import TextStream
from logitjax.serving._errors import ApiError
from logitjax.serving._meter import Meter
from logitjax.serving._scheduler import Job, Token
from logitjax.serving._schema import CompletionRequest
from logitjax.serving._service import Service


class Answer:
    """One choice of an answer: collects tokens, text and log-probabilities."""

    def __init__(
        self, service: Service, request: CompletionRequest, job: Job, index: int, prompt: Any
    ):
        self.job, self.index, self.prompt_tokens = job, index, len(prompt)
        self.shown: list[Token] = []
        self.tokens: list[Token] = []
        self.finish: str | None = None
        self.text = ""
        self._service, self._asked, self._prompt = service, request, prompt
        # A chat's answer is a text of its own: no word continues one of the template's.
        context = () if request.chat else prompt
        least = request.sampling.min_tokens
        self._stream = TextStream(service.tokenizer, request.stop, context, least)
        self._offset, self._begun = 0, time.monotonic()
        self.meter: Meter | None = None
        if math.isfinite(service.config.nats):
            ledger, disclosure = service.accounts.ledger, service.disclosure
            self.meter = Meter(ledger, disclosure, request, job.request, service.vocab_size)

    async def pieces(self) -> AsyncIterator[tuple[str, list[Token], str | None]]:
        """Return newly certain text and its tokens, with the finish reason in the last piece."""
        while self.finish is None:
            item = await self.job.tokens.get()
            if isinstance(item, ApiError):
                self.finish = "error"
                raise item
            if self._asked.echo and not self.shown:
                yield self._echoed()
            # Ended between two tokens.
            if isinstance(item, str):
                self.finish = item
                text = self._stream.finish()
                self.text += text
                yield text, [], self.finish
                return
            if not self.tokens:
                self._service.metrics.first_token.observe(time.monotonic() - self._begun)
            self._service.metrics.new_tokens.inc()
            self.tokens.append(item)
            self.shown.append(item)
            # The end-of-text token ends the answer and is not part of its text.
            text = "" if item.stopped else self._stream.push([item.id])
            if self._stream.stopped:
                self.finish = "stop"
                self.job.cancelled = not item.last
            elif item.last:
                self.finish = "stop" if item.stopped else "length"
                text += self._stream.finish()
            elif self.meter is not None and not self.meter.goes_on(item.id):
                # The end reveals only which tokens were shown: prices depend on nothing else.
                self.finish, self.job.cancelled = "length", True
                text += self._stream.finish()
            self.text += text
            yield text, [item], self.finish

    def _echoed(self) -> tuple[str, list[Token], None]:
        """The prompt as if it began the answer; nothing predicts its first token."""
        first = Token(self._prompt[0], None, ())
        self.shown = [first, *self.job.prompt_report]
        # The BOS token is a token of the prompt, but not part of the text that was sent.
        start = self._service.tokenizer.start
        marked = self._prompt[: len(start)] == start
        self.text = self._service.tokenizer.decode(self._prompt[len(start) if marked else 0 :])
        return self.text, list(self.shown), None

    @property
    def values(self) -> int:
        """Number of log-probabilities that were reported."""
        shown, request = 0, self._asked
        notes = ((request.prompt_shown, self.job.prompt_report), (request.logprobs, self.tokens))
        for few, tokens in notes:
            for token in tokens if few is not None else ():
                best = [id for id, _ in token.top[:few]]
                shown += len(best) + (token.logprob is not None and token.id not in best)
        return shown

    def logprobs(self, tokens: Sequence[Token]) -> Any:
        if self._asked.logprobs is None:
            return None
        return (self._chat_logprobs if self._asked.chat else self._completion_logprobs)(tokens)

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._asked.tokens_as_ids else self._service.names(token)[0]

    def _completion_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        names = [self._name(t.id) for t in tokens]
        offsets, marks = [], self._service.tokenizer.start
        for token, name in zip(tokens, names, strict=True):
            offsets.append(self._offset)
            self._offset += 0 if token.id in marks else len(name)
        few, as_ids = self._asked.logprobs or 0, self._asked.tokens_as_ids
        by_name = self._service.names.by_name
        # Nothing predicts the first token of a prompt.
        tops = [by_name(t.top[:few], as_ids=as_ids) if t.top else None for t in tokens]
        return {
            "tokens": names,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": tops if few else None,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def entry(id: int, logprob: float | None) -> dict[str, Any]:
            stored = list(self._service.names(id)[1])
            return {"token": self._name(id), "logprob": logprob, "bytes": stored}

        few = self._asked.logprobs or 0
        content = [
            entry(t.id, t.logprob) | {"top_logprobs": [entry(i, p) for i, p in t.top[:few]]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}


def usage(answers: Sequence[Answer], request: CompletionRequest) -> dict[str, Any]:
    # The copies of one prompt count as one reading in the user's bill.
    prompt = sum(a.prompt_tokens for a in answers[:: request.n])
    new = sum(len(a.tokens) for a in answers)
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    cached = sum(a.job.cached for a in answers[:: request.n])
    return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


def frame(service: Service, request: CompletionRequest, *, chunk: bool) -> dict[str, Any]:
    kind = "chat.completion" if request.chat else "text_completion"
    kind = f"{kind}.chunk" if chunk and request.chat else kind
    name = f"{'chatcmpl' if request.chat else 'cmpl'}-{secrets.token_hex(12)}"
    about = {"id": name, "object": kind, "created": int(time.time())}
    return about | {"model": service.config.model}

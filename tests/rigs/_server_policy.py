"""In one process with the server: what a policy lets out, and what prefixes save."""

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.shared import suite
from logitjax import leakage, models
from logitjax.decoding import Ensemble
from logitjax.leakage import LogitPolicy
from logitjax.serving import ServerConfig, build_app
from tests.rigs._server_client import call, small_decoder

PROMPTS, TOP = 48, 5
# As many requests are under way.
_WIDE = 192
POLICIES = (
    ("bias none", LogitPolicy(top_k=TOP), 0.3),
    ("bias sampling", LogitPolicy(top_k=TOP, bias="sampling"), 0.4),
    ("bias sampling, noise 0.3", LogitPolicy(top_k=TOP, bias="sampling", noise=0.3), 0.3),
)
# What completion APIs did: the attack has teeth.
BEFORE = ("bias sampling, sampled", LogitPolicy(top_k=TOP, bias="sampling", sampled=True))


@dataclasses.dataclass
class Seen:
    """Values by context and token."""

    requests: int = 0
    refused: int = 0
    contexts: dict[tuple[int, ...], dict[int, list[float]]] = dataclasses.field(
        default_factory=dict
    )

    def take(self, body: Any, answer: Any) -> None:
        shown = answer["choices"][0]["logprobs"]
        # An echo begins before the prompt's first token.
        context = () if body["echo"] else tuple(body["prompt"])
        if shown is None:
            return
        tops = shown["top_logprobs"] or [{}] * len(shown["tokens"])
        names = zip(shown["tokens"], shown["token_logprobs"], tops, strict=True)
        for name, own, top in names:
            values = self.contexts.setdefault(context, {})
            for told, value in itertools.chain((top or {}).items(), [(name, own)]):
                if value is not None:
                    values.setdefault(_id(told), []).append(value)
            context = (*context, _id(name))

    @property
    def most_tokens(self) -> int:
        return max(map(len, self.contexts.values()), default=0)

    @property
    def most_values(self) -> int:
        """Most values of one context; those within rounding of each other are one."""
        counts = []
        for values in self.contexts.values():
            every = np.sort(np.concatenate([np.array(v) for v in values.values()] or [[]]))
            counts.append(int((np.diff(every) > 1e-3).sum()) + bool(len(every)))
        return max(counts, default=0)


def _id(name: str) -> int:
    return int(name.removeprefix("token_id:"))


def _requests(prompts: np.ndarray, vocab: int, biased: bool, count: int) -> Iterator[Any]:
    """Each token of each prompt is forced in turn, with whatever else may move a value."""
    rng = np.random.default_rng(0)
    turns = itertools.cycle(itertools.product(range(vocab), range(len(prompts))))
    for token, row in itertools.islice(turns, count):
        body: dict[str, Any] = {
            "prompt": prompts[row].tolist(),
            "max_tokens": int(rng.choice([1, 1, 1, 2, 3])),
            "logprobs": int(rng.integers(0, TOP + 1)),
            "temperature": float(rng.choice([0.0, 0.5, 2.0])),
            "repetition_penalty": float(rng.choice([0.1, 1.0, 10.0])),
            "presence_penalty": float(rng.choice([-2.0, 0.0, 2.0])),
            "top_p": float(rng.choice([1e-6, 0.5, 1.0])),
            "min_p": float(rng.random()),
            "seed": int(rng.integers(2**32)),
            "echo": bool(rng.random() < 0.1),
            "return_tokens_as_token_ids": True,
        }
        if biased:
            others = rng.integers(0, vocab, 4).tolist()
            body["logit_bias"] = {str(i): float(rng.uniform(-100, 100)) for i in others}
            body["logit_bias"][str(token)] = 100
        else:
            # Seen tokens are what a penalty moves: a prompt that says the token first.
            body["prompt"] = [token, *body["prompt"]] if rng.random() < 0.3 else body["prompt"]
        yield body


async def _ask(app: Any, bodies: Iterator[Any]) -> Seen:
    seen = Seen()

    async def client() -> None:
        for body in bodies:
            status, answer = await call(app, body)
            seen.requests += 1
            if status == 200:
                seen.take(body, answer)
            else:
                seen.refused += 1

    async with app.router.lifespan_context(app):
        app.state.service.scheduler.ready.wait()
        await asyncio.gather(*[client() for _ in range(_WIDE)])
    return seen


def _width(seen: Seen, prompts: np.ndarray, vocab: int) -> Any:
    """The width as who fills in the smallest value he saw would estimate it."""
    rows = []
    for prompt in prompts:
        values = seen.contexts.get(tuple(prompt.tolist()), {})
        smallest = min((v[0] for v in values.values()), default=0.0)
        rows.append([values.get(i, [smallest])[0] for i in range(vocab)])
    return leakage.estimate_output_subspace(np.array(rows, np.float32)).width


def policies(options: suite.Options) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    model, tokenizer = models.load("tiny", layout="listed")
    vocab, width = model.config.vocab_size, model.config.hidden_size
    prompts = np.random.default_rng(1).integers(1, vocab, (PROMPTS, 6))
    total = 600 if options.smoke else 100_000
    cases = [(name, policy, int(share * total)) for name, policy, share in POLICIES]
    cases.append((*BEFORE, 300 if options.smoke else PROMPTS * vocab))
    rows, most, found = [], 0, 0
    for name, policy, count in cases:
        config = ServerConfig(
            model="tiny",
            policy=policy,
            slots=32,
            max_length=128,
            # Sixteen of these prompts make one piece.
            prefill_rows=16,
            max_tokens=4,
            max_waiting=2 * _WIDE,
        )
        app = build_app(Ensemble(model), tokenizer, (), config)
        bodies = _requests(prompts, vocab, policy.bias != "none", count)
        seen = asyncio.run(_ask(app, bodies))
        estimate = _width(seen, prompts, vocab)
        row = {"policy": name, "requests": seen.requests, "refused": seen.refused}
        row |= {"positions": len(seen.contexts), "most tokens told of one": seen.most_tokens}
        rows.append(row | {"most values": seen.most_values, "width": str(estimate)})
        if not policy.sampled:
            most = max(most, seen.most_tokens, seen.most_values)
            found += estimate.estimate == width
    return rows, [
        suite.at_most("policy fuzzer: most values or tokens of a position", most, TOP),
        suite.at_most("policy fuzzer: policies whose width came out", found, 0),
    ]


async def _work(shared: int, tails: Sequence[Sequence[int]], prefix_mb: int) -> Any:
    """Tokens read, tokens reused, and the answers of prompts that begin alike, all at once."""
    policy = LogitPolicy(returns="token")
    config = ServerConfig(
        model="small",
        policy=policy,
        max_length=shared + 64,
        max_tokens=16,
        prefix_cache_mb=prefix_mb,
    )
    app = build_app(Ensemble(small_decoder(1000)), models.load_tokenizer("tiny"), (), config)
    prefix = np.random.default_rng(0).integers(1, 1000, shared).tolist()

    async def one(tail: Sequence[int]) -> list[str]:
        body = {"prompt": [*prefix, *tail], "max_tokens": 16, "temperature": 0, "logprobs": 0}
        _, answer = await call(app, body | {"return_tokens_as_token_ids": True})
        return answer["choices"][0]["logprobs"]["tokens"]

    async with app.router.lifespan_context(app):
        answers = await asyncio.gather(*map(one, tails))
        reader = app.state.service.scheduler.reader
        return reader.tokens_read, reader.tokens_reused, answers


def prefixes(options: suite.Options) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    shared = 128 if options.smoke else 512
    tails = np.random.default_rng(1).integers(1, 1000, (32, 16)).tolist()
    without, _, plain = asyncio.run(_work(shared, tails, 0))
    read, reused, answers = asyncio.run(_work(shared, tails, 64))
    differing = sum(a != b for a, b in zip(plain, answers, strict=True))
    what = f"32 prompts, {shared} tokens in common and 16 of their own"
    row: dict[str, Any] = {"what": what}
    row |= {"tokens read without": without, "tokens read": read, "reused": reused}
    row["answers that differ"] = differing
    return [row], [
        suite.at_most("shared prefix: share of prompts read", read / without, 0.2),
        suite.at_most("shared prefix: answers that differ", differing, 0),
    ]

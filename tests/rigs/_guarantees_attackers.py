"""What a logit costs an attacker who sees tokens only, beside what is known; and a width by draws.

`leakage.search_logits` asks about 100 logits of standard deviation 5 with a span of
35 nats, and the price is the number of queries a token until the middles of the bounds are off by
1e-2, 1e-3 and 1e-4 of the span, root mean square. The bounds have to hold the logits throughout.
The last kind audits a small model that reports only the log-probability of the token it draws.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx

from experiments.shared import suite
from logitjax import decoding, leakage, models

# Kind: cases at smoke and at full scale.
KINDS = {
    "one_of_n": (2, 20),
    "forced tokens": (1, 3),
}
# Measured from the published code's rules.
_KNOWN = (1.2, 2.1, 2.6)
_TARGETS = (1e-2, 1e-3, 1e-4)
_SPAN = 35.0


class _Tokens:
    """An API that says which token it draws at temperature 0, without a compiled program."""

    def __init__(self, logits: np.ndarray):
        self.policy = leakage.LogitPolicy.parse("argmax")
        self.queries = 0
        self._logits = logits

    def ask(self, prompts: Any, /, *, temperature: float = 0.0) -> Any:
        del temperature
        self.queries += len(prompts)
        return _Drawn(np.full((len(prompts), 1), self._logits.argmax()))

    def ask_biased(
        self, prompt: Any, bias_tokens: Any, bias_values: Any, /, *, temperature: float = 0.0
    ) -> Any:
        del prompt, temperature
        self.queries += len(bias_tokens)
        moved = np.repeat(self._logits[None], len(bias_tokens), axis=0)
        np.put_along_axis(
            moved, bias_tokens, np.take_along_axis(moved, bias_tokens, 1) + bias_values, axis=1
        )
        return _Drawn(moved.argmax(axis=1)[:, None])


class _Drawn:
    """An answer of tokens only."""

    def __init__(self, tokens: np.ndarray):
        self.tokens = tokens
        self.values = np.zeros((len(tokens), 0), np.float32)


def run(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """One row a case."""
    rng = np.random.default_rng(seed)
    return [_width(rng) if kind == "forced tokens" else _price(rng) for _ in range(count)]


def _price(rng: np.random.Generator) -> dict[str, Any]:
    logits = 5 * rng.standard_normal(100)
    truth = logits - logits.max()
    errors, queries, outside = [], [], 0
    # A search asks the same whenever it is to stop, so its stops are points of one curve.
    for tolerance in np.geomspace(0.5, 1e-4, 24) * _SPAN:
        oracle = _Tokens(logits)
        found = leakage.search_logits(
            oracle, [0], np.arange(100), span=_SPAN, tolerance=float(tolerance)
        )
        errors.append(np.sqrt(np.mean((found.middle - truth) ** 2)) / _SPAN)
        queries.append(oracle.queries / 100)
        outside += int(((truth < found.lower - 1e-6) | (truth > found.upper + 1e-6)).sum())
    # Errors fall with the tolerance but for a tie here and there.
    falling = np.minimum.accumulate(np.where(np.isnan(errors), 1.0, errors))
    price = np.interp(-np.log(_TARGETS), -np.log(falling), queries)
    return {"outside": outside, "queries a token": price.tolist()}


def _width(rng: np.random.Generator) -> dict[str, Any]:
    model, _ = models.load("tiny", layout="listed")
    graphdef, state = nnx.split(model)
    last = decoding.next_token_program(graphdef)
    prompts = rng.integers(0, 257, (40, 8), np.int32)
    oracle = leakage.LogitOracle(
        lambda tokens: last(state, tokens), leakage.LogitPolicy.parse("sampling")
    )
    found = leakage.audit(oracle, prompts, 257, corner=40)
    width = found.width
    assert width is not None
    truth = np.asarray(model.head_of().rows).shape[1]
    return {"off": abs((width.estimate or 0) - truth), "queries": found.queries}


def report(cases: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    """A row a kind, and the promises."""
    rows, bars = [], []
    for kind in dict.fromkeys(case["kind"] for case in cases):
        some = [case for case in cases if case["kind"] == kind]
        row = {"area": "attackers", "kind": kind, "cases": len(some)}
        if kind == "forced tokens":
            row |= {"queries": some[0]["queries"]}
            off = max(case["off"] for case in some)
            bars.append(suite.at_most("attackers: width by forced tokens off by", off, 0))
        else:
            price = np.mean([case["queries a token"] for case in some], axis=0)
            row |= {
                "violations": sum(case["outside"] for case in some),
                **{f"queries to {t:.0e}": p for t, p in zip(_TARGETS, price.tolist(), strict=True)},
            }
            bars.append(
                suite.at_most(
                    f"attackers, {kind}: queries a token / known",
                    float((price / np.array(_KNOWN)).max()),
                    1.1,
                )
            )
        rows.append(row)
    outside = sum(row.get("violations", 0) for row in rows)
    return rows, [*bars, suite.at_most("attackers: logits out of bounds", outside, 0)]

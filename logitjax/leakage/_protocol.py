"""What a server does, tested before anything that it answers is certified."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from logitjax.leakage._policy import Answer, LogitPolicy
from logitjax.leakage._recover_row import RecoveredRow

#: Familywise level of the tests, by Holm's rule.
LEVEL = 0.01
# Repeats of a query: a server that changes one answer in three is seen at the level.
_REPEATS = 12
# Prompts whose values are looked at for a lattice, and draws that are held against a row.
_PROMPTS, _DRAWN = 16, 64
_EPS = 16 * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One test of a server.

    Attributes:
        test: What was tested.
        seen: What the server does.
        p: Probability of such answers if it did not.
        effect: Its size, in nats if `seen` does not say of what.
        declared: Whether the policy says the same.
    """

    test: str
    seen: str
    p: float
    effect: float
    declared: bool


@dataclasses.dataclass(kw_only=True)
class Protocol:
    """What tests say of a server.

    Attributes:
        policy: As declared, with the decimals that were seen.
        findings: The tests in turn.
        first: Values after the first prompt, by token.
        sigma: Standard deviation of a value between equal queries, an upper bound; 0 without noise.
        step: Half the distance of neighbouring values.
    """

    policy: LogitPolicy
    findings: list[Finding] = dataclasses.field(default_factory=list)
    first: dict[int, float] = dataclasses.field(default_factory=dict)
    sigma: float = 0.0
    step: float = 0.0

    def add(self, test: str, seen: str, p: float, effect: float, *, declared: bool) -> None:
        p, effect = float(p), float(effect)
        self.findings.append(Finding(test=test, seen=seen, p=p, effect=effect, declared=declared))

    def compare(self, test: str, seen: str, errors: Any, size: float = 1.0) -> None:
        """Numbers that would be zero but for rounding of values of some size, and for noise."""
        errors = np.abs(np.asarray(errors, np.float64)).ravel()
        scale = math.hypot(max(_EPS * max(1.0, size), 2 * self.step), 2 * self.sigma)
        # No number where there should be one is as wrong as can be.
        worst = float(np.nan_to_num(errors, nan=np.inf).max(initial=0.0))
        p = min(1.0, max(1, len(errors)) * math.erfc(worst / scale / math.sqrt(2)))
        self.add(test, seen, p, worst, declared=p > LEVEL)

    @property
    def unlike(self) -> list[Finding]:
        """What is not as declared, by Holm's rule over all tests."""
        order = sorted(self.findings, key=lambda finding: finding.p)
        passed = [f.p > LEVEL / (len(order) - i) for i, f in enumerate(order)]
        last = passed.index(True) if any(passed) else len(order)
        return [finding for finding in order[:last] if not finding.declared]


def infer_protocol(protocol: Protocol, oracle: Any, prompts: Sequence[Any]) -> None:
    """Tests what a server reports, and whether it is what its policy says.

    Equal queries tell noise, several prompts the lattice that values lie on, other temperatures
    whether values stay, and growing biases what a bias moves and how far.

    References:
        Holm, 1979 (Scandinavian Journal of Statistics 6), for the level over all tests.
    """
    equal = oracle.ask([prompts[0]] * _REPEATS)
    _noise(protocol, "one prompt again", equal)
    _draws(protocol, oracle, prompts[0])
    if oracle.policy.returns == "token":
        return
    protocol.first = first = _mean(equal)
    values = np.asarray(oracle.ask(prompts[:_PROMPTS]).values, np.float64)
    _lattice(protocol, values)
    if values.shape[1] == (oracle.policy.top_k or 0) and oracle.policy.returns == "logprobs":
        mass = np.logaddexp.reduce(values, axis=1)
        seen = "values of a prompt sum to at most 1"
        protocol.compare("mass", seen, np.maximum(mass, 0.0), np.sqrt(values.shape[1]))
    for temperature in (0.5, 2.0):
        hot = oracle.ask([prompts[0]] * 4, temperature=temperature)
        moved = [value - first[t] for t, value in _pairs(hot) if t in first]
        seen = f"values at temperature {temperature} are those at 0"
        protocol.compare("temperature", seen, moved, max(map(abs, first.values())))
    _bias(protocol, oracle, prompts[0], first)
    _echo(protocol, oracle, prompts[0])


def ask_at_end(protocol: Protocol, oracle: Any, prompt: Any) -> None:
    """The first query once more, after all others: weights that were changed."""
    if protocol.first:
        last = _mean(oracle.ask([prompt]))
        moved = [last.get(token, math.nan) - value for token, value in protocol.first.items()]
        protocol.compare("at the end", "values of the first prompt are those of the start", moved)


def _draws(protocol: Protocol, oracle: Any, prompt: Any) -> None:
    """Draws at temperature 1: whether a seed repeats them, and whether values are their rates."""
    policy = protocol.policy
    if policy.returns != "token" and not policy.sampled:
        return
    answer = oracle.ask([prompt] * _DRAWN, temperature=1.0)
    drawn = np.asarray(answer.tokens)[:, 0]
    if policy.returns != "token":
        # Each distinct value is a rate of its own; that of the likeliest decides.
        token, value = max(_pairs(answer), key=lambda pair: pair[1])
        count = int((drawn == token).sum())
        p = scipy.stats.binomtest(count, _DRAWN, min(1.0, math.exp(value))).pvalue
        seen = f"{count} of {_DRAWN} draws are of a token of {math.exp(value):.3f}, off by"
        off = count / _DRAWN - math.exp(value)
        protocol.add("rates", seen, p, abs(off), declared=p > LEVEL)
    if hasattr(oracle, "seed"):
        oracle.seed = 7
        again = np.asarray(oracle.ask([prompt] * _REPEATS, temperature=1.0).tokens)[:, 0]
        oracle.seed = None
        same = int((again[1:] == again[0]).sum())
        chance = (int((drawn == again[0]).sum()) + 1) / (_DRAWN + 2)
        p = scipy.stats.binom.sf(same - 1, _REPEATS - 1, chance)
        seen = f"equal draws of equal seeds: {same} of {_REPEATS - 1}, by chance {chance:.2f}"
        protocol.add("seed", seen, p, same / (_REPEATS - 1), declared=True)


def _echo(protocol: Protocol, oracle: Any, prompt: Any) -> None:
    """Values of a context inside a prompt against those after it: noise keyed by the request."""
    if not hasattr(oracle, "read") or len(prompt) < 3 or not protocol.policy.top_k:
        return
    try:
        inside = _mean(
            Answer(values=(part := oracle.read([prompt])[0]).values[-1:], tokens=part.tokens[-1:])
        )
    except (ValueError, LookupError, TypeError) as error:
        protocol.add("echo", f"refused: {str(error)[:60]}", 1.0, 0.0, declared=True)
        return
    after = _mean(oracle.ask([prompt[:-1]]))
    apart = [inside[token] - after[token] for token in inside if token in after]
    protocol.compare("echo", "values inside a prompt are those after it", apart)


def _pairs(answer: Answer) -> list[tuple[int, float]]:
    values = np.asarray(answer.values, np.float64)
    tokens = np.asarray(answer.tokens)[:, : values.shape[1]]
    return list(zip(tokens.ravel().tolist(), values.ravel().tolist(), strict=True))


def _mean(answer: Answer) -> dict[int, float]:
    tokens = dict.fromkeys(token for token, _ in _pairs(answer))
    return {t: float(np.mean([v for u, v in _pairs(answer) if u == t])) for t in tokens}


def _noise(protocol: Protocol, test: str, answer: Answer) -> None:
    """Equal queries: whatever differs is noise; its size by chi^2, its absence by a rate."""
    tokens = np.asarray(answer.tokens)
    flips = int((tokens != tokens[:1]).any(axis=1).sum())
    mean, pairs = _mean(answer), _pairs(answer)
    off = np.array([value - mean[token] for token, value in pairs])
    free = max(1, len(pairs) - len(mean))
    worst, sigma = np.abs(off).max(initial=0.0), math.sqrt((off**2).sum() / free)
    fresh = protocol.policy.noise if protocol.policy.noise_per == "query" else 0.0
    if not flips and worst <= _EPS * max([1.0, *map(abs, mean.values())]):
        rate = 1 - 0.05 ** (1 / len(tokens))
        seen = f"no difference in {len(tokens)}; with 95 % fewer than {rate:.0%} of answers differ"
        protocol.add(test, seen, 0.0 if fresh else 1.0, 0.0, declared=not fresh)
        return
    p = 0.0
    if fresh:
        tail = scipy.stats.chi2.cdf(free * (sigma / fresh) ** 2, free)
        p = 2 * min(tail, 1 - tail)
    protocol.sigma = max(
        protocol.sigma, sigma * math.sqrt(free / scipy.stats.chi2.ppf(LEVEL, free))
    )
    seen = f"noise of {sigma:.2g}, {flips} of {len(tokens)} list other tokens"
    protocol.add(test, seen, p, sigma, declared=bool(fresh) and p > LEVEL)


def _lattice(protocol: Protocol, values: np.ndarray) -> None:
    """Decimals of values, bits of values, and binary places of logits, by their differences."""
    policy, some = protocol.policy, np.unique(values)
    some = some[(some != 0) & np.isfinite(some)]
    near = _EPS / 4 * np.abs(some).max(initial=1.0)
    declared = policy.decimals if policy.decimals is not None and policy.decimals < 6 else None
    for decimals in range(6):
        on, p = _lies_on(some, 10.0**-decimals, near)
        if on:
            protocol.step = 0.5 * 10.0**-decimals
            protocol.policy = dataclasses.replace(policy, decimals=decimals)
            same = declared == decimals
            protocol.add("lattice", f"{decimals} decimals", p, protocol.step, declared=same)
            return
    if declared is not None and len(some) >= 4:
        protocol.add("lattice", "more decimals", 0.0, 0.5 * 10.0**-declared, declared=False)
    bits = np.float32(some).view(np.uint32)
    for name, zeros, mantissa in (("float8", 20, 3), ("bfloat16", 16, 7), ("float16", 13, 10)):
        if len(some) >= 4 and not (bits % 2**zeros).any():
            protocol.step = float(np.abs(some).max()) * 2.0 ** -(mantissa + 1)
            p = 2.0 ** -(zeros * len(some))
            protocol.add("lattice", f"{name} values", p, protocol.step, declared=False)
            return
    # Rounded logits: the normaliser moves their lattice, and leaves their differences.
    apart = np.unique(np.diff(values, axis=1))
    for places in range(9):
        on, p = _lies_on(apart[apart != 0], 2.0**-places, 2 * near)
        if on:
            protocol.step = 2.0**-places
            protocol.add("lattice", f"logits to 2^-{places}", p, protocol.step, declared=True)
            return
    protocol.add("lattice", "none", 1.0, 0.0, declared=True)


def _lies_on(values: np.ndarray, step: float, near: float) -> tuple[bool, float]:
    """Whether all values are multiples of a step, and how likely that is by chance."""
    if len(values) < 4 or near > step / 4:
        return False, 1.0
    off = np.abs(values - step * np.round(values / step)).max()
    p = float((2 * max(off, near) / step) ** len(values))
    return bool(off <= near and p < LEVEL / 20), p


def _bias(protocol: Protocol, oracle: Any, prompt: Any, first: dict[int, float]) -> None:
    """Growing biases on one token, whose value is known without: what they move, and how far."""
    policy = protocol.policy
    ranked = sorted(first, key=lambda token: -first[token])
    token = ranked[min(1, len(ranked) - 1)]
    sizes = np.minimum([1.0, 5.0, 20.0, 80.0], policy.bias_limit)
    try:
        answer = oracle.ask_biased(prompt, np.full((4, 1), token), sizes[:, None])
        drawn = np.asarray(answer.tokens)[:, 0]
        _noise(
            protocol, "a bias again", oracle.ask_biased(prompt, [ranked[:1]] * 6, np.ones((6, 1)))
        )
    except ValueError as error:
        declared = policy.bias == "none"
        protocol.add("bias", f"refused: {str(error)[:60]}", 0.0, 0.0, declared=declared)
        return
    values, tokens = np.asarray(answer.values, np.float64), np.asarray(answer.tokens)
    here = np.where(tokens == token, values, np.nan)
    seen, start = np.nanmax(here, axis=1, initial=-np.inf), first[token]
    with np.errstate(over="ignore"):
        total = np.log1p(np.expm1(sizes) * math.exp(start)) if policy.returns == "logprobs" else 0.0
    reported, still = np.abs(seen - start - sizes + total), np.abs(seen - start)
    moved = "sampling" if policy.sampled and drawn[-1] == token != ranked[0] else "none"
    kind, errors = min((("reported", reported), (moved, still)), key=lambda pair: pair[1].max())
    names = {policy.bias} | ({"none", "sampling"} if policy.bias != "reported" else set())
    if policy.bias == "none" and moved == "sampling":
        names = {"none"}
    protocol.compare("bias", f"as if {kind}; values of {sizes} are off by", errors, 80.0)
    protocol.add("bias moves", kind, 0.0, float(still.max()), declared=kind in names)


def tell_again(protocol: Protocol, oracle: Any, prompt: Any, row: RecoveredRow) -> RecoveredRow:
    """Asks for each token of a row once more, by other queries, and widens its error.

    Where biases move what is reported, tokens in another order are lifted each by what it lacks to
    the first one. Forced tokens are forced by a smaller bias. Bounds of a search are tried at both
    ends.
    """
    rng, policy, tokens = np.random.default_rng(1), oracle.policy, np.flatnonzero(row.known)
    log_probs = row.log_probs.astype(np.float64)
    lack, rng_order = np.nanmax(log_probs) - log_probs, rng.permutation(tokens)
    if row.method == "harvested":
        answer = oracle.ask([prompt] * max(1, row.queries // 4), temperature=2.0)
        errors = [value - log_probs[t] for t, value in _pairs(answer) if row.known[t]]
    elif not math.isfinite(row.error_bound):
        errors = [math.nan]
    elif row.method == "searched":
        near = row.error_bound + 1e-3
        order = rng_order[lack[rng_order] > near]
        sizes = lack[order][:, None] + near * np.array([1.0, -1.0])
        answer = oracle.ask_biased(prompt, np.repeat(order, 2)[:, None], sizes.reshape(-1, 1))
        drawn = np.asarray(answer.tokens).reshape(-1, 2) == order[:, None]
        errors = np.where(drawn == [True, False], 0.0, np.nan).ravel()
    elif row.method == "forced":
        size = 0.7 * policy.bias_limit
        order = rng_order[lack[rng_order] < size - 1]
        answer = oracle.ask_biased(prompt, order[:, None], np.full((len(order), 1), size))
        came = np.asarray(answer.tokens)[:, 0] == order
        errors = np.where(came, np.asarray(answer.values)[:, 0] - log_probs[order], np.nan)
    else:
        order = rng_order[lack[rng_order] + 2.5 <= policy.bias_limit]
        errors = _lifted(
            oracle, prompt, log_probs, order, lack[order] + rng.uniform(0.5, 2.5, len(order))
        )
    known = row.known.copy()
    if row.method in ("reference", "visible", "alone", "forced"):
        known[np.setdiff1d(tokens, order)] = False
    protocol.compare("told again", f"{np.size(errors)} values by other queries", errors, 30.0)
    off = np.abs(np.asarray(errors, np.float64))
    off = off[np.isfinite(off)]
    # Of the largest of as many normal errors, of a difference of three values.
    noise = math.sqrt(3) * protocol.sigma * math.sqrt(2 * math.log(100 * max(1, known.size)))
    bound = row.error_bound + 2 * off.max(initial=0.0) + 2 * protocol.step + noise
    if known.all() and row.method != "searched":
        mass = float(np.logaddexp.reduce(log_probs))
        seen = "a whole row sums to 1"
        protocol.compare("sum", seen, [max(0.0, abs(mass) - row.error_bound)], 30.0)
    lowest = log_probs[known].min(initial=np.inf)
    ties = int((log_probs[known] <= lowest + 1e-4).sum())
    if ties > 3 and policy.floor is None and row.method not in ("searched", "harvested"):
        protocol.add("floor", f"{ties} tokens at {lowest:.3g}", 0.0, float(ties), declared=False)
    return dataclasses.replace(row, known=known, error_bound=bound, queries=row.queries)


def _lifted(
    oracle: Any, prompt: Any, log_probs: np.ndarray, order: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Errors of what is foretold of tokens that are lifted, in groups, above all others."""
    policy = oracle.policy
    group = max(1, min(policy.top_k or 1, policy.max_biased) - 1)
    short = -len(order) % group
    tokens = np.concatenate([order, order[:short]]).reshape(-1, group)
    lifts = np.concatenate([sizes, np.zeros(short)]).reshape(-1, group)
    answer = oracle.ask_biased(prompt, tokens, lifts)
    said = np.asarray(answer.tokens)[:, None, :] == tokens[:, :, None]
    values = np.where(said, np.asarray(answer.values, np.float64)[:, None, :], -np.inf).max(-1)
    at = log_probs[tokens]
    total = np.log1p((np.expm1(lifts) * np.exp(at)).sum(axis=1, keepdims=True))
    foretold = at + lifts - total
    errors = np.where(np.isfinite(values), values - foretold, np.nan)
    # A token that nearly is the answer tells little of itself: by 1 - P of its error.
    errors /= np.maximum(-np.expm1(np.minimum(foretold, -1e-6)), 1e-3)
    return errors[lifts > 0]

"""Tests of a server's behaviour, run before any of its answers are certified."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from logitjax.leakage._oracle import BudgetExhaustedError
from logitjax.leakage._policy import Answer, LogitPolicy
from logitjax.leakage._recover_row import RecoveredRow

#: Familywise level of the tests, by Holm's rule.
LEVEL = 0.01
# Equal queries, prompts whose values are searched for a lattice, draws to compare with them.
_REPEATS, _PROMPTS, _DRAWN, _SEEDS = 12, 16, 64, 40
# Error of a value in float32 arithmetic, and in its JSON text and ours.
_EPS = 16 * float(np.finfo(np.float32).eps)
_FORMATS = (("float8", 20, 3), ("bfloat16", 16, 7), ("float16", 13, 10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One test: the behaviour, the probability of such answers without it, the effect's size.

    The `effect` is in nats unless `seen` names a unit, and 1e9 if a number is missing. `declared`
    is whether the policy says the same.
    """

    test: str
    seen: str
    p: float
    effect: float
    declared: bool


@dataclasses.dataclass(kw_only=True)
class Protocol:
    """Results of the tests of a server.

    `policy` has the observed decimals, `first` the values after the first prompt. `sigma` is an
    upper bound of a value's deviation between equal queries, `step` half a lattice's.
    """

    policy: LogitPolicy
    findings: list[Finding] = dataclasses.field(default_factory=list)
    first: dict[int, float] = dataclasses.field(default_factory=dict)
    sigma: float = 0.0
    step: float = 0.0

    @property
    def unlike(self) -> list[Finding]:
        """List the declarations that fail, by Holm's rule over all tests."""
        order = sorted(self.findings, key=lambda finding: finding.p)
        passed = [f.p > LEVEL / (len(order) - i) for i, f in enumerate(order)] + [True]
        return [finding for finding in order[: passed.index(True)] if not finding.declared]

    def add(self, test: str, seen: str, p: float, effect: float, declared: bool) -> None:
        self.findings.append(Finding(test=test, seen=seen, p=p, effect=effect, declared=declared))

    def compare(self, test: str, seen: str, errors: Any, size: float = 10.0) -> None:
        """Numbers that would be zero without noise and without rounding of values of some size."""
        errors = np.abs(np.asarray(errors, np.float64)).ravel()
        scale = math.hypot(max(_EPS * max(1.0, size), 2 * self.step), 2 * self.sigma)
        # A missing number counts as the largest possible error.
        worst = float(np.nan_to_num(errors, nan=1e9, posinf=1e9).max(initial=0.0))
        p = min(1.0, max(1, len(errors)) * math.erfc(worst / scale / math.sqrt(2)))
        self.add(test, seen, p, worst, p > LEVEL)

    def repeated(self, test: str, answer: Answer) -> None:
        """Equal queries: any difference is noise; its size by chi^2, its absence by a rate."""
        tokens, pairs, mean = np.asarray(answer.tokens), _pairs(answer), _means(answer)
        flips = int((tokens != tokens[:1]).any(axis=1).sum())
        off = np.array([value - mean[token] for token, value in pairs])
        free = max(1, len(pairs) - len(mean))
        sigma = math.sqrt((off**2).sum() / free)
        fresh = self.policy.noise if self.policy.noise_per == "query" else 0.0
        rounding = _EPS * max([1.0, *map(abs, mean.values())])
        if not flips and np.abs(off).max(initial=0.0) <= rounding:
            most = f"at 95 % fewer than {1 - 0.05 ** (1 / len(tokens)):.0%} of answers differ"
            seen = f"no difference in {len(tokens)}: {most}"
            self.add(test, seen, 0.0 if fresh else 1.0, 0.0, not fresh)
            return
        tail = float(scipy.stats.chi2.cdf(free * (sigma / fresh) ** 2, free)) if fresh else 0.0
        p = 2 * min(tail, 1 - tail)
        low = scipy.stats.chi2.ppf(LEVEL, free) / free
        self.sigma = max(self.sigma, sigma / math.sqrt(low))
        seen = f"noise of {sigma:.2g}, {flips} of {len(tokens)} list other tokens"
        self.add(test, seen, p, sigma, p > LEVEL)


def infer_protocol(protocol: Protocol, oracle: Any, prompts: Any) -> None:
    """Test what a server reports against its policy, at one level over all tests (Holm, 1979)."""
    policy, prompt = oracle.policy, prompts[0]
    equal = oracle.ask([prompt] * _REPEATS)
    protocol.repeated("one prompt again", equal)
    if policy.returns != "token" and policy.sampled:
        _rates(protocol, oracle, prompt)
    if policy.returns != "token":
        _values(protocol, oracle, prompts, equal)
    if hasattr(oracle, "draws"):
        _choices(protocol, oracle, prompts)


def _values(protocol: Protocol, oracle: Any, prompts: Any, equal: Answer) -> None:
    """Lattice, mass and temperature of reported values, and the effects of a bias and an echo."""
    policy, prompt = oracle.policy, prompts[0]
    protocol.first = first = _means(equal)
    values = np.asarray(oracle.ask(prompts[:_PROMPTS]).values, np.float64)
    _lattice(protocol, values)
    if values.shape[1] == policy.top_k and policy.returns == "logprobs" and policy.floor is None:
        mass = np.maximum(np.logaddexp.reduce(values, axis=1), 0.0)
        protocol.compare("mass", "values sum to at most 1", mass, values.shape[1] ** 0.5)
    for temperature in (0.5, 2.0):
        hot = oracle.ask([prompt] * 4, temperature=temperature)
        moved = [value - first[token] for token, value in _pairs(hot) if token in first]
        seen = f"values at temperature {temperature} are those at 0"
        protocol.compare("temperature", seen, moved, max(map(abs, first.values())))
    _bias(protocol, oracle, prompt)
    if hasattr(oracle, "read") and policy.top_k and len(prompt) > 2:
        _echo(protocol, oracle, prompt)


def ask_at_end(protocol: Protocol, oracle: Any, prompt: Any) -> None:
    """The first query again, after all others, to detect changed weights."""
    if protocol.first:
        last = _means(oracle.ask([prompt]))
        moved = [last.get(token, math.nan) - value for token, value in protocol.first.items()]
        protocol.compare("at the end", "values of the first prompt are those of the start", moved)


def _pairs(answer: Answer) -> list[tuple[int, float]]:
    values = np.asarray(answer.values, np.float64)
    tokens = np.asarray(answer.tokens)[:, : values.shape[1]]
    return list(zip(tokens.ravel().tolist(), values.ravel().tolist(), strict=True))


def _means(answer: Answer) -> dict[int, float]:
    values: dict[int, list[float]] = {}
    for token, value in _pairs(answer):
        values.setdefault(token, []).append(value)
    return {token: float(np.mean(some)) for token, some in values.items()}


def _rates(protocol: Protocol, oracle: Any, prompt: Any) -> None:
    """Draws at temperature 1: whether their rates match the values."""
    answer = oracle.ask([prompt] * _DRAWN, temperature=1.0)
    token, value = max(_pairs(answer), key=lambda pair: pair[1])
    rate = float(np.exp(min(0.0, value)))
    count = int((np.asarray(answer.tokens)[:, 0] == token).sum())
    p = float(scipy.stats.binomtest(count, _DRAWN, rate).pvalue)
    seen = f"{count} of {_DRAWN} draws are of a token of {rate:.3f}, off by"
    protocol.add("rates", seen, p, abs(count / _DRAWN - rate), p > LEVEL)


def _choices(protocol: Protocol, oracle: Any, prompts: Any) -> None:
    """Whether draws depend on seeds, and by which rule. No policy declares this."""
    seeds = [{"temperature": 1.0, "seed": seed} for seed in range(_SEEDS)]
    prompt, rng = prompts[0], np.random.default_rng(0)

    def repeated(test: str, what: str, **more: Any) -> np.ndarray | None:
        """Draws with the same seeds again, and how many agree, compared with chance."""
        query = more.pop("prompt", prompt)
        again = _drawn(oracle, query, [fields | more for fields in seeds])
        if again is None:
            protocol.add(test, f"{what}: refused", 1.0, 0.0, True)
            return None
        same = int((again == drawn).sum())
        # Pairs of unequal seeds show how often draws agree by chance.
        by_chance = [int((rng.permutation(again) == drawn).sum()) for _ in range(500)]
        p = (1 + sum(count >= same for count in by_chance)) / 501
        seen = f"{what}: {same} of {_SEEDS} draws stay, by chance {np.mean(by_chance):.1f}"
        protocol.add(test, seen, p, same / _SEEDS, True)
        return again

    drawn = _drawn(oracle, prompt, seeds)
    if drawn is None:
        protocol.add("seed", "seeds are refused", 1.0, 0.0, True)
        return
    repeated("seed", "equal seeds")
    # Noise shared by requests makes each field a comparison (`Choice`).
    repeated("key", "min_p of 1e-7 beside none", min_p=1e-7)
    repeated("prompts", "another prompt", prompt=prompts[1])
    alone = np.array([oracle.draws(prompt, [fields])[0] for fields in seeds[:_REPEATS]])
    flips = int((alone != drawn[:_REPEATS]).sum())
    protocol.add("company", f"{flips} of {_REPEATS} draws differ alone", 1.0, flips, True)
    warmer = repeated("law", "temperature 1.2 beside 1", temperature=1.2)
    if warmer is not None and (moved := warmer != drawn).any():
        # Inverse distribution functions move a draw to a neighbour; Gumbel noise to any token.
        order = np.unique([*drawn, *warmer])
        steps = np.abs(np.searchsorted(order, warmer) - np.searchsorted(order, drawn))[moved]
        near, by_chance = int((steps == 1).sum()), min(1.0, 2 / max(1, len(order) - 1))
        p = float(scipy.stats.binom.sf(near - 1, len(steps), by_chance))
        seen = f"{near} of {len(steps)} draws move to a neighbour, by chance {by_chance:.2f}"
        protocol.add("law", seen, p, near / len(steps), True)
    _rules(protocol, oracle, prompt)


def _rules(protocol: Protocol, oracle: Any, prompt: Any) -> None:
    """Whether `min_p` comes after the temperature, and whether penalties count the prompt."""
    hot = [{"temperature": 2.0, "min_p": math.exp(-1.5), "seed": seed} for seed in range(_DRAWN)]
    best = max(protocol.first.values(), default=0.0)
    cut = _drawn(oracle, prompt, hot)
    if cut is not None:
        gaps = [protocol.first.get(int(token), math.nan) - best for token in cut]
        between = int(sum(-2.9 < gap < -1.6 for gap in gaps))
        seen = f"{between} draws lie between the cuts before and after the temperature"
        protocol.add("min_p", seen, 0.0 if between else 1.0, between, True)
    # The most likely token repeated after the prompt: a server that counts it picks another.
    first = oracle.draws(prompt, [{"temperature": 0.0}])
    longer = [int(first[0]), *np.asarray(prompt).tolist()]
    plain = oracle.draws(longer, [{"temperature": 0.0}])
    names = []
    for name, size in (("repetition_penalty", 10.0), ("presence_penalty", 2.0)):
        moved = _drawn(oracle, longer, [{"temperature": 0.0, name: size}])
        names += [name] if moved is not None and moved[0] not in plain else []
    where = "in" if plain[0] in longer else "not in"
    seen = f"the likeliest token, {where} the prompt, moves by {', '.join(names) or 'none'}"
    protocol.add("penalties", seen, 1.0, len(names), True)


def _drawn(oracle: Any, prompt: Any, fields: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """Draws for each of some fields; None if the server refuses them."""
    try:
        return oracle.draws(prompt, fields)
    except BudgetExhaustedError:
        raise
    except ValueError:
        return None


def _echo(protocol: Protocol, oracle: Any, prompt: Any) -> None:
    """Values of a context inside a prompt against those after it: noise keyed by the request."""
    try:
        part = oracle.read([prompt])[0]
    except (ValueError, LookupError, TypeError) as error:
        protocol.add("echo", f"refused: {str(error)[:60]}", 1.0, 0.0, True)
        return
    inside = _means(Answer(values=part.values[-1:], tokens=part.tokens[-1:]))
    after = _means(oracle.ask([prompt[:-1]]))
    apart = [inside[token] - after[token] for token in inside if token in after]
    protocol.compare("echo", "values inside a prompt are those after it", apart)


def _lattice(protocol: Protocol, values: np.ndarray) -> None:
    """Decimals of values, bits of values, and binary places of logits, by their differences."""
    policy, some = protocol.policy, np.unique(values[np.isfinite(values) & (values != 0)])
    near = _EPS / 4 * np.abs(some).max(initial=1.0)
    # More decimals than float32 has count as none.
    declared = policy.decimals if policy.decimals is not None and policy.decimals < 6 else None
    bits = np.float32(some).view(np.uint32)
    # Rounded logits: the normaliser shifts their lattice but keeps their differences.
    apart = np.unique(np.diff(values, axis=1))
    for decimals in range(6):
        on, p = _lies_on(some, 10.0**-decimals, near)
        if on:
            protocol.step = 0.5 * 10.0**-decimals
            protocol.policy = dataclasses.replace(policy, decimals=decimals)
            seen = f"{decimals} decimals"
            protocol.add("lattice", seen, p, protocol.step, declared == decimals)
            return
    if declared is not None and len(some) > 3:
        protocol.add("lattice", "more decimals", 0.0, 0.5 * 10.0**-declared, False)
    for name, zeros, mantissa in _FORMATS:
        if len(some) > 3 and not (bits % 2**zeros).any():
            protocol.step = float(np.abs(some).max()) * 2.0 ** -(mantissa + 1)
            p = 2.0 ** -(zeros * len(some))
            protocol.add("lattice", f"{name} values", p, protocol.step, False)
            return
    for places in range(9):
        on, p = _lies_on(apart[apart != 0], 2.0**-places, 2 * near)
        if on:
            # The finest place of all: larger logits are rounded to at most eight times as much.
            protocol.step = 4 * 2.0**-places
            protocol.add("lattice", f"logits to 2^-{places}", p, protocol.step, True)
            return
    protocol.add("lattice", "none", 1.0, 0.0, True)


def _lies_on(values: np.ndarray, step: float, near: float) -> tuple[bool, float]:
    """Whether all values are multiples of a step, and how likely that is by chance."""
    if len(values) < 4 or near > step / 4:
        return False, 1.0
    off = np.abs(values - step * np.round(values / step)).max()
    p = float((2 * max(off, near) / step) ** len(values))
    return bool(off <= near and p < LEVEL / 20), p


def _bias(protocol: Protocol, oracle: Any, prompt: Any) -> None:
    """Growing biases on one token whose unbiased value is known: their effect, and its limit."""
    policy, first = protocol.policy, protocol.first
    ranked = sorted(first, key=lambda token: -first[token])
    token = ranked[min(1, len(ranked) - 1)]
    sizes, start = np.minimum([1.0, 5.0, 20.0, 80.0], policy.bias_limit), first[token]
    try:
        answer = oracle.ask_biased(prompt, np.full((4, 1), token), sizes[:, None])
        again = oracle.ask_biased(prompt, [ranked[:1]] * 6, np.ones((6, 1)))
    except ValueError as error:
        seen = f"refused: {str(error)[:60]}"
        protocol.add("bias", seen, 0.0, 0.0, policy.bias == "none")
        return
    protocol.repeated("a bias again", again)
    tokens, values = np.asarray(answer.tokens), np.asarray(answer.values, np.float64)
    shown = np.where(tokens == token, values, -np.inf).max(axis=1)
    with np.errstate(over="ignore"):
        total = np.log1p(np.expm1(sizes) * np.exp(start)) if policy.returns == "logprobs" else 0.0
    reported, still = np.abs(shown - start - sizes + total), np.abs(shown - start)
    moved = "sampling" if policy.sampled and tokens[-1, 0] == token != ranked[0] else "none"
    kind, errors = min((("reported", reported), (moved, still)), key=lambda pair: pair[1].max())
    protocol.compare("bias", f"as if {kind}; values of {sizes} are off by", errors, 80.0)
    # Not every server reports the drawn token, so a bias of draws may look like none.
    alike = kind == policy.bias or (kind == "none" and policy.bias == "sampling")
    protocol.add("bias moves", kind, 0.0, float(still.max()), alike)


def tell_again(protocol: Protocol, oracle: Any, prompt: Any, row: RecoveredRow) -> RecoveredRow:
    """Query each token of a row again in another way, and widen its error."""
    rng, limit = np.random.default_rng(1), oracle.policy.bias_limit
    log_probs, existing = row.log_probs.astype(np.float64), row.known.copy()
    # A search of some tokens gives differences to its first, which may not be among them.
    first = 0.0 if row.method == "searched" and not existing.all() else np.nanmax(log_probs)
    lack, order = first - log_probs, rng.permutation(np.flatnonzero(existing))
    if row.method == "harvested":
        answer = oracle.ask([prompt] * max(1, row.queries // 4), temperature=2.0)
        errors = [value - log_probs[token] for token, value in _pairs(answer) if existing[token]]
    elif not math.isfinite(row.error_bound):
        errors = [math.nan]
    elif row.method == "searched":
        near = row.error_bound + 1e-3
        order = order[lack[order] > near]
        sizes = lack[order][:, None] + near * np.array([1.0, -1.0])
        answer = oracle.ask_biased(prompt, np.repeat(order, 2)[:, None], sizes.reshape(-1, 1))
        drawn = np.asarray(answer.tokens).reshape(-1, 2) == order[:, None]
        errors = np.where(drawn == [True, False], 0.0, np.nan)
    else:
        forced = row.method == "forced"
        lifts = lack + rng.uniform(0.5, 2.5, lack.shape)
        sizes = np.full(lack.shape, 0.7 * limit) if forced else lifts
        # A token that no bias lifts again is not known.
        existing &= lifts <= (sizes if forced else limit)
        order = order[existing[order]]
        errors = (_forced if forced else _lifted)(oracle, prompt, log_probs, order, sizes)
    protocol.compare("told again", f"{np.size(errors)} values by other queries", errors, 30.0)
    off = np.abs(np.asarray(errors, np.float64))
    # The largest of this many normal errors, of a difference of three values.
    noise = protocol.sigma * math.sqrt(6 * math.log(100 * existing.size))
    bound = row.error_bound + 2 * off[np.isfinite(off)].max(initial=0.0) + 2 * protocol.step + noise
    if existing.all() and row.method != "searched":
        mass = abs(float(np.logaddexp.reduce(log_probs)))
        protocol.compare("sum", "a whole row sums to 1", max(0.0, mass - row.error_bound), 30.0)
    if row.method not in ("searched", "harvested") and oracle.policy.floor is None:
        lowest = log_probs[existing].min(initial=np.inf)
        if (ties := int((log_probs[existing] <= lowest + 1e-4).sum())) > 3:
            protocol.add("floor", f"{ties} tokens at {lowest:.3g}", 0.0, float(ties), False)
    return dataclasses.replace(row, known=existing, error_bound=bound)


def _forced(
    oracle: Any, prompt: Any, log_probs: np.ndarray, order: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    answer = oracle.ask_biased(prompt, order[:, None], sizes[order, None])
    forced = np.asarray(answer.tokens)[:, 0] == order
    return np.where(forced, np.asarray(answer.values)[:, 0] - log_probs[order], np.nan)


def _lifted(
    oracle: Any, prompt: Any, log_probs: np.ndarray, order: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Errors of predicted values of tokens that are lifted, in groups, above all others."""
    group = max(1, min(oracle.policy.top_k or 1, oracle.policy.max_biased) - 1)
    short = -len(order) % group
    tokens = np.concatenate([order, order[:short]]).reshape(-1, group)
    lifts = np.concatenate([sizes[order], np.zeros(short)]).reshape(-1, group)
    answer = oracle.ask_biased(prompt, tokens, lifts)
    same = np.asarray(answer.tokens)[:, None, :] == tokens[:, :, None]
    values = np.where(same, np.asarray(answer.values, np.float64)[:, None, :], -np.inf).max(-1)
    at = log_probs[tokens]
    foretold = at + lifts - np.log1p((np.expm1(lifts) * np.exp(at)).sum(axis=1, keepdims=True))
    # A token that dominates the answer reveals little about itself: 1 - P of its error.
    little = np.maximum(-np.expm1(np.minimum(foretold, -1e-6)), 1e-3)
    return np.where(np.isfinite(values), (values - foretold) / little, np.nan)[lifts > 0]

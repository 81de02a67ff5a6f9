"""Sixty APIs before a head whose width is known: fifteen noises, each on four kinds of rows."""

import dataclasses
import itertools

import numpy as np
from jax import numpy as jnp

from tests.leakage._models import log_softmax

NOISES = (
    "white",
    "by token",
    "by row",
    "by token and row",
    "relative",
    "Laplace",
    "heavy tails",
    "some rows",
    "decimals",
    "decimals and white",
    "bfloat16",
    "bfloat16 and white",
    "float16",
    "float8",
    "bfloat16 logits",
)
ROWS = ("even", "uneven", "few", "repeated")
APIS = tuple(itertools.product(NOISES, ROWS))
_FORMATS = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float8": jnp.float8_e4m3fn}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Rows as an API reports them, float32, and what the estimator may be told."""

    rows: np.ndarray
    width: int
    named: float | None
    jitter: float
    about: str


def draw(api: tuple[str, str], rng: np.random.Generator, jitter: float | None = None) -> Case:
    """One case: a head, states, noise between 1e-7 and 1e-2 nats."""
    noise, kind = api
    sigma = float(10 ** rng.uniform(-7, -2)) if jitter is None else jitter
    width, vocab = int(rng.integers(4, 25)), int(rng.choice((120, 240, 480)))
    per_width = np.exp(rng.uniform(*np.log((0.5, 1.7) if kind == "few" else (1.2, 14.0))))
    count = int(np.ceil(per_width * width))
    states = rng.standard_normal((count, width))
    if kind == "uneven":
        states *= 10 ** (-rng.uniform(0, 3) * np.arange(width) / (width - 1))
        states[:, 0] = 10 * (states[:, 0] + 1)  # A direction that all prompts share.
    if kind == "repeated":
        distinct = max(2, int(width * rng.uniform(0.3, 2.5)))
        states = states[rng.permutation(np.arange(max(count, 2 * distinct)) % distinct) % count]
    logits = states @ rng.standard_normal((width, vocab))
    logits *= 2.5 / logits.std()
    rows = _disturbed(log_softmax(logits), logits, noise, sigma, rng)
    named = rng.choice((0, 1, 2))
    return Case(
        rows=rows.astype(np.float32),
        width=width,
        named=(None, sigma, sigma / 3)[named],
        jitter=sigma,
        about=f"{noise}, {kind}: h {width}, n {len(rows)}, V {vocab}, jitter {sigma:.2g}",
    )


def _disturbed(rows, logits, noise, sigma, rng):  # One branch a noise.
    white = rng.standard_normal(rows.shape)
    by_token, by_row = (
        np.exp(rng.standard_normal(rows.shape[1])),
        np.exp(rng.standard_normal((len(rows), 1))),
    )
    format_name, _, rest = noise.partition(" ")
    if noise == "bfloat16 logits":
        return log_softmax(np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64))
    if format_name in _FORMATS:
        noisy = rows + sigma * white if rest else rows
        return np.asarray(jnp.asarray(noisy, _FORMATS[format_name]), np.float32)
    if format_name == "decimals":
        noisy = rows + sigma * white if rest else rows
        return noisy.round(int(rng.integers(0, 6)))
    sizes = {
        "white": 1.0,
        "by token": by_token,
        "by row": by_row,
        "by token and row": by_token * by_row,
        "relative": np.abs(rows),
        "Laplace": rng.standard_exponential(rows.shape),
        "heavy tails": 1 / np.sqrt(rng.chisquare(3, rows.shape) / 3),
        "some rows": rng.random((len(rows), 1)) < 0.4,
    }
    return rows + sigma * sizes[noise] * white


def violates(case: Case, width) -> bool:
    """Whether an `OutputWidth` says what is not so of the model behind the rows."""
    upper = case.width if width.upper is None else width.upper
    return not width.lower <= case.width <= upper

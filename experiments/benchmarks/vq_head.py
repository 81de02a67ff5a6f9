"""Vector-quantised heads beside full and blocked ones: decoding and the training loss.

Weights are random: nothing timed here depends on their values.
"""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import suite
from experiments.shared.timing import paired_ratio, paired_seconds
from logitjax import losses, ops, vq

#: Hidden size, vocabulary, codes.
SIZES = ((576, 49_152, 2048), (1024, 152_064, 4096), (2304, 256_000, 4096))
SMOKE_SIZES = ((32, 2_000, 64),)
TOP = 8


def _case(hidden: int, vocab: int, codes: int, count: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        # Repeats of a small block: half a billion normal numbers take longer than the benchmark.
        block = rng.standard_normal((min(shape[0], 997), *shape[1:]), np.float32)
        return np.resize(block, shape) * hidden**-0.5

    ranks = np.arange(1, vocab + 1)
    zipf = (1.0 / ranks) / (1.0 / ranks).sum()
    return {
        "hidden": jnp.asarray(rng.standard_normal((count, hidden), np.float32)),
        "rows": jnp.asarray(normal(vocab, hidden)),
        "codebook": jnp.asarray(normal(codes, hidden)),
        "bias": jnp.asarray(np.log(zipf), jnp.float32),
        "assignment": jnp.asarray(rng.permutation(np.arange(vocab) % codes).astype(np.int32)),
        "labels": jnp.asarray(rng.choice(vocab, size=count, p=zipf).astype(np.int32)),
    }


def _decoders(case: dict[str, Any], codes: int) -> dict[str, Callable[[jax.Array], Any]]:
    rows, codebook, bias = case["rows"], case["codebook"], case["bias"]
    tables = vq.VQTables.of(bias, case["assignment"], codes, width=TOP)
    candidates = min(512, rows.shape[0] // 8)
    vocab, hidden = rows.shape
    part = 3 if hidden % 3 == 0 else 4
    random = np.random.default_rng(1)
    books = jnp.asarray(random.standard_normal((hidden // part, 16, part), np.float32))
    # Two codes in each byte.
    shape = -(-vocab // 32), -(-hidden // part // 2), 32
    packed = vq.ProductCodes(books, jnp.asarray(random.integers(0, 256, shape, np.uint8)), bias)

    def full(h: jax.Array, rows: jax.Array) -> Any:
        return ops.top_k(losses.Head(rows, vocab_axis=0).logits(h), TOP)

    def of_codes(h: jax.Array, weights: tuple[jax.Array, Any]) -> Any:
        codebook, tables = weights
        return tables.top_k(h, codebook, TOP)

    def product(h: jax.Array, weights: tuple[Any, ...]) -> Any:
        packed, rows = weights
        screen = vq.ScreenedHead(packed.logits, rows=rows, num_candidates=candidates)
        return screen.top_k(h, TOP, with_log_z=False)

    weights = {
        "full": (full, rows),
        "vq": (of_codes, (codebook, tables)),
        "packed product screen": (product, (packed, rows)),
    }
    return {
        name: functools.partial(lambda f, w, h: f(h, w), jax.jit(f), w)
        for name, (f, w) in weights.items()
    }


def _losses(case: dict[str, Any]) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    labels, assignment = case["labels"], case["assignment"]
    hidden, rows, codebook, bias = (case[k] for k in ("hidden", "rows", "codebook", "bias"))

    def full(h: jax.Array, rows: jax.Array) -> jax.Array:
        return losses.cross_entropy(losses.Head(rows, vocab_axis=0).logits(h), labels).mean()

    def blocked(h: jax.Array, rows: jax.Array) -> jax.Array:
        return losses.linear_cross_entropy(h, losses.Head(rows, vocab_axis=0), labels).mean()

    def vq_loss(h: jax.Array, codebook: jax.Array, bias: jax.Array) -> jax.Array:
        return vq.vq_nll(h, codebook, bias, assignment, labels).mean()

    return {
        "full": (jax.value_and_grad(full, (0, 1)), (hidden, rows)),
        "blocked": (jax.value_and_grad(blocked, (0, 1)), (hidden, rows)),
        "vq": (jax.value_and_grad(vq_loss, (0, 1, 2)), (hidden, codebook, bias)),
    }


def _vq_seconds(hidden: int, vocab: int, codes: int, count: int, repeats: int) -> dict[str, float]:
    """Median seconds of training loss and decoding, without ever making the full head's rows."""
    rng = np.random.default_rng(0)
    h = jnp.asarray(rng.standard_normal((count, hidden), np.float32))
    codebook = jnp.asarray(rng.standard_normal((codes, hidden), np.float32))
    bias = jnp.asarray(rng.standard_normal(vocab), jnp.float32)
    assignment = jnp.asarray(rng.permutation(np.arange(vocab) % codes).astype(np.int32))
    labels = jnp.asarray(rng.integers(0, vocab, count), jnp.int32)
    tables = vq.VQTables.of(bias, assignment, codes, width=TOP)

    def loss(h: jax.Array, codebook: jax.Array, bias: jax.Array) -> jax.Array:
        return vq.vq_nll(h, codebook, bias, assignment, labels).mean()

    train = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    decode = jax.jit(lambda h, c: tables.top_k(h, c, TOP))
    seconds = paired_seconds(
        {"train": lambda: train(h, codebook, bias), "decode": lambda: decode(h[:1], codebook)},
        repeats=repeats,
        warmup=2,
    )
    return {name: float(np.median(times)) for name, times in seconds.items()}


def _fit_costs(vocab: int, hidden: int, codes: int, iterations: int) -> tuple[float, int]:
    """Seconds of a fit, and the bytes that it adds to the most that this process has held."""
    # From a small block: making them must not take more than fitting, or its memory does not show.
    block = jax.random.normal(jax.random.key(0), (997, hidden), jnp.bfloat16)
    rows = jax.jit(lambda block: jnp.resize(block, (vocab, hidden)))(block)
    unigram = 1.0 / jnp.arange(1.0, vocab + 1)
    jax.block_until_ready(rows)
    before, start = suite.memory_bytes("VmHWM"), time.perf_counter()
    spread = jnp.zeros(hidden), jnp.eye(hidden)
    jax.block_until_ready(vq.fit_assignment(rows, unigram, *spread, codes, iterations=iterations))
    return time.perf_counter() - start, suite.memory_bytes("VmHWM") - before


def _fit(options: suite.Options) -> tuple[dict[str, Any], suite.Bar]:
    vocab, hidden, codes = (2_000, 32, 64) if options.smoke else (262_144, 2304, 4096)
    seconds, added = suite.in_fresh_process(_fit_costs, vocab, hidden, codes, 2)
    whole = vocab * codes * 4
    row = {"what": f"fit_assignment, {codes} codes, 2 iterations", "d": hidden, "V": vocab}
    row |= {"head": "vq", "ms": 1e3 * seconds, "added MiB": added / 2**20}
    row["V x K would be, MiB"] = whole / 2**20
    return row, suite.at_most("fitting: memory added / (V x K)", added / whole, 0.9)


def run(options: suite.Options) -> suite.Result:
    sizes = SMOKE_SIZES if options.smoke else SIZES
    counts = (1, 16) if options.smoke else (1, 16, 256)
    rows: list[dict[str, Any]] = []
    bars: list[suite.Bar] = []
    for hidden, vocab, codes in sizes:
        case = _case(hidden, vocab, codes, max(counts))
        for count in counts:
            h = case["hidden"][:count]
            decoders = _decoders(case, codes)
            times = paired_seconds(
                {name: lambda f=f, h=h: f(h) for name, f in decoders.items()},
                repeats=options.repeats if count > 16 else 4 * options.repeats,
                warmup=2,
            )
            for name, seconds in times.items():
                ratio = paired_ratio(times["full"], seconds)
                row = {"what": f"decode, N = {count}", "d": hidden, "V": vocab, "head": name}
                rows.append(row | {"ms": 1e3 * float(np.median(seconds)), "times faster": ratio})
                if name == "vq" and count == 1 and vocab == 152_064:
                    bars.append(suite.at_least("decode N=1 speed-up", ratio, 10))
                if name == "packed product screen" and count == 1 and vocab == 49_152:
                    bars.append(suite.at_least(f"{name}, N=1 speed-up", ratio, 6))
        # Widest and longest: fewer positions, or one call takes minutes.
        count = 64 if options.smoke else (512 if hidden > 2000 else 2048)
        case = _case(hidden, vocab, codes, count)
        compared = _losses(case)
        jitted = {name: (jax.jit(f), args) for name, (f, args) in compared.items()}
        times = paired_seconds(
            {name: lambda f=f, a=a: f(*a) for name, (f, a) in jitted.items()},
            repeats=max(1, options.repeats // 2),
        )
        memory = {name: suite.temp_bytes(f, *args) for name, (f, args) in compared.items()}
        for name, seconds in times.items():
            ratio = paired_ratio(times["full"], seconds)
            row = {"what": f"train, N = {count}", "d": hidden, "V": vocab, "head": name}
            row |= {"ms": 1e3 * float(np.median(seconds)), "times faster": ratio}
            rows.append(row | {"temp MiB": memory[name] / 2**20})
            if name == "vq" and vocab == 152_064:
                share = memory[name] / memory["full"]
                bars.append(suite.at_least("training speed-up", ratio, 15))
                bars.append(suite.at_most("training temp memory", share, 1 / 15))
        del case, compared, jitted
    growth = _growth(options)
    rows += growth["rows"]
    fit, fit_bar = _fit(options)
    rows.append(fit)
    if not options.smoke:
        bars += [*growth["bars"], fit_bar]
    return suite.Result(rows=rows, bars=bars)


def _growth(options: suite.Options) -> dict[str, Any]:
    """Powers by which times grow with V at fixed K and with K at fixed V."""
    hidden, count = (32, 64) if options.smoke else (1024, 512)
    vocab, codes = (2_000, 64) if options.smoke else (152_064, 4096)
    by_vocab = [vocab // 8, vocab // 4, vocab // 2, vocab]
    by_codes = [codes // 4, codes // 2, codes, 2 * codes]
    repeats = max(3, options.repeats)
    seen_vocab = [_vq_seconds(hidden, v, codes, count, repeats) for v in by_vocab]
    seen_codes = [_vq_seconds(hidden, vocab, k, count, repeats) for k in by_codes]
    rows, bars = [], []
    for what in ("train", "decode"):
        for name, sizes, seen in (("V", by_vocab, seen_vocab), ("K", by_codes, seen_codes)):
            seconds = [times[what] for times in seen]
            power = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
            row = {"what": f"{what}: time ~ {name}^a", "d": hidden, "head": "vq", "power": power}
            rows.append(row)
            bound = suite.at_most if name == "V" else suite.at_least
            limit = 0.25 if name == "V" else 0.6
            bars.append(bound(f"{what}: power of {name}", power, limit))
    if any(not math.isfinite(row["power"]) for row in rows):
        raise ValueError("growth: a timing came out as zero")
    return {"rows": rows, "bars": bars}

"""Fuzzed calls of the native kernels for CPUs: equal to XLA's, and within their arrays?

Shapes and values are drawn from a seed: empty shapes, ties, both zeros, nans, infinities and ids
out of range among them. Integers and places have to be equal bit for bit; so have products of small
whole numbers, which no order of summing rounds. Other products have to be within the rounding of a
float32 sum. The same calls run twice: as built, and in a process of their own with a build under
the address sanitizer, which ends at the first access outside of an array. `--only=plain` and
`--only=sanitized` run one of the two.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import suite
from logitjax.kernels import native as kernels

_CALLS = {"smoke": 300, "full": 10_000}
# A shape is compiled for two programs; values cost nothing beside that.
_CALLS_A_SHAPE = 10
_SPECIAL = np.array([0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, 1e-40, -1e-40], np.float32)
_EPSILON = float(np.finfo(np.float32).eps)


@dataclasses.dataclass
class Count:
    """Calls of a kernel, and how many did not give what XLA gives."""

    calls: int = 0
    differing: int = 0
    first: str = ""


def fuzz(*, calls: int, seed: int) -> dict[str, Count]:
    """Calls every kernel in turn, with shapes and values of the seed."""
    rng = np.random.default_rng(seed)
    counts: dict[str, Count] = {}
    cases: tuple[Callable[..., Any], ...] = (_lookup_sums, _row_products, _largest_ids)
    for number in range(-(-calls // _CALLS_A_SHAPE)):
        case = cases[number % len(cases)]
        draw, check = case(rng)
        count = counts.setdefault(case.__name__.removeprefix("_"), Count())
        for _ in range(_CALLS_A_SHAPE):
            arguments = draw()
            count.calls += 1
            if not check(*arguments):
                count.differing += 1
                shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in arguments)
                count.first = count.first or f"{shapes}, shape {number} of seed {seed}"
    return counts


def _lookup_sums(rng: np.random.Generator) -> Any:
    positions, blocks = int(rng.integers(0, 5)), int(rng.integers(0, 9))
    # Sums of more than 128 pairs need more than 16 bits.
    pairs = int(rng.choice([0, 1, 2, 7, 127, 128, 129, 300]))

    def draw() -> Any:
        # Largest entries only, now and then: sums that overflow where something is too narrow.
        tables = rng.integers(0 if rng.random() < 0.8 else 255, 256, (positions, 2 * pairs, 16))
        codes = rng.integers(0, 256, (blocks, pairs, 32))
        return tables.astype(np.uint8), codes.astype(np.uint8)

    @jax.jit
    def by_xla(tables: jax.Array, blocks: jax.Array) -> jax.Array:
        codes = jnp.stack([blocks & 15, blocks >> 4]).reshape(2, len(blocks), pairs, 2, 16)
        codes = codes.transpose(2, 3, 1, 0, 4).reshape(1, 2 * pairs, 32 * len(blocks))
        codes = codes.astype(jnp.int32)
        return jnp.take_along_axis(tables, codes, axis=-1).sum(1, dtype=jnp.int32)

    native = jax.jit(kernels.lookup_sums)
    return draw, lambda *arguments: _same(native(*arguments), by_xla(*arguments))


def _row_products(rng: np.random.Generator) -> Any:
    positions, chosen = int(rng.integers(0, 5)), int(rng.choice([0, 1, 3, 40, 700]))
    width, vocab = int(rng.choice([0, 1, 31, 32, 33, 75, 256])), int(rng.choice([1, 2, 50, 1000]))
    if not positions * chosen:
        vocab = int(rng.integers(0, 2))
    dtype = jnp.float32 if rng.random() < 0.5 else jnp.bfloat16

    def draw() -> Any:
        whole = rng.random() < 0.5
        sides = [
            rng.integers(-8, 9, (n, width)) if whole else rng.normal(size=(n, width))
            for n in (positions, vocab)
        ]
        ids = rng.integers(-3, vocab + 3, (positions, chosen))
        if rng.random() < 0.2:
            ids = rng.choice([-(2**31), 2**31 - 1, 0], (positions, chosen))
        return sides[0].astype(np.float32), sides[1].astype(dtype), ids.astype(np.int32)

    @jax.jit
    def by_xla(vectors: jax.Array, rows: jax.Array, ids: jax.Array) -> Any:
        taken = rows[jnp.clip(ids, 0, max(vocab - 1, 0))].astype(jnp.float32)
        sums = jnp.einsum("nd,nmd->nm", vectors, taken)
        return sums, jnp.einsum("nd,nmd->nm", jnp.abs(vectors), jnp.abs(taken))

    native = jax.jit(kernels.row_products)

    def check(vectors: jax.Array, rows: jax.Array, ids: jax.Array) -> bool:
        products = np.asarray(native(vectors, rows, ids))
        expected, size = by_xla(vectors, rows, ids) if ids.size else (products, products)
        expected, size = np.asarray(expected), np.asarray(size)
        if (vectors == np.round(vectors)).all():
            return _same(products, expected)
        return bool((np.abs(products - expected) <= 2 * width * _EPSILON * size).all())

    return draw, check


def _largest_ids(rng: np.random.Generator) -> Any:
    rows, count = int(rng.integers(0, 4)), int(rng.choice([1, 7, 64, 100, 1023, 3000, 20_000]))
    k = int(rng.integers(1, min(count, rng.choice([4, 64, 3000])) + 1))

    def draw() -> Any:
        # Rounded: ties, by the dozen.
        values = np.round(rng.normal(size=(rows, count)), rng.choice([0, 1, 5]))
        values = values.astype(np.float32)
        special = rng.random((rows, count)) < rng.choice([0.0, 0.01, 0.5])
        return (np.where(special, rng.choice(_SPECIAL, (rows, count)), values).astype(np.float32),)

    native = jax.jit(lambda values: kernels.largest_ids(values, k))
    by_xla = jax.jit(lambda values: jax.lax.top_k(values, k)[1])
    return draw, lambda values: _same(native(values), by_xla(values))


def _same(computed: Any, expected: Any) -> bool:
    return np.array_equal(np.asarray(computed), np.asarray(expected))


def _sanitized(calls: int, seed: int) -> dict[str, Count]:
    """The same in a process whose library is built with `-fsanitize=address`."""
    compiler = os.environ.get("CXX", "g++").split()
    # C++'s own library with it: the sanitizer looks for what throws exceptions when it starts.
    runtimes = [
        subprocess.run(
            [*compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    environment = os.environ | {
        "CXX": " ".join(compiler),
        "CXXFLAGS": "-fsanitize=address -g -fno-omit-frame-pointer",
        # Python itself leaves memory behind at its end.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    # The compiler must not run under the sanitizer, the program that loads what it made must.
    subprocess.run([sys.executable, "-m", "logitjax.kernels"], env=environment, check=True)
    program = [sys.executable, "-m", "tests.rigs.kernels", str(calls), str(seed)]
    environment["LD_PRELOAD"] = " ".join(runtimes)
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"kernels under the address sanitizer:\n{done.stderr[-8000:]}")
    counts = json.loads(done.stdout.splitlines()[-1])
    return {name: Count(**count) for name, count in counts.items()}


def run(options: suite.Options) -> suite.Result:
    """Fuzzes the kernels as built, then under the sanitizer."""
    kernels.build()
    calls, builds = _CALLS[options.scale], {"plain": fuzz, "sanitized": _sanitized}
    chosen = options.parts(list(builds))
    rows, differing = [], []
    for build in chosen:
        start = time.perf_counter()
        counts = builds[build](calls=calls, seed=0)
        seconds = time.perf_counter() - start
        for name, count in counts.items():
            rows.append(
                {
                    "kernel": name,
                    "build": build,
                    "calls": count.calls,
                    "differ from XLA": count.differing,
                    "seconds, all kernels": round(seconds, 1),
                }
            )
            if count.differing:
                differing.append(f"{name}, {build}: {count.first}")
    if differing:
        raise RuntimeError("kernels that differ from XLA: " + "; ".join(differing))
    different = suite.total(rows, "differ from XLA")
    return suite.Result(rows=rows, bars=[suite.at_most("calls that differ", different, 0)])


if __name__ == "__main__":
    differences = fuzz(calls=int(sys.argv[1]), seed=int(sys.argv[2]))
    print(json.dumps({name: dataclasses.asdict(count) for name, count in differences.items()}))

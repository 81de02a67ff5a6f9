"""Checks of a loss: equal numbers under every transformation, no effect of masked positions."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partialmethod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from logitjax.testing._properties import (
    Arrays,
    attempt,
    batch_mesh,
    equal,
    fail,
    is_float,
    on_mesh,
    rounded,
    selected,
)

# Padded columns of logits.
_PADDING = 3
# Step of finite differences: short, so that it crosses few kinks.
_STEP = 2.0**-10


def check_loss(
    fn: Callable[..., Any],
    arrays: Arrays,
    *,
    logits: Sequence[str] = ("student", "teacher"),
    labels: Mapping[str, int] | None = None,
    where: str | None = None,
    shared: Sequence[str] = (),
    constant: Sequence[str] = (),
    skip: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Check the properties of a loss on logits, or on hidden states and a head.

    The properties, by the names that `skip` takes:

    - `shape`: The result is one float32 array `[*batch]`: unreduced, without the vocabulary's axis.
    - `jit`: Compiled, it gives the same as operation by operation.
    - `bfloat16`: For bfloat16 inputs it gives the float32 result of the same numbers.
    - `padding`: Columns of logits at -inf change no value and no gradient.
    - `vmap`: Mapped over a new axis, it gives the same as one by one.
    - `nan`: A nan in an input shows in the value.
    - `infinity`: So does an infinity in an input.
    - `labels`: Under `jit`, a label outside the vocabulary gives nan.
    - `where`: Masked positions change no value and no gradient, even if nan or infinite.
    - `rows`: Positions are independent, and a nan under a cotangent of zero does not reach the
      gradient of a shared array.
    - `cotangent`: The gradient is linear in the cotangent.
    - `differences`: The gradient is that of finite differences.
    - `mesh`, `explicit`, `shard_map`: With the batch split over devices (Auto axes, Explicit axes,
      inside `shard_map`) it gives the same as on one.

    The function is compiled four times. Small arrays are enough: four rows, seven tokens.

    Args:
        fn: Takes the arrays by name and returns the unreduced loss.
        arrays: Valid arguments. Floats are rounded to bfloat16.
        logits: Arrays whose last axis is a vocabulary, in which -inf marks invalid entries.
        labels: Arrays of integers, and the number of values that each may take.
        where: Name of the mask of positions, boolean or weights, if the function takes one.
        shared: Arrays without a batch axis, such as a head. All others begin with it.
        constant: Arrays that get no gradient, such as a teacher's.
        skip: Properties that the loss is not required to have.
        seed: Seed of cotangents and directions.

    Raises:
        AssertionError: The first property that does not hold, in one line with the argument and the
            numbers.
        ValueError: `skip` or an argument's name is unknown.

    >>> def squared_distance(student, teacher):
    ...     exists = teacher > -jnp.inf
    ...     gap = jnp.where(exists, student, 0.0) - jnp.where(exists, teacher, 0.0)
    ...     return jnp.square(gap.astype(jnp.float32)).mean(-1)
    >>> rows = np.random.default_rng(0).normal(size=(2, 4, 7)).astype(np.float32)
    >>> check_loss(squared_distance, {"student": rows[0], "teacher": rows[1]})
    Traceback (most recent call last):
    AssertionError: padding: value: expected 0.662875, got 0.464012 at (0,)
    """
    names = (*logits, *(labels or ()), *shared, *constant, where)
    unknown = [name for name in names if name is not None and name not in arrays]
    if unknown:
        raise ValueError(f"arrays: expected {unknown[0]} among them, got {', '.join(arrays)}")
    # The first failure explains later ones.
    every = [name.removeprefix("check_") for name in vars(_Loss) if name.startswith("check_")]
    loss = _Loss(
        properties=selected(every, skip),
        fn=fn,
        arrays={name: rounded(x) for name, x in arrays.items()},
        logits=tuple(logits),
        labels=dict(labels or {}),
        where=where,
        shared=tuple(shared),
        constant=tuple(constant),
        rng=np.random.default_rng(seed),
    )
    for name in loss.properties:
        getattr(loss, f"check_{name}")()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Loss:
    fn: Callable[..., Any]
    arrays: Arrays
    logits: tuple[str, ...]
    labels: Mapping[str, int]
    where: str | None
    shared: tuple[str, ...]
    constant: tuple[str, ...]
    properties: tuple[str, ...]
    rng: np.random.Generator

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result, which is traced here for the first time."""
        result = attempt("jit", lambda: jax.eval_shape(lambda x: self.fn(**x), dict(self.arrays)))
        if not hasattr(result, "shape"):
            fail("shape", "result", f"expected one array, got {type(result).__name__}")
        if result.dtype != jnp.float32:
            fail("shape", "result", f"expected float32, got {result.dtype}")
        return result.shape

    @cached_property
    def cotangent(self) -> np.ndarray:
        return self.rng.normal(size=self.shape).astype(np.float32)

    @cached_property
    def floats(self) -> list[str]:
        return [name for name, x in self.arrays.items() if is_float(x)]

    def value_and_gradients(self, fn: Callable[..., Any], arrays: Any, cotangent: Any) -> Any:
        rest = {name: x for name, x in arrays.items() if name not in self.floats}
        value, pull = jax.vjp(
            lambda floats: fn(**floats, **rest), {name: arrays[name] for name in self.floats}
        )
        return value, pull(cotangent.astype(value.dtype))[0]

    # A single program for everything that runs on one device.
    @cached_property
    def program(self) -> Callable[..., Any]:
        views = {"jit": lambda *x: x, "bfloat16": self.halved, "padding": self.padded}

        def run(arrays: Any, cotangent: Any) -> Any:
            results = {
                name: attempt(name, self.value_and_gradients, self.fn, *view(arrays, cotangent))
                for name, view in views.items()
                if name == "jit" or name in self.properties
            }
            if "vmap" in self.properties:
                axes = {name: None if name in self.shared else 0 for name in arrays}
                several = {
                    name: x if name in self.shared else jnp.stack([x, x[::-1]])  # two unlike
                    for name, x in arrays.items()
                }
                mapped = jax.vmap(lambda *x: self.value_and_gradients(self.fn, *x), (axes, 0))
                cotangents = jnp.stack([cotangent, _reversed(cotangent)])
                results["vmap"] = attempt("vmap", mapped, several, cotangents)
            return results

        return jax.jit(run)

    def run(self, changes: Arrays, cotangent: Any = None, view: str = "jit") -> Any:
        """Compute value and gradients with some arrays changed."""
        cotangent = self.cotangent if cotangent is None else cotangent
        return jax.device_get(self.program({**self.arrays, **changes}, cotangent)[view])

    @cached_property
    def expected(self) -> Any:
        return self.run({})

    def halved(self, arrays: Any, cotangent: Any) -> Any:
        cast = {n: x.astype(jnp.bfloat16) if n in self.floats else x for n, x in arrays.items()}
        return cast, cotangent

    def padded(self, arrays: Any, cotangent: Any) -> Any:
        """Evaluate with padded columns of logits."""

        def pad(x: Any) -> Any:
            widths = ((0, 0),) * (x.ndim - 1) + ((0, _PADDING),)
            return jnp.pad(x, widths, constant_values=-jnp.inf)

        return {n: pad(x) if n in self.logits else x for n, x in arrays.items()}, cotangent

    def compare(self, name: str, result: Any, expected: Any, **tolerance: float) -> None:
        equal(name, "value", result[0], expected[0], **tolerance)
        for array, gradient in expected[1].items():
            # A sum is rounded like its largest terms.
            scale = float(np.abs(gradient).max(initial=0.0, where=np.isfinite(gradient)))
            entries = {"atol": 1e-5 + 1e-5 * scale, **tolerance}
            equal(name, f"gradient of {array}", result[1][array], gradient, **entries)

    def check_shape(self) -> None:
        for name in self.logits:
            axes = self.arrays[name].shape[:-1]
            if not self.shape or self.shape != axes[: len(self.shape)]:
                expected = f"expected one number a row of {axes}, got shape {self.shape}"
                fail("shape", f"result beside {name}", expected)

    def check_jit(self) -> None:
        value = attempt("jit", lambda: self.fn(**self.arrays))
        equal("jit", "value", self.expected[0], value)

    def check_bfloat16(self) -> None:
        value, gradients = self.run({}, view="bfloat16")
        if value.dtype != np.float32:
            fail("bfloat16", "result", f"expected float32, got {value.dtype}")
        equal("bfloat16", "value", value, self.expected[0], rtol=1e-3, atol=1e-3)
        for name, gradient in gradients.items():
            expected = self.expected[1][name]
            # bfloat16 has eight bits: an entry is as accurate as the largest term of its sum.
            scale = float(np.abs(expected).max(initial=0.0))
            equal(
                "bfloat16", f"gradient of {name}", gradient, expected, rtol=0.02, atol=0.02 * scale
            )

    def check_padding(self) -> None:
        value, gradients = self.run({}, view="padding")
        entries = {n: g[..., :-_PADDING] if n in self.logits else g for n, g in gradients.items()}
        self.compare("padding", (value, entries), self.expected)
        # The label at -inf correctly gives an infinite loss; another entry does not.
        labels = {int(self.arrays[name].flat[0]) for name in self.labels}
        other = next(token for token in range(len(labels) + 1) if token not in labels)
        for name in self.logits:
            beyond = gradients[name][..., -_PADDING:]
            equal("padding", f"gradient of {name} at -inf", beyond, np.zeros_like(beyond), atol=0.0)
            if np.isnan(self.changed(name, -np.inf, other)).any():
                fail("padding", name, "expected no nan for an entry at -inf, got nan")

    def check_vmap(self) -> None:
        values, gradients = self.run({}, view="vmap")
        reverse = {n: x[::-1] for n, x in self.arrays.items() if n not in self.shared}
        singles = self.expected, self.run(reverse, _reversed(self.cotangent))
        for i, single in enumerate(singles):
            mapped = values[i], {name: gradient[i] for name, gradient in gradients.items()}
            self.compare("vmap", mapped, single)

    def changed(self, name: str, number: float, entry: int = 0) -> Any:
        """Compute the value with another number in the first row."""
        changed = self.arrays[name].copy()
        changed.flat[entry] = number
        return self.run({name: changed})[0]

    def check_nan(self) -> None:
        for name in self.floats:
            if not np.isnan(self.changed(name, np.nan)).any():
                fail("nan", name, "expected nan in the value for a nan, got none")

    def check_infinity(self) -> None:
        for name in self.floats:
            # -inf is valid: it marks a missing entry.
            for number in (np.inf,) if name in self.logits else (np.inf, -np.inf):
                value = self.changed(name, number)
                if np.isfinite(value).all():
                    fail("infinity", name, f"expected no finite value for {number}, got {value}")

    def check_labels(self) -> None:
        for name, count in self.labels.items():
            # Just beyond both ends, and numbers that would wrap in int32 arithmetic.
            for number in (count, 2**31 - 1, -1, -(2**31)):
                value = self.changed(name, number).flat[0]
                if not np.isnan(value):
                    fail("labels", name, f"expected nan for {number} of {count}, got {value:.6g}")

    def spoilt(self, where: np.ndarray, number: float) -> dict[str, np.ndarray]:
        """Replace these positions of all arrays by a number, or by an invalid label."""
        changes = {}
        for name, x in self.arrays.items():
            fits = x.shape[: where.ndim] == where.shape
            spoils = name in self.floats or name in self.labels
            if fits and spoils and name not in (self.where, *self.shared):
                changes[name] = x.copy()
                # torch ignores -100.
                wrong = -100 if number < 0 else 10**6
                changes[name][where] = number if name in self.floats else wrong
        return changes

    def check_where(self) -> None:
        # Without such an argument the caller masks the loss.
        if self.where is None:
            return
        mask = self.arrays[self.where]
        silent = mask == 0
        if silent.all() or not silent.any():
            raise ValueError(f"{self.where}: expected positions that count and some that do not")
        value, gradients = self.expected
        # The gradient of the weights themselves is not compared.
        kept = value, {name: g for name, g in gradients.items() if name != self.where}
        for number in (np.nan, np.inf, -np.inf):
            self.compare("where", self.run(self.spoilt(silent, number)), kept)
        value, gradients = self.run({self.where: np.zeros_like(mask)})
        for subject, x in {"value": value, **gradients}.items():
            if not np.isfinite(x).all():
                fail("where", f"{subject} with nothing left", "expected finite numbers, got others")

    def check_rows(self) -> None:
        one = np.zeros(self.shape, bool)
        # With positions before and after it.
        one[tuple(n // 2 for n in self.shape)] = True
        cotangent = np.where(one, np.float32(0), self.cotangent)
        completed = self.run({}, cotangent)
        spoilt = self.spoilt(one, np.nan)
        other = {name: self.arrays[name].copy() for name in spoilt}
        for x in other.values():
            x[one] = x[..., ::-1][one]
        for changes in (other, spoilt):
            value, gradients = self.run(changes, cotangent)
            equal("rows", "value of another", value[~one], completed[0][~one])
            for name, gradient in gradients.items():
                others = ~one if name in changes else slice(None)
                expected = completed[1][name][others]
                equal("rows", f"gradient of {name}", gradient[others], expected)

    def check_cotangent(self) -> None:
        other = self.rng.normal(size=self.shape).astype(np.float32)
        _, second = self.run({}, other)
        # A pullback is linear.
        _, both = self.run({}, self.cotangent - 2 * other)
        entries = {name: g - 2 * second[name] for name, g in self.expected[1].items()}
        self.compare("cotangent", (0.0, both), (0.0, entries), rtol=1e-3)

    def check_differences(self) -> None:
        for name in self.floats:
            gradient = np.asarray(self.expected[1][name], np.float64)
            of = f"gradient of {name}"
            if name in self.constant:
                equal("differences", of, gradient, np.zeros_like(gradient), atol=0.0)
                continue
            # Error of the value's rounding, and of curvature over the step.
            size = float(np.abs(self.expected[0] * self.cotangent).sum())
            norm = float(np.sqrt(np.square(gradient).sum()))
            bound = 1e-3 + 0.01 * norm + 4 * size * 2.0**-23 / _STEP
            wrong = self.wrong_slopes(name, gradient, bound, self.in_float32(name))
            if len(wrong) > 1:
                # Steps in float64 are too short to cross kinks of sorted and of rare numbers.
                with jax.enable_x64(True):
                    wrong = self.wrong_slopes(name, gradient, bound, self.in_float64(name), 1e-6)
            # One direction may cross a kink, which has no derivative.
            if len(wrong) > 1:
                got, expected = wrong[0]
                fail("differences", of, f"expected a slope of {expected:.6g}, got {got:.6g}")

    def wrong_slopes(
        self, name: str, gradient: Any, bound: float, value: Callable[..., Any], step: float = _STEP
    ) -> list[tuple[float, float]]:
        """Slopes along random directions by gradient and by values, where they differ."""
        x, pairs = self.arrays[name], []
        # A kink spoils at most one of them.
        for _ in range(3):
            along = self.rng.normal(size=x.shape)
            up, down = (np.asarray(value(x + s * along), np.float64) for s in (step, -step))
            difference = float(((up - down) * self.cotangent).sum()) / (2 * step)
            pairs.append((float((gradient * along).sum()), difference))
        return [pair for pair in pairs if not abs(pair[0] - pair[1]) <= bound]  # nan too

    def in_float32(self, name: str) -> Callable[[Any], Any]:
        return lambda x: self.run({name: x.astype(np.float32)})[0]

    def in_float64(self, name: str) -> Callable[[Any], Any]:
        wide = {n: x.astype(np.float64) if n in self.floats else x for n, x in self.arrays.items()}
        return jax.jit(lambda x: self.fn(**{**wide, name: x}))

    def on_devices(self, name: str, kind: AxisType, inside: bool = False) -> None:
        batch = next(x.shape[0] for n, x in self.arrays.items() if n not in self.shared)
        mesh = batch_mesh(batch, kind)
        arrays = {**self.arrays, "": self.cotangent}
        split = on_mesh(mesh, arrays, self.shared)
        specs = {n: P() if n in self.shared else P("data") for n in self.arrays}
        mapped = jax.shard_map(
            lambda x: self.fn(**x), mesh=mesh, in_specs=(specs,), out_specs=P("data")
        )
        fn = (lambda **x: mapped(x)) if inside else self.fn
        run = jax.jit(lambda x, cotangent: self.value_and_gradients(fn, x, cotangent))
        cotangent = split.pop("")
        with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
            result = jax.device_get(attempt(name, run, split, cotangent))
        self.compare(name, result, self.expected)

    check_mesh = partialmethod(on_devices, "mesh", AxisType.Auto)
    check_explicit = partialmethod(on_devices, "explicit", AxisType.Explicit)
    check_shard_map = partialmethod(on_devices, "shard_map", AxisType.Auto, inside=True)


def _reversed(x: Any) -> Any:
    """Reverse the rows; a scalar remains."""
    return x[::-1] if x.ndim else x

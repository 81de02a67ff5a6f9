"""Checks of an unlearning method: a loss that trains weights or adapters of any decoder."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax import models
from logitjax.testing._family import random_decoder
from logitjax.testing._properties import attempt, batch_mesh, equal, fail, frozen_value, selected
from logitjax.unlearning import Method

# fmt: off
_PROPERTIES = (
    "value", "needs", "loss", "differences", "masks", "counts", "adapters", "before", "state",
    "mesh",
)
# fmt: on
_ROWS, _LENGTH, _VOCAB = 4, 8, 16
# Step of finite differences, for entries of about 0.1.
_STEP = 2.0**-9


def check_method(method: Method, *, skip: Collection[str] = (), seed: int = 0) -> None:
    """Check the properties of an unlearning method, on a random decoder of two layers.

    The properties, by the names that `skip` takes:

    - `value`: The method is a frozen dataclass, hashable, equal to its copy, and flags can parse
      its repr.
    - `needs`: If a declared side or the model before is missing, the error names the method.
      Reading anything else is an error, too.
    - `loss`: One finite float32 number, with finite means and a finite gradient that is not 0.
    - `differences`: The gradient is that of finite differences. Skip it if the gradient treats a
      weight or a target as a constant.
    - `masks`: Tokens after an answer change nothing, nor do rows without an answer.
    - `counts`: The loss is the same if the head is evaluated only at positions that count.
    - `adapters`: Adapters that do not change the model give the loss of the weights themselves.
    - `before`: The model before unlearning gets no gradient.
    - `state`: The method's own arrays get a gradient like the weights.
    - `mesh`: A batch split over devices gives the same loss and gradient.

    One program is compiled, and another for `mesh` if there are several devices. For an assistant
    its adapters are checked, but not `adapters` and `before`.

    Args:
        method: The method, to be `prepared` with a likelihood loss of 1.
        skip: Properties that the method is not required to have.
        seed: Seed of weights, tokens and the method's random numbers.

    Raises:
        AssertionError: The first property that does not hold, in one line.
        ValueError: `skip` is unknown.

    >>> from logitjax.unlearning import METHODS
    >>> check_method(METHODS.parse("npo"), skip=("counts", "adapters", "mesh"))
    """
    properties = selected(_PROPERTIES, skip)
    if "value" in properties:
        frozen_value("value", method, Method)
    setting = _Setting.of(attempt("loss", method.prepared, lambda: 1.0), properties, seed)
    for name in properties:
        if name != "value":
            getattr(setting, f"check_{name}")()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Setting:
    """A method, what it trains, the model before, and a batch with the declared sides."""

    method: Method
    properties: tuple[str, ...]
    model: models.Decoder
    trained: Any
    before: Any
    batch: Mapping[str, Mapping[str, np.ndarray]]
    rng: np.random.Generator
    key: Any

    @classmethod
    def of(cls, method: Method, properties: tuple[str, ...], seed: int) -> "_Setting":
        rng, key = np.random.default_rng(seed), jax.random.key(seed)
        sizes: Any = dict(vocab_size=_VOCAB, hidden_size=8, intermediate_size=8, num_layers=2)
        config = models.DecoderConfig(**sizes, num_heads=2, num_kv_heads=1, head_dim=4)
        # The model to train, and the model before.
        pair = [models.with_layout(random_decoder(config, rng), "listed") for _ in range(2)]
        weights, before = (nnx.to_pure_dict(nnx.state(model, nnx.Param)) for model in pair)
        if method.assistant:
            adapted = attempt("loss", method.adapted, pair[0])
            before = nnx.to_pure_dict(nnx.state(adapted, nnx.Param))
            like = jax.eval_shape(lambda: _adapters(adapted, key))
            weights = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), like)
        places = np.arange(_LENGTH)
        # The last row is padding; others end early or have a prompt.
        mask = (places >= np.array([[2], [3], [1], [8]])) & (
            places < np.array([[6], [8], [5], [8]])
        )
        batch = {
            side: {"tokens": rng.integers(_VOCAB, size=mask.shape, dtype=np.int32), "mask": mask}
            for side in method.sides
        }
        return cls(
            method=method,
            properties=properties,
            model=pair[0],
            trained=attempt("loss", method.start, weights),
            before=before,
            batch=batch,
            rng=rng,
            key=key,
        )

    def loss(self, name: str, trained: Any, batch: Any, before: Any, **options: Any) -> Any:
        """Compute the loss and its means, or fail under this name."""

        def call() -> Any:
            loss_fn, _ = self.method.make_loss(self.model, key=self.key, **options)
            value, _, means = loss_fn(trained, batch, None, before)
            return value, {name: value for name, (value, _) in means.items()}

        return attempt(name, call)

    @functools.cached_property
    def run(self) -> Any:
        """Compiled: loss, means, and gradients of trained arrays and of the model before."""
        counts = [{side: int(rows["mask"].sum()) for side, rows in self.batch.items()}]

        @jax.jit
        def run(trained: Any, before: Any, batch: Any) -> Any:
            def loss(trained: Any, before: Any) -> Any:
                return self.loss("loss", trained, batch, before)

            results = {
                "loss": attempt("loss", jax.value_and_grad(loss, (0, 1), True), trained, before)
            }
            if "counts" in self.properties:
                results["counts"] = self.loss("counts", trained, batch, before, counts=counts)[0]
            if "adapters" in self.properties and not self.method.assistant:
                start = self.method.start(_adapters(self.model, self.key))
                weights = self.method.weights(trained)
                beside = self.loss("adapters", start, batch, weights, adapters=True)
                results["adapters"] = beside[0]
            return results

        return run

    def results(self, *, trained: Any = None, before: Any = None, batch: Any = None) -> Any:
        trained = self.trained if trained is None else trained
        before = self.before if before is None else before
        return jax.device_get(self.run(trained, before, batch or self.batch))

    @functools.cached_property
    def whole(self) -> Any:
        return self.results()

    def check_needs(self) -> None:
        method = self.method

        def without(lost: str, before: Any, batch: Any) -> None:
            loss_fn, _ = method.make_loss(self.model, key=self.key)
            args = self.trained, batch, before
            try:
                jax.eval_shape(lambda *args: loss_fn(args[0], args[1], None, args[2])[0], *args)
            except Exception as error:
                if isinstance(error, ValueError) and method.name in str(error):
                    return
                expected = f"expected a ValueError that names {method.name}"
                fail("needs", lost, f"{expected}, got {error!r}")
            fail("needs", lost, "expected an error where there is none, got a loss")

        for side in self.batch:
            without(side, self.before, {n: rows for n, rows in self.batch.items() if n != side})
        if any(need.before for need in method.needs):
            without("before", None, self.batch)

    def check_loss(self) -> None:
        (value, means), (gradient, _) = self.whole["loss"]
        if value.shape != () or value.dtype != np.float32:
            fail("loss", "value", f"expected one float32, got {value.dtype} {value.shape}")
        for subject, tree in {"value": value, "means": means, "gradient": gradient}.items():
            if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)):
                fail("loss", subject, "expected finite numbers, got others")
        if not any(map(np.any, jax.tree.leaves(self.method.weights(gradient)))):
            fail("loss", "gradient", "expected one for the trained arrays, got 0")

    def check_differences(self) -> None:
        weights = self.method.weights(self.trained)
        way = jax.tree.map(lambda x: self.rng.normal(size=x.shape).astype(np.float32), weights)
        ends = []
        # Central differences, whose error falls with the square of the step.
        for step in (_STEP, -_STEP):
            moved = jax.tree.map(lambda x, way, step=step: x + np.float32(step) * way, weights, way)
            ends.append(float(self.results(trained=self.method.start(moved))["loss"][0][0]))
        gradient = jax.tree.leaves(self.method.weights(self.whole["loss"][1][0]))
        slope = sum(float(np.vdot(x, y)) for x, y in zip(gradient, jax.tree.leaves(way)))
        size = sum(float(np.vdot(x, x)) for x in gradient) ** 0.5
        expected = (ends[0] - ends[1]) / (2 * _STEP)
        equal("differences", "slope", slope, expected, rtol=0.02, atol=0.02 * size + 1e-4)

    def check_masks(self) -> None:
        for side, rows in self.batch.items():
            mask, tokens = rows["mask"], rows["tokens"]
            # No token from here to the end belongs to an answer.
            after = np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 0
            other = (tokens + self.rng.integers(1, _VOCAB, mask.shape, np.int32)) % _VOCAB
            rows = {"tokens": np.where(after, other, tokens), "mask": mask}
            results = self.results(batch={**self.batch, side: rows})
            self.same("masks", f"loss with other tokens of {side}", results["loss"][0][0])

    def check_counts(self) -> None:
        self.same("counts", "loss", self.whole["counts"])

    def check_adapters(self) -> None:
        if not self.method.assistant:
            # With adapters, the weights themselves are the model before.
            results = self.results(before=self.method.weights(self.trained))
            equal("adapters", "loss", results["adapters"], results["loss"][0][0])

    def check_before(self) -> None:
        if not self.method.assistant and any(
            map(np.any, jax.tree.leaves(self.whole["loss"][1][1]))
        ):
            fail("before", "gradient", "expected 0, got another")

    def check_state(self) -> None:
        state = None if self.method.state() is None else self.whole["loss"][1][0]["state"]
        if not all(map(np.any, jax.tree.leaves(state))):
            fail("state", "gradient", "expected one of all arrays of its own, got 0")

    def check_mesh(self) -> None:
        mesh = batch_mesh(_ROWS, AxisType.Auto)
        if mesh.size > 1:
            full, rows = (NamedSharding(mesh, spec) for spec in (P(), P("data")))
            split = jax.device_put((self.trained, self.before, self.batch), (full, full, rows))
            results = attempt("mesh", lambda: jax.device_get(self.run(*split)))
            self.same("mesh", "loss", results["loss"][0][0])
            gradients = (jax.tree.leaves(x["loss"][1][0]) for x in (results, self.whole))
            for split_one, whole_one in zip(*gradients):
                equal("mesh", "gradient", split_one, whole_one, atol=1e-4)

    def same(self, name: str, subject: str, value: Any) -> None:
        equal(name, subject, value, self.whole["loss"][0][0])


def _adapters(model: models.Decoder, key: Any) -> models.Lora:
    """Adapters that do not change the model."""
    return models.Lora.init(model.config, 2, key=key, layout="listed")

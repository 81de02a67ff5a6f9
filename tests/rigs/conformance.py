"""Cross-entropy of hidden states and a head, by us and by others, against one float64 oracle.

    python -m tests.rigs conformance
    python -m tests.rigs conformance --only=ours,tokamax_chunked

Who is not installed is left out; `pip install tokamax==0.0.17` and docs/maxtext.md bring those of
JAX. A cell is the largest error of a value in nats, or, where values are right, the largest
relative error of a gradient; `-` where a package does not offer the case. What is known to be wrong
stands in `KNOWN` with its version: the rig fails if that is no longer so, or if something else is.
"""

import dataclasses
import importlib.metadata
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import logitjax
from experiments.shared import suite
from logitjax import losses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked: sizes, types and options; `weights` multiply the tokens' losses."""

    name: str
    vocab: int = 2048
    tokens: int = 256
    hidden_type: str = "float32"
    head_type: str = "float32"
    weights: str = "ones"
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0
    ignored: int = 0

    @property
    def tolerance(self) -> float:
        """Of values in nats, and of gradients relative to their norm."""
        if "bfloat16" in (self.hidden_type, self.head_type):
            return 2e-2
        # Logits are some times as large as hidden states, and float32 has 24 bits.
        return 2e-5 * max(1.0, self.scale / 4)

    def arrays(self) -> tuple[Any, Any, np.ndarray, np.ndarray]:
        """Hidden states `[tokens, 128]`, head `[128, vocab]`, labels and weights `[tokens]`."""
        rng = np.random.default_rng(0)
        hidden = jnp.asarray(rng.normal(size=(self.tokens, 128)) * self.scale, self.hidden_type)
        head = jnp.asarray(rng.normal(size=(128, self.vocab)) / 128**0.5, self.head_type)
        labels = rng.integers(0, self.vocab, self.tokens).astype(np.int32)
        weights = np.ones(self.tokens, np.float32)
        if self.weights == "any":
            weights = rng.normal(size=self.tokens).astype(np.float32)
        if self.weights == "some 0":
            weights[::3] = 0.0
        # What ignored labels are called, where weights say so too.
        labels[weights == 0.0] += self.ignored
        return hidden, head, labels, weights


CASES = (
    Case(name="plain"),
    Case(name="vocabulary 1,024", vocab=1024),
    Case(name="vocabulary 1,000", vocab=1000),
    Case(name="vocabulary 2,049", vocab=2049),
    Case(name="251 tokens", tokens=251),
    Case(name="cotangents other than 1", weights="any"),
    Case(name="weights of 0", weights="some 0"),
    Case(name="ignored labels out of range", weights="some 0", ignored=-(1 << 20)),
    Case(name="logits in the hundreds", scale=60.0),
    Case(name="bfloat16", hidden_type="bfloat16", head_type="bfloat16"),
    Case(name="bfloat16 states, float32 head", hidden_type="bfloat16"),
    Case(name="soft cap", scale=20.0, soft_cap=5.0),
    Case(name="temperature", temperature=0.7),
)

# Of tokamax: the default block of 2,048 is filled up with zeros that count as logits, and logits of
# bfloat16 operands are rounded to it.
KNOWN = {
    ("tokamax_xla", "0.0.17"): {"bfloat16"},
    ("tokamax_chunked", "0.0.17"): {
        "vocabulary 1,024",
        "vocabulary 1,000",
        "vocabulary 2,049",
        "bfloat16",
        "bfloat16 states, float32 head",
    },
}


def oracle(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values `[tokens]` and both gradients of their weighted sum, in float64."""
    hidden, head, labels, weights = case.arrays()
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    raw = hidden @ head
    bent = case.soft_cap * np.tanh(raw / case.soft_cap) if case.soft_cap else raw
    slope = 1 - (bent / case.soft_cap) ** 2 if case.soft_cap else 1.0
    logits = bent / case.temperature
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    log_z = np.log(exp.sum(-1)) + logits.max(-1)
    there = np.where(weights == 0, 0, labels)
    onehot = np.arange(case.vocab) == there[:, None]
    cotangent = weights[:, None] * (exp / exp.sum(-1, keepdims=True) - onehot) * slope
    cotangent = cotangent / case.temperature
    values = np.where(weights == 0, 0.0, log_z - logits[np.arange(len(labels)), there])
    return values, cotangent @ head.T, hidden.T @ cotangent


class NotOffered(Exception):
    """A package has no such option."""


def _plain(case: Case) -> None:
    if case.soft_cap or case.temperature != 1.0:
        raise NotOffered


def _ours(case: Case) -> Callable[..., Any]:
    def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
        head = losses.Head(kernel, vocab_axis=1, soft_cap=case.soft_cap)
        return losses.linear_cross_entropy(hidden, head, labels, temperature=case.temperature)

    return loss


def _ours_dense(case: Case) -> Callable[..., Any]:
    def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
        logits = losses.Head(kernel, vocab_axis=1, soft_cap=case.soft_cap).logits(hidden)
        return losses.cross_entropy(logits / case.temperature, labels)

    return loss


def _optax(case: Case) -> Callable[..., Any]:
    _plain(case)

    def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
        logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    return loss


def _tokamax(case: Case, implementation: str) -> Callable[..., Any]:
    import tokamax

    _plain(case)

    def loss(hidden: Any, kernel: Any, labels: Any) -> Any:
        return tokamax.linear_softmax_cross_entropy_loss(
            hidden, labels, kernel, reduction="none", implementation=implementation
        )

    return loss


def _tokamax_xla(case: Case) -> Callable[..., Any]:
    return _tokamax(case, "xla")


def _tokamax_chunked(case: Case) -> Callable[..., Any]:
    return _tokamax(case, "chunked_xla")


def _maxtext(case: Case) -> Callable[..., Any]:
    from flax import nnx
    from maxtext.utils.vocabulary_tiling import vocab_tiling_nnx_loss

    _plain(case)
    if case.weights == "any" or case.tokens % 2:
        raise NotOffered  # A sum over tokens, whose number the tiles divide.
    options = dict(num_vocab_tiling=2, vocab_size=case.vocab, z_loss_multiplier=0.0)
    options |= dict(enable_dropout=False, shard_mode="auto", debug_sharding=False)
    config = types.SimpleNamespace(**options, vocab_tiling_ag_once=False)

    class Model(nnx.Module):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))

        def __init__(self, kernel: Any):
            self.logits_dense = nnx.Param(kernel)

        def logits_from_hidden_states_for_vocab_tiling(self, hidden: Any, *_: Any) -> Any:
            return jnp.dot(hidden, self.logits_dense[...], preferred_element_type=jnp.float32)

    def loss(hidden: Any, kernel: Any, labels: Any, weights: Any) -> Any:
        data = {"targets": labels[None], "targets_segmentation": jnp.int32(weights != 0)[None]}
        return vocab_tiling_nnx_loss(Model(kernel), hidden[None], data, config, True)[0]

    return loss


PEERS: dict[str, tuple[str, Callable[[Case], Callable[..., Any]]]] = {
    "ours": ("logitjax", _ours),
    "ours_dense": ("logitjax", _ours_dense),
    "optax": ("optax", _optax),
    "tokamax_xla": ("tokamax", _tokamax_xla),
    "tokamax_chunked": ("tokamax", _tokamax_chunked),
    "maxtext": ("maxtext", _maxtext),
}


def error(case: Case, peer: str) -> float:
    """The largest error that matters, as the module says."""
    hidden, head, labels, weights = case.arrays()
    loss = PEERS[peer][1](case)

    def weighted(hidden: Any, head: Any) -> tuple[Any, Any]:
        if peer == "maxtext":
            return (total := loss(hidden, head, labels, weights)), total
        values = loss(hidden, head, labels)
        return jnp.where(weights == 0, 0.0, values * weights).sum(), values

    step = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
    (_, values), gradients = jax.device_get(step(hidden, head))
    expected, *wanted = oracle(case)
    if peer == "maxtext":
        gap = abs(values - expected.sum()) / case.tokens
    else:
        gap = np.abs(np.where(weights == 0, 0.0, values - expected)).max()
    if not gap <= case.tolerance:
        return float(gap)
    return max(
        float(np.linalg.norm(np.float64(got) - want) / np.linalg.norm(want))
        for got, want in zip(gradients, wanted, strict=True)
    )


def run(options: suite.Options) -> suite.Result:
    """Asks everybody everything; the smoke scale asks those that the library stands on."""
    names = options.parts(tuple(PEERS))
    if options.smoke and not options.only:
        names = ["ours", "ours_dense", "optax"]
    columns, ours, surprises = {}, 0, 0
    for name in names:
        package = PEERS[name][0]
        if importlib.util.find_spec(package) is None:
            continue
        is_ours = package == "logitjax"
        version = logitjax.__version__ if is_ours else importlib.metadata.version(package)
        cells, wrong = [], set()
        for case in CASES:
            try:
                gap = error(case, name)
            except NotOffered:
                cells.append("-")
                continue
            cells.append(f"{gap:.1e}")
            # A NaN is wrong too.
            if not gap <= case.tolerance:
                cells[-1] = f"**{gap:.2g}**"
                wrong.add(case.name)
        columns[f"{name} {version}"] = cells
        ours += len(wrong) if is_ours else 0
        surprises += 0 if is_ours else len(wrong ^ KNOWN.get((name, version), set()))
    rows = [
        {"case": case.name} | {name: cells[number] for name, cells in columns.items()}
        for number, case in enumerate(CASES)
    ]
    bars = [
        suite.at_most("cases that we have wrong", ours, 0),
        suite.at_most("cases of others that are not as known", surprises, 0),
    ]
    return suite.Result(rows=rows, bars=bars)

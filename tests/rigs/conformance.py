"""Cross-entropy and KL of hidden states and a head, ours and others, against one float64 oracle.

    python -m tests.rigs conformance
    python -m tests.rigs conformance --only=ours,tokamax_chunked

Each package answers in an interpreter that has it: this one, or one of those that
``LOGITJAX_PEER_PYTHONS`` names, with ``:`` between them (packages of JAX and of torch rarely live
together). Those that no interpreter has are named and left out. A cell is the largest error of a
value in nats, or, where values are right, the largest relative error of a gradient; `-` where a
package does not offer the case. What is known to be wrong stands in `conformance.toml` with its
version: the rig fails if that is no longer so, or if something else is.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.shared import suite
from tests.rigs import _conformance_peers as peers
from tests.rigs import _tables


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A case: sizes, types and options; `weights` multiply the tokens' losses.

    With a `teacher` the loss is KL(teacher || student). `masked` takes every seventh entry from the
    vocabulary, a logit of -inf. Over several `devices` the vocabulary is split.
    """

    name: str
    vocab: int = 2048
    tokens: int = 1024
    hidden_type: str = "float32"
    head_type: str = "float32"
    weights: str = "ones"
    scale: float = 1.0
    soft_cap: float | None = None
    temperature: float = 1.0
    ignored: int = 0
    teacher: bool = False
    masked: bool = False
    devices: int = 1

    @property
    def tolerance(self) -> float:
        """Of values in nats, and of gradients relative to their norm."""
        if "bfloat16" in (self.hidden_type, self.head_type):
            return 2e-2
        # Logits are some times as large as hidden states, and float32 has 24 bits.
        return 2e-5 * max(1.0, self.scale / 4)

    def arrays(self) -> dict[str, np.ndarray]:
        """Hidden states `[tokens, 128]`, kernels `[128, vocab]`, labels and factors `[tokens]`."""
        rng = np.random.default_rng(0)

        def drawn(size: tuple[int, ...], scale: float, dtype: str) -> np.ndarray:
            # Numbers that the type has.
            return np.asarray(jnp.asarray(rng.normal(size=size) * scale, dtype), np.float32)

        arrays_of_sides = {}
        for side in ("", "teacher_"):
            head = "teacher_head" if side else "kernel"
            arrays_of_sides[f"{side}hidden"] = drawn(
                (self.tokens, 128), self.scale, self.hidden_type
            )
            arrays_of_sides[head] = drawn((128, self.vocab), 128**-0.5, self.head_type)
        where = np.arange(self.vocab) % 7 != 3 if self.masked else np.ones(self.vocab, bool)
        labels = rng.choice(np.flatnonzero(where), self.tokens).astype(np.int32)
        factors = np.ones(self.tokens, np.float32)
        if self.weights == "any":
            factors = rng.normal(size=self.tokens).astype(np.float32)
        if self.weights == "some 0":
            factors[::3] = 0.0
        # What ignored labels are called, where weights say so too.
        labels[factors == 0.0] += self.ignored
        return arrays_of_sides | {"labels": labels, "factors": factors, "where": where}


_TABLE = _tables.read("conformance.toml")
CASES = tuple(Case(**case) for case in _TABLE["cases"])


def oracle(case: Case) -> dict[str, np.ndarray]:
    """Values `[tokens]` and both gradients of their weighted sum, in float64."""
    given = case.arrays()
    factors, where = given["factors"].astype(np.float64), given["where"]
    labels = np.where(factors == 0, 0, given["labels"])

    def read(hidden: str, kernel: str, cap: float | None) -> tuple[np.ndarray, Any]:
        logits = given[hidden].astype(np.float64) @ given[kernel].astype(np.float64)
        slope = 1.0
        if cap is not None:
            logits = cap * np.tanh(logits / cap)
            slope = 1 - (logits / cap) ** 2
        logits = np.where(where, logits / case.temperature, -np.inf)
        peak = logits.max(-1, keepdims=True)
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True)), slope

    log_q, slope = read("hidden", "kernel", case.soft_cap)
    if case.teacher:
        log_p, _ = read("teacher_hidden", "teacher_head", None)
        target = np.exp(log_p)
        values = np.where(
            where, target * (np.where(where, log_p, 0) - np.where(where, log_q, 0)), 0
        )
        values = values.sum(-1)
    else:
        target = np.arange(case.vocab) == labels[:, None]
        values = -log_q[np.arange(case.tokens), labels]
    cotangent = factors[:, None] * (np.exp(log_q) - target) * slope / case.temperature
    return {
        "values": np.where(factors == 0, 0.0, values),
        "hidden": cotangent @ given["kernel"].astype(np.float64).T,
        "kernel": given["hidden"].astype(np.float64).T @ cotangent,
    }


def error(case: Case, expected: dict[str, np.ndarray], answer: Any) -> float:
    """The largest error that matters, as the module says."""
    values, factors = answer["values"], case.arrays()["factors"]
    if values.ndim:
        gap = np.abs(np.where(factors == 0, 0.0, values - expected["values"])).max()
    else:  # Their sum.
        gap = abs(values - (factors * expected["values"]).sum()) / case.tokens
    if not gap <= case.tolerance:
        return float(gap)
    return max(
        float(np.linalg.norm(answer[name] - expected[name]) / np.linalg.norm(expected[name]))
        for name in ("hidden", "kernel")
    )


def _interpreter(peer: str) -> str | None:
    if peer.startswith("ours"):
        return sys.executable
    named = os.environ.get("LOGITJAX_PEER_PYTHONS", "").split(":")
    ask = f"import importlib.metadata as m; m.version({peers.PEERS[peer][0]!r})"
    for python in (sys.executable, *filter(None, named)):
        if subprocess.run([python, "-c", ask], capture_output=True).returncode == 0:
            return python
    return None


def run(options: suite.Options) -> suite.Result:
    """Asks everybody everything; the smoke scale asks those that the library stands on."""
    names = options.parts(tuple(peers.PEERS))
    if options.smoke and not options.only:
        names = ["ours", "ours_dense", "optax"]
    expected = [oracle(case) for case in CASES]
    columns, ours, surprises = {}, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(CASES):
            path = Path(folder) / f"{number:02d}"
            path.with_suffix(".json").write_text(json.dumps(dataclasses.asdict(case)))
            np.savez(path.with_suffix(".npz"), **case.arrays())  # pyright: ignore
        for name in names:
            python = _interpreter(name)
            if python is None:
                package = peers.PEERS[name][0]
                logging.warning("%s: left out, for %s is in no interpreter here", name, package)
                continue
            environment = dict(
                os.environ, PYTHONPATH=os.fspath(suite.ROOT) * name.startswith("ours")
            )
            # A folder of rigs has names that packages look for, such as `kernels`.
            command = [python, "-P", peers.__file__, name, folder]
            subprocess.run(command, check=True, env=environment, capture_output=True)
            cells, wrong, version = [], set(), ""
            for number, case in enumerate(CASES):
                with np.load(Path(folder) / f"{name}-{number:02d}.npz") as answer:
                    version = str(answer["version"])
                    if "raised" in answer:
                        logging.warning("%s, %s: %s", name, case.name, answer["raised"])
                        cells.append("**raised**")
                        wrong.add(case.name)
                    elif "values" not in answer:
                        cells.append("-")
                    # A NaN is wrong too.
                    elif (gap := error(case, expected[number], answer)) <= case.tolerance:
                        cells.append(f"{gap:.1e}")
                    else:
                        cells.append(f"**{gap:.2g}**")
                        wrong.add(case.name)
            columns[f"{name} {version}"] = cells
            known_faults = set(_TABLE["known"].get(f"{name} {version}", ()))
            ours += len(wrong) if name.startswith("ours") else 0
            surprises += 0 if name.startswith("ours") else len(wrong ^ known_faults)
            logging.info("%s %s: wrong in %s", name, version, sorted(wrong) or "nothing")
    rows = [
        {"case": case.name} | {name: cells[number] for name, cells in columns.items()}
        for number, case in enumerate(CASES)
    ]
    bars = [
        suite.at_most("cases that we have wrong", ours, 0),
        suite.at_most("cases of others that are not as known", surprises, 0),
    ]
    return suite.Result(rows=rows, bars=bars)

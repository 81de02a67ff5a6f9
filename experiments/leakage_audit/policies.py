"""Policies by name, and the audit of one of them."""

import json
import math
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from logitjax import leakage
from logitjax.leakage import LogitPolicy

DEMO = (
    "full",
    "round_2",
    "round_1",
    "round_0",
    "noise_0.3",
    "noise_1",
    "floor_-10",
    "top_1000",
    "top_20",
    "top_5",
    "top_5_bias",
    "dummy_64_0.1",
    "cap_30",
)
REPORT = (
    *DEMO[:4],
    "round_5",
    "noise_0.1",
    "noise_0.3",
    "noise_1",
    "noise_3",
    "floor_-10",
    "floor_-6",
    "top_5000",
    "top_1000",
    "top_200",
    "top_20",
    "top_5",
    "top_5_bias",
    "dummy_64_0.02",
    "dummy_64_0.1",
    "dummy_256_0.1",
    "cap_30",
    "cap_10",
)


#: Nats below the most likely token within which a row has to come back exactly.
SPAN = 25.0


def parse(name: str) -> LogitPolicy:
    """The policy that a name stands for; ValueError if none."""
    kind, *rest = name.split("_")
    try:
        match kind, rest:
            case "full", []:
                return LogitPolicy()
            case "round", [decimals]:
                return LogitPolicy(decimals=int(decimals))
            case "noise", [sigma]:
                return LogitPolicy(noise=float(sigma))
            case "floor", [floor]:
                return LogitPolicy(floor=float(floor))
            case "top", [k]:
                return LogitPolicy(top_k=int(k))
            case "top", [k, "bias"]:
                return LogitPolicy(top_k=int(k), bias="reported", decimals=7)
            case "dummy", [dims, scale]:
                return LogitPolicy(dummy_dims=int(dims), dummy_scale=float(scale))
            case "cap", [cap]:
                return LogitPolicy(soft_cap=float(cap))
    except ValueError as error:
        raise ValueError(f"policy {name!r}: {error}") from None
    raise ValueError(
        f"policy: expected full, round_D, noise_S, floor_F, top_K, top_K_bias, dummy_R_A or cap_C, "
        f"got {name!r}"
    )


def audit(name: str, seed: int, rows: Any, config: Any, directory: epath.Path) -> dict[str, Any]:
    """One policy, or what an earlier run found of it."""
    path = directory / f"{name}_{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    start = time.perf_counter()
    policy = parse(name)
    oracle = rows.oracle(policy, seed)
    if policy.bias == "reported":
        record = _through_bias(oracle, rows, config)
    else:
        record = _from_rows(oracle, rows, policy, config)
    record |= {
        "policy": name,
        "seed": seed,
        "queries": oracle.queries,
        "values": oracle.values,
        "seconds": time.perf_counter() - start,
    }
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f"{name}_{seed}.part"
    part.write_text(json.dumps(record))
    part.replace(path)
    return record


def _from_rows(
    oracle: leakage.LogitOracle, rows: Any, policy: LogitPolicy, config: Any
) -> dict[str, Any]:
    served = _read(oracle, rows, policy)
    truth = _log_softmax(rows.logits)
    noise = policy.noise
    if policy.decimals is not None:
        noise = math.hypot(noise, leakage.rounding_noise(policy.decimals))
    # As many directions as the head has, whatever the estimate says: one Gram matrix does for both.
    known = min(rows.width, len(served) - 1)
    found = leakage.estimate_output_subspace(served, noise=noise, dimension=known)
    aligned = leakage.align_head(found.basis, rows.head)
    guess = found.restricted_gap if found.above_edge is None else found.above_edge
    some = slice(0, min(256, len(served)))
    return {
        "prompts": len(served),
        "dimension": guess,
        "max_gap": found.max_gap,
        "restricted_gap": found.restricted_gap,
        "above_edge": found.above_edge,
        "leak": aligned.leak,
        "relative_rms": aligned.relative_rms,
        "max_angle": aligned.max_angle,
        "chance": aligned.chance,
        "spectrum": found.singular_values[:: max(1, len(served) // 500)].tolist(),
        "edge": leakage.noise_edge(noise, *served.shape) if noise else None,
        **leakage.utility_loss(truth[some], served[some]),
    }


def _read(oracle: leakage.LogitOracle, rows: Any, policy: LogitPolicy) -> np.ndarray:
    """Rows as a reader has them: where a top-k is reported, the rest is the k-th value."""
    answer = oracle.ask(rows.prompts)
    values = np.asarray(answer.values)
    if policy.top_k is None:
        return values
    filled = np.repeat(values[:, -1:], rows.vocab, axis=1)
    np.put_along_axis(filled, np.asarray(answer.tokens), values, axis=1)
    return filled


def _through_bias(oracle: leakage.LogitOracle, rows: Any, config: Any) -> dict[str, Any]:
    """A whole row, checked against the truth, and the dimension from a corner."""
    row = leakage.recover_log_probs(oracle, rows.prompts[0], rows.vocab)
    truth = _log_softmax(rows.logits[:1])[0]
    off, below = np.abs(row.log_probs - truth), truth.max() - truth
    record: dict[str, Any] = {
        "prompts": 1,
        "row_queries": row.queries,
        "row_coverage": row.coverage,
        "row_error": float(off[row.known & (below <= SPAN)].max()),
        "row_error_all": float(off[row.known].max()),
        # A bias of 30 nats does not lift these; they are asked for once more.
        "row_far": int((below >= 30.0).sum()),
        "row_span": float(np.ptp(truth)),
        "dimension": None,
        # What one query a value leaves is what the full policy leaves: the same rows, dearer.
        "leak": float(row.coverage),
        "kl": 0.0,
        "top1": 1.0,
        "top5": 1.0,
    }
    if config.corner:
        columns = np.random.default_rng(0).choice(
            rows.vocab, min(config.corner, rows.vocab), replace=False
        )
        prompts = rows.prompts[: config.corner]
        corner = leakage.corner_matrix(oracle, list(prompts), columns, rows.vocab)
        found = leakage.estimate_output_subspace(corner)
        record |= {
            "prompts": len(prompts),
            "dimension": found.dimension,
            "max_gap": found.max_gap,
            "restricted_gap": found.restricted_gap,
            "gap": found.gap,
        }
    return record


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits))

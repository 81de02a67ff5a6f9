"""The audit of one policy, as numbers for the report."""

import json
import time

import jax
import numpy as np
from etils import epath

from experiments.leakage_audit.config import Config
from experiments.leakage_audit.data import Rows
from experiments.shared.records import Record
from logitjax import leakage, storage


def audit(rows: Rows, config: Config, directory: epath.Path, name: str, seed: int) -> Record:
    """One policy's record, from disk if an earlier run made it."""
    path = directory / f"{name}_{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    start = time.perf_counter()
    oracle = rows.oracle(leakage.LogitPolicy.parse(name), seed)
    result = leakage.audit(
        oracle, rows.prompts, rows.vocab, head=rows.head, logits=rows.logits, corner=config.corner
    )
    record = _from_rows(result) if result.row is None else _by_token(result, rows.logits[0])
    record |= {
        "policy": name,
        "seed": seed,
        "queries": result.queries,
        "values": result.values,
        "verdict": result.verdict,
        "seconds": time.perf_counter() - start,
    }
    storage.write_atomic(path, json.dumps(record))
    return record


def _from_rows(audit: leakage.Audit) -> Record:
    subspace, aligned = audit.subspace, audit.alignment
    assert subspace is not None
    assert aligned is not None
    assert audit.utility is not None
    return {
        "prompts": audit.prompts,
        **_width(audit),
        "leak": aligned.leak,
        "relative_rms": aligned.relative_rms,
        "spectrum": subspace.singular_values[:: max(1, audit.prompts // 500)].tolist(),
        **audit.utility,
    }


def _by_token(audit: leakage.Audit, logits: np.ndarray) -> Record:
    """A row recovered token by token, beside the true one, and the width from a corner."""
    row = audit.row
    assert row is not None
    assert audit.utility is not None
    truth = np.asarray(jax.nn.log_softmax(logits))
    record: Record = {
        "prompts": audit.prompts,
        "row_queries": row.queries,
        "row_coverage": row.coverage,
        "row_error": audit.row_error,
        # A bias of 30 nats does not lift these; they are queried once more.
        "row_far": int((truth.max() - truth >= 30.0).sum()),
        "row_span": float(np.ptp(truth)),
        "leak": audit.leak,
        **audit.utility,
    }
    if audit.subspace is not None:
        record |= _width(audit)
    return record


def _width(audit: leakage.Audit) -> Record:
    """The width in words and as numbers, and the published estimate."""
    subspace = audit.subspace
    assert subspace is not None
    width = subspace.width
    return {
        "width": str(width),
        "lower": width.lower,
        "estimate": width.estimate,
        "upper": width.upper,
        "reason": width.reason,
        "max_gap": subspace.max_gap,
    }

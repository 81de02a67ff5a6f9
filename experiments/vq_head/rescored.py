"""Re-scoring of the best tokens of a converted head by better rows."""

from typing import Any

from experiments.vq_head import arms
from experiments.vq_head.data import Context
from logitjax import losses, vq


def screened(ctx: Context, base: arms.Converted, candidates: int) -> arms.Converted:
    """Re-scores the best tokens of a cheap head with the old rows."""
    if base.logits is None:
        raise ValueError("base: expected a head with V logits to screen with, got one without")
    rows = losses.Head(ctx.rows, ctx.row_bias, vocab_axis=0)

    def screen(arrays: Any, logits: Any) -> vq.ScreenedHead:
        return vq.ScreenedHead(
            lambda hidden: logits(arrays["screen"], hidden),
            num_candidates=candidates,
            rows=arrays["rows"].kernel,
            row_bias=arrays["rows"].bias,
        )

    def nll(arrays: Any, hidden: Any, labels: Any) -> Any:
        return screen(arrays, base.logits).nll(hidden, labels)

    def top_k(logits: Any) -> Any:
        return lambda arrays, hidden: (
            screen(arrays, logits).top_k(hidden, 5, with_log_z=False).indices
        )

    return arms.Converted(
        nll=nll,
        top_k=top_k(base.logits),
        params={},
        given={"screen": base.arrays, "rows": rows},
        cost=base.cost.with_rows(candidates, ctx.width, kept=0 if ctx.tied else ctx.vocab),
        trains=False,
        decode=top_k(base.lookup) if base.lookup else None,
    )

"""What re-scores the best tokens of a converted head by better rows: shortlists and screens."""

from typing import Any

from flax import nnx

from experiments.vq_head import arms
from experiments.vq_head.data import Context
from logitjax import losses, vq


def shortlist(ctx: Context, base: arms.Converted, num_pages: int) -> arms.Converted:
    """Re-scores a shortlist of a converted head with the old rows."""
    config = ctx.config
    codebook, bias, assignment = (base.arrays[k] for k in ("codebook", "bias", "assignment"))
    margin = vq.Pages.spread(ctx.rows, codebook, assignment, ctx.statistics.cov)
    pages = vq.Pages.cut(bias, assignment, size=config.page_size, margin=margin)
    num_pages = min(num_pages, pages.tokens.shape[0])
    rows = losses.Head(ctx.rows, ctx.row_bias, vocab_axis=0)

    def chosen(arrays: Any) -> vq.Shortlist:
        return vq.Shortlist(pages=arrays["pages"], rescore=arrays["rows"], num_pages=num_pages)

    def nll(arrays: Any, hidden: Any, labels: Any) -> Any:
        codes = (arrays["codebook"], arrays["bias"], arrays["assignment"])
        return chosen(arrays).nll(hidden, *codes, labels)

    def top_k(arrays: Any, hidden: Any) -> Any:
        k = min(5, num_pages * config.page_size)
        return chosen(arrays).top_k(hidden, arrays["codebook"], k, with_tail=False).indices

    head = vq.ShortlistHead(
        ctx.width,
        ctx.vocab,
        len(codebook),
        num_pages=num_pages,
        page_size=config.page_size,
        rows=None if ctx.tied else ctx.rows,
        assignment=assignment,
        rngs=nnx.Rngs(0),
    )
    return arms.Converted(
        nll=nll,
        top_k=top_k,
        params={"codebook": codebook, "bias": bias},
        given={"assignment": assignment, "pages": pages, "rows": rows},
        cost=head.cost(ctx.rows),
        floor=base.floor,
    )


def screened(ctx: Context, base: arms.Converted, candidates: int) -> arms.Converted:
    """Re-scores the best tokens of a cheap head with the old rows."""
    if base.logits is None:
        raise ValueError("base: expected a head with V logits to screen with, got one without")
    rows = losses.Head(ctx.rows, ctx.row_bias, vocab_axis=0)

    def screen(arrays: Any, logits: Any) -> vq.Screen:
        return vq.Screen(
            cheap=lambda hidden: logits(arrays["screen"], hidden),
            rescore=arrays["rows"],
            num_candidates=candidates,
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
        cost=base.cost.with_rows(candidates, ctx.width, own=0 if ctx.tied else ctx.vocab),
        trains=False,
        decode=top_k(base.lookup) if base.lookup else None,
    )

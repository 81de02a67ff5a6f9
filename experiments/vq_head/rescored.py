"""What re-scores the best tokens of a converted head by better rows: shortlists and screens."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from experiments.vq_head import arms
from experiments.vq_head.data import Context
from logitjax import heads, losses, vq


def shortlist(
    ctx: Context, base: arms.Converted, num_pages: int, *, groups: int = 0, seed: int = 0
) -> arms.Converted:
    """Re-scores a shortlist of a converted head with the old rows, or product-quantised ones."""
    config = ctx.config
    codebook, bias, assignment = (base.arrays[k] for k in ("codebook", "bias", "assignment"))
    margin = vq.Pages.spread(ctx.rows, codebook, assignment, ctx.statistics.cov)
    pages = vq.Pages.cut(bias, assignment, size=config.page_size, margin=margin)
    num_pages = min(num_pages, pages.tokens.shape[0])
    rows: Any = losses.Head(ctx.rows, ctx.row_bias, vocab_axis=0)
    if groups:
        rows = arms.product_codes(ctx, groups, config.product_codes, seed)

    def chosen(arrays: Any) -> vq.Shortlist:
        return vq.Shortlist(
            pages=arrays["pages"],
            rescore=arrays["rows"].logits_at if groups else arrays["rows"],
            num_pages=num_pages,
            calibration=arrays["calibration"],
        )

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
        rows=None if ctx.tied or groups else ctx.rows,
        assignment=assignment,
        rngs=nnx.Rngs(0),
    )
    cost = head.cost(ctx.rows)
    if groups:
        cost = _with_product_rows(cost, ctx, num_pages * config.page_size, groups)
    return arms.Converted(
        nll=nll,
        top_k=top_k,
        params={"codebook": codebook, "bias": bias, "calibration": jnp.array([1.0, 0.0])},
        given={"assignment": assignment, "pages": pages, "rows": rows},
        cost=cost,
        floor=base.floor,
    )


def _with_product_rows(
    cost: heads.HeadCost, ctx: Context, listed: int, groups: int
) -> heads.HeadCost:
    """The cost of a shortlist whose rows are product-quantised rather than the embedding's."""
    numbers = ctx.config.product_codes * ctx.width
    fewer = 2 * numbers + listed * groups - 2 * listed * ctx.width
    return dataclasses.replace(
        cost,
        parameters=cost.parameters + numbers,
        stored_bytes=cost.stored_bytes + numbers * 4 + ctx.vocab * groups,
        read_bytes=cost.read_bytes + numbers * 4 + listed * (groups + 4 - ctx.width * 4),
        decode_flops=cost.decode_flops + fewer,
        train_flops=cost.train_flops + 3 * fewer,
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


def tune_tail(ctx: Context, converted: arms.Converted, trial: arms.Trial) -> arms.Converted:
    """A few steps of a shortlist's own normalised loss for the codebook and biases."""
    train, config = ctx.splits["train"], ctx.config
    params, curve = arms.tune(
        ctx,
        trial,
        lambda params, given, h, y: converted.nll(params | given, h, y),
        converted.params,
        [train.hidden, train.labels],
        converted.given,
        steps=config.shortlist_steps,
        batch_size=config.shortlist_batch,
    )
    pages = converted.given["pages"].with_biases(params["bias"])
    given = {**converted.given, "pages": pages}
    return dataclasses.replace(converted, params=params, given=given, curve=curve)

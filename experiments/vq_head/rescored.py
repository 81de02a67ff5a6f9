"""What re-scores the best tokens of a converted head by better rows: shortlists and screens."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from experiments.vq_head import arms
from experiments.vq_head.data import Context
from logitjax import heads, vq


def shortlist(
    ctx: Context, base: arms.Converted, num_pages: int, *, groups: int = 0, seed: int = 0
) -> arms.Converted:
    """Re-scores a shortlist of a converted head with the old rows, or product-quantised ones."""
    config = ctx.config
    codebook, bias, assignment = (base.arrays[k] for k in ("codebook", "bias", "assignment"))
    margin = vq.row_spread(ctx.rows, codebook, assignment, ctx.statistics.cov)
    pages = vq.make_pages(bias, assignment, size=config.page_size, margin=margin)
    num_pages = min(num_pages, pages.tokens.shape[0])
    rescoring: Any
    if groups:
        *product, row_bias = arms.product_codes(ctx, groups, config.product_codes, seed)
        rows, rescoring = tuple(product), vq.product_rows
    else:
        rows, row_bias, rescoring = (ctx.rows,), ctx.row_bias, vq.exact_rows

    def chosen(arrays: Any) -> vq.Shortlist:
        return vq.Shortlist(
            pages=arrays["pages"],
            rescore=rescoring(*arrays["rows"], arrays["row_bias"]),
            num_pages=num_pages,
            calibration=arrays["calibration"],
        )

    def nll(arrays: Any, hidden: Any, labels: Any) -> Any:
        codes = (arrays["codebook"], arrays["bias"], arrays["assignment"])
        return vq.shortlist_nll(hidden, *codes, labels, shortlist=chosen(arrays))

    def top_k(arrays: Any, hidden: Any) -> Any:
        k = min(5, num_pages * config.page_size)
        top = vq.shortlist_topk(
            hidden, arrays["codebook"], k, shortlist=chosen(arrays), with_tail=False
        )
        return top.indices

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
        given={"assignment": assignment, "pages": pages, "rows": rows, "row_bias": row_bias},
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
    given = {"screen": base.arrays, "rows": ctx.rows, "row_bias": ctx.row_bias}

    def options(arrays: Any, logits: Any) -> dict[str, Any]:
        return {
            "screen": lambda hidden: logits(arrays["screen"], hidden),
            "rescore": vq.exact_rows(arrays["rows"], arrays["row_bias"]),
            "num_candidates": candidates,
        }

    def nll(arrays: Any, hidden: Any, labels: Any) -> Any:
        return vq.screened_nll(hidden, labels, **options(arrays, base.logits))

    def top_k(logits: Any) -> Any:
        return lambda arrays, hidden: (
            vq.screened_topk(hidden, 5, with_log_z=False, **options(arrays, logits)).indices
        )

    return arms.Converted(
        nll=nll,
        top_k=top_k(base.logits),
        params={},
        given=given,
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

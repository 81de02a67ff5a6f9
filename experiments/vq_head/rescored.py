"""What re-scores the best tokens of a converted head by better rows: shortlists and screens."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.vq_head import arms
from experiments.vq_head.context import Context
from logitjax import heads, vq


def shortlist(
    ctx: Context,
    base: arms.Converted,
    num_pages: int,
    config: Any,
    *,
    groups: int = 0,
    seed: int = 0,
) -> arms.Converted:
    """Re-scores a shortlist of a converted head with the old rows, or product-quantised ones."""
    codebook, bias, assignment = (base.params[k] for k in ("codebook", "bias", "assignment"))
    margin = vq.row_spread(ctx.rows, codebook, assignment, ctx.statistics.cov)
    pages = vq.make_pages(bias, assignment, size=config.page_size, margin=margin)
    num_pages = min(num_pages, pages.tokens.shape[0])
    params = {
        "codebook": codebook,
        "bias": bias,
        "assignment": assignment,
        "pages": pages,
        "calibration": jnp.array([1.0, 0.0]),
    }
    if groups:
        params["product"] = vq.fit_product_codes(
            ctx.rows,
            ctx.unigram,
            ctx.statistics.cov,
            groups=groups,
            num_codes=min(config.product_codes, ctx.vocab),
            key=jax.random.key(seed),
            iterations=config.kmeans_iterations,
        )
        # What quantisation loses at the mean hidden state goes back into a bias.
        lost = ctx.rows @ ctx.statistics.mean
        lost -= vq.product_kernel(*params["product"]) @ ctx.statistics.mean
        params["row_bias"] = lost if ctx.row_bias is None else lost + ctx.row_bias
    else:
        params |= {"rows": ctx.rows, "row_bias": ctx.row_bias}

    def options(params: Any) -> dict[str, Any]:
        if groups:
            rescore = vq.product_rows(*params["product"], params["row_bias"])
        else:
            rescore = vq.exact_rows(params["rows"], params["row_bias"])
        return {
            "pages": params["pages"],
            "rescore": rescore,
            "num_pages": num_pages,
            "calibration": params["calibration"],
        }

    def nll(params: Any, hidden: Any, labels: Any) -> Any:
        arrays = (params["codebook"], params["bias"], params["assignment"])
        return vq.shortlist_nll(hidden, *arrays, labels, **options(params))

    def top_k(params: Any, hidden: Any) -> Any:
        k = min(5, num_pages * config.page_size)
        top = vq.shortlist_topk(hidden, params["codebook"], k, with_tail=False, **options(params))
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
        cost = _with_product_rows(cost, ctx, num_pages * config.page_size, groups, config)
    return arms.Converted(nll, top_k, params, cost, base.floor)


def _with_product_rows(
    cost: heads.HeadCost, ctx: Context, listed: int, groups: int, config: Any
) -> heads.HeadCost:
    """Of a shortlist whose rows are product-quantised rather than the embedding's."""
    numbers = config.product_codes * ctx.width
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
    screen = base.logits
    if screen is None:
        raise ValueError("this head does not make V logits to screen with")
    params = {"screen": base.params, "rows": ctx.rows, "row_bias": ctx.row_bias}

    def options(params: Any, logits: Any = screen) -> dict[str, Any]:
        return {
            "screen": lambda hidden: logits(params["screen"], hidden),
            "rescore": vq.exact_rows(params["rows"], params["row_bias"]),
            "num_candidates": candidates,
        }

    def nll(params: Any, hidden: Any, labels: Any) -> Any:
        return vq.screened_nll(hidden, labels, **options(params))

    def top_k(params: Any, hidden: Any, **way: Any) -> Any:
        found = vq.screened_topk(hidden, 5, with_log_z=False, **options(params, **way))
        return found.indices

    def decode(params: Any, hidden: Any) -> Any:
        return top_k(params, hidden, logits=arms.lookup_logits)

    cost = base.cost.with_rows(candidates, ctx.width, own=0 if ctx.tied else ctx.vocab)
    looks_up = "product" in base.params and "packed" not in base.params
    return arms.Converted(nll, top_k, params, cost, decode=decode if looks_up else None)


def tune_shortlist_tail(
    ctx: Context, converted: arms.Converted, seed: int, lr: float, config: Any
) -> arms.Converted:
    """A few steps of the shortlist's own normalised loss for the codebook and biases."""
    trained = {k: converted.params[k] for k in ("codebook", "bias", "calibration")}
    fixed = {k: v for k, v in converted.params.items() if k not in trained}
    train = ctx.splits["train"]
    trained, _, losses_ = vq.tune_head(
        lambda params, fixed, h, y: converted.nll(params | fixed, h, y),
        trained,
        [train.hidden, train.labels],
        steps=config.shortlist_steps,
        batch_size=config.shortlist_batch,
        learning_rate=lr,
        constants=fixed,
        seed=seed,
        mesh=ctx.mesh,
    )
    pages = vq.with_page_biases(converted.params["pages"], trained["bias"])
    params = converted.params | trained | {"pages": pages}
    return dataclasses.replace(converted, params=params, curve=tuple(losses_))

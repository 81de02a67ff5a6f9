"""Samples inside the caller's compiled program: arrays in, arrays out, nothing fetched."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Int, Integer

from logitjax.decoding._cached_model import CachedModel
from logitjax.decoding._chunks import joined, one_step
from logitjax.decoding._ensemble import Ensemble
from logitjax.decoding._requests import Request, fresh_rows
from logitjax.decoding._sampling import Sampling
from logitjax.decoding._step import DecodeOptions, Emitted, constrain, run_steps, start
from logitjax.ops import Array


def rollout(
    model: CachedModel | Ensemble,
    tokens: Int[Array, "rows time"],
    positions: Int[Array, "rows time"],
    seeds: Integer[Array, " rows"],
    *,
    new_tokens: int,
    sampling: Sampling,
    stop_ids: Sequence[int] = (),
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Emitted, jax.Array]:
    """Continue left-padded prompts; call it under `jax.jit`.

    Unlike `generate` it takes the parameters of its model as they are, even traced, so that a
    student in training is sampled without a copy. The tokens of a row depend on its own seed, not
    on its neighbours or the number of devices.

    Args:
        model: A `CachedModel` or an `Ensemble`, its parameters traced or not.
        tokens: Prompts, the last token of each in the last column.
        positions: Position of each token, -1 before a prompt.
        seeds: uint32 seed of each row.
        sampling: The distribution to sample; its own `seed` is not used.
        stop_ids: A row ends after any of these, which is part of its tokens.
        mesh: Devices, as in `DecodeOptions`.

    Returns:
        `Emitted` of `[rows, new_tokens]` with `logprobs` under the distribution that tokens were
        drawn from, temperature and truncation included; and `[rows]`, if a stop token ended it.
    """
    ensemble = model if isinstance(model, Ensemble) else Ensemble(model)
    plan, (rows, time) = ensemble.plan, tokens.shape
    options = DecodeOptions(
        logprobs=True,
        # Those of the sampling distribution, for importance ratios.
        logprobs_of="sampled",
        repetition=sampling.penalizes,
        max_stop_ids=max(1, len(stop_ids)),
        mesh=mesh,
    )
    # Its prompt is a placeholder: the rows' prompts are traced, and `start` feeds them.
    request = Request(
        prompt=[0], max_new_tokens=new_tokens, sampling=sampling, stop_ids=tuple(stop_ids)
    )
    cache = plan.init_cache(rows, time + new_tokens)
    state = fresh_rows(plan, options, [request] * rows, cache=cache)
    state = dataclasses.replace(state, sampling=dataclasses.replace(state.sampling, seed=seeds))
    state = constrain(plan, options, jax.tree.map(jnp.asarray, state))
    streams = [jnp.stack(plan.read(tokens)), jnp.stack([positions] * plan.streams)]
    state, first = start(plan, options, ensemble.params, state, *streams)
    state, rest = run_steps(plan, options, ensemble.params, state, new_tokens - 1)
    return joined([one_step(first), rest]), state.stopped

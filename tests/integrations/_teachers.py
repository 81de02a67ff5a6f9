"""Teachers from a cache whose losses no trainer has: an exact tail, another vocabulary."""

import dataclasses
import functools

import jax
import numpy as np

from logitjax import distillation, losses
from logitjax.distillation import terms


def cached_teacher(tokens, size, *, vocab=None, vocabularies=None):
    """A function of the token that was read last, with its normaliser and draws from the tail."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(size, vocab or size)).astype(np.float32)[tokens] * 2
    statistics = jax.jit(losses.graph_statistics, static_argnums=1)(logits, 8)
    tail = losses.TailSample.draw(jax.random.key(0), logits, statistics.indices, 4)
    statistics = dataclasses.replace(statistics, tail=tail if vocabularies is None else None)
    return distillation.Teacher(
        statistics=jax.tree.map(np.asarray, statistics),
        vocabularies=vocabularies or distillation.Teacher().vocabularies,
    )


def lacking(size):
    """By name a term, and its teacher as a function of tokens below `size`."""
    # Two of the student's tokens for each of the teacher's; one object, so a step compiles once.
    pieces = distillation.TokenProjection(
        ids=np.arange(size, dtype=np.int32)[:, None] // 2,
        weights=np.ones((size, 1), np.float32),
        size=-(-size // 2),
    )
    pairs = distillation.Vocabularies(projections={"first_piece": pieces})
    other = dict(vocab=pieces.size, vocabularies=pairs)
    return {
        "kl with the tail": (terms.KL(), functools.partial(cached_teacher, size=size)),
        "first_piece": (terms.FirstPiece(), functools.partial(cached_teacher, size=size, **other)),
    }

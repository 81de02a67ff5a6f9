"""Fusion of a vocabulary that is split over devices, and of a batch that is."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from logitjax.fusion import (
    ContrastiveDecoding,
    DExperts,
    DynamicFusion,
    LogitDifference,
    ProxyTuning,
    _rows,
)
from tests.fusion.test_dynamic import BASE, EXPERT, LARGE
from tests.fusion.test_several_experts import EXPERTS

STRATEGIES = {
    "proxy": ProxyTuning(),
    "dexperts": DExperts(top_p=1.0),
    "contrastive": ContrastiveDecoding(),
    "clean": LogitDifference(filter="clean"),
    "official": LogitDifference(filter="official", form="raw"),
    "grid": DynamicFusion(method="grid"),
    "jeffreys": DynamicFusion(method="jeffreys", max_sweeps=6, sharded_sweeps=6),
    "project": DynamicFusion(sharded_sweeps=10),
    "joint": DynamicFusion(sharded_sweeps=6),
}


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("tensor",), axis_types=(kind,))


def arguments(name):
    if name == "contrastive":
        return LARGE, None, BASE
    if name in ("clean", "official"):
        return LARGE, EXPERT, None
    return LARGE, EXPERTS if name == "joint" else EXPERT, BASE


@functools.cache
def local(name):
    return jax.device_get(jax.jit(STRATEGIES[name])(*arguments(name)))


@functools.cache
def sharded(name):
    """The strategy compiled for a split vocabulary, and what to call it with."""
    args = [a for a in arguments(name) if a is not None]
    specs = tuple(P(*[None] * (a.ndim - 1), "tensor") for a in args)

    def shard(*args):
        given = iter(args)
        full = [None if a is None else next(given) for a in arguments(name)]
        return STRATEGIES[name](*full, axis_name="tensor")

    run = jax.shard_map(
        shard, mesh=mesh(), in_specs=specs, out_specs=(P(None, "tensor"), P()), check_vma=True
    )
    return jax.jit(run).lower(*args).compile(), args


# These take seconds to compile.
LARGE_PROGRAMS = {
    name: [pytest.mark.slow, pytest.mark.every_change] for name in ("project", "joint")
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LARGE_PROGRAMS.get(name, [])) for name in STRATEGIES]
)
def test_sharded_equals_local(name):
    run, args = sharded(name)
    fused, info = run(*args)
    local_logits, expected = local(name)
    np.testing.assert_allclose(fused, local_logits, atol=5e-3)
    if "alpha" in info:
        np.testing.assert_allclose(info["alpha"], expected["alpha"], atol=1e-3)


# One for maxima, one for normalisers, one for targets, with which a grid goes; then one a sweep.
@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize(("name", "reductions"), [("grid", 3), ("jeffreys", 3 + 6)])
def test_all_reduces_a_token_are_few_and_fixed(name, reductions):
    run, _ = sharded(name)
    text = run.as_text()
    assert "all-gather" not in text
    all_reduces = re.findall(r"= \S+ all-reduce(?:-start)?\(|\) all-reduce(?:-start)?\(", text)
    assert len(all_reduces) == reductions
    # None of them in the body of a loop.
    for body in re.findall(r"^%?\S*body\S* .*?^}", text, re.MULTILINE | re.DOTALL):
        assert "all-reduce" not in body


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("grid", False),
        ("jeffreys", True),
        pytest.param("project", False, marks=LARGE_PROGRAMS["project"]),
    ],
)
def test_batch_sharded_under_jit(kind, name, turns, monkeypatch):
    local_logits, _ = local(name)
    if turns:
        monkeypatch.setattr(_rows, "MOST_ENTRIES", 1)
    rows = {2: P("tensor"), 3: P(None, "tensor")}
    on = mesh(kind)
    placed = [jax.device_put(a, NamedSharding(on, rows[a.ndim])) for a in arguments(name)]
    strategy = STRATEGIES[name]
    with jax.set_mesh(on):
        fused, _ = jax.jit(lambda *logits: strategy(*logits))(*placed)
    np.testing.assert_allclose(fused, local_logits, atol=5e-3)


def test_top_p_of_a_sharded_vocabulary_is_refused():
    fuse = functools.partial(DExperts(), axis_name="tensor")
    with pytest.raises(ValueError, match="axis_name='tensor'"):
        jax.eval_shape(fuse, *np.zeros((3, 2, 8), np.float32))

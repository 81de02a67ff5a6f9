"""Bytes that a TPU's compiled program of a head accesses for the most likely token."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from logitjax.heads import LinearHead, TiedHead
from logitjax.ops import Codes


def _full(hidden, rows):
    return TiedHead(dtype=jnp.bfloat16)(hidden, rows).argmax(-1)


def _coded(hidden, rows, codes, bias):
    vocab, width = rows.shape
    head = LinearHead(width, vocab, kernel=codes, bias=bias, dtype=jnp.bfloat16)
    return head(hidden).argmax(-1)


# Shares of the bytes of bfloat16 rows, by codes and groups of a row, for one position: for several,
# and for other groups of the wider heads, XLA writes widened codes first.
LIMITS = {
    (49_152, 576): {("int4", 8): 0.305, ("int4", 1): 0.33, ("int8", 8): 0.6},
    (151_936, 1536): {("int4", 1): 0.28},
    (262_144, 640): {("int4", 1): 0.32},
}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")
@pytest.mark.parametrize("topology", ["v5p:1x1x1", "v6e:1x1"])
def test_a_tpu_reads_the_codes_alone_for_one_token(topology):
    from jax.experimental import topologies

    for name, value in {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def share(head, rows, *arguments):
        traced = jax.jit(head).trace(array(1, rows.shape[1]), rows, *arguments)
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        return compiled.cost_analysis()["bytes accessed"] / rows.size / 2

    for shape, limits in LIMITS.items():
        rows = array(*shape)
        assert share(_full, rows) < 1.02
        for (bits, groups), limit in limits.items():
            steps = array(shape[0], groups)
            codes = Codes(array(*shape, dtype=bits), steps, steps, 1)
            assert share(_coded, rows, codes, array(shape[0])) <= limit, (topology, shape, bits)

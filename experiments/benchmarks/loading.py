"""Host memory and seconds to load a checkpoint, as multiples of the model's size.

On CPU the loaded model itself is in host memory, so 1.0 is the minimum. A mixture of experts is
spread over a mesh of 8 devices of this host.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.shared import suite
from logitjax import models, training

_SIZES: Any = dict(hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64)
_EXPERTS: Any = dict(family="qwen3_moe", qk_norm=True, num_experts=16, experts_per_token=4)
_RANDOM = {
    "random": models.DecoderConfig(
        vocab_size=32_000, intermediate_size=1408, max_length=2048, **_SIZES
    ),
    "experts": models.DecoderConfig(
        vocab_size=8_000,
        intermediate_size=512,
        expert_size=256,
        max_length=2048,
        **_SIZES,
        **_EXPERTS,
    ),
}


def _export(name: str, directory: str) -> None:
    if name in _RANDOM:
        model = models.Decoder(_RANDOM[name], rngs=nnx.Rngs(0))
    else:
        model = models.load_model(name)
    models.save_pretrained(model, None, directory, max_shard_bytes=2**28)


def _load(spec: str, layout: Any, dtype: str) -> dict[str, float]:
    """Seconds of loading, the model's bytes, and those that the process came to hold."""
    # A mixture uses all of them, other models the first.
    jax.config.update("jax_num_cpu_devices", 8)
    jnp.zeros(()).block_until_ready()
    before, start = suite.memory_bytes("VmRSS"), time.perf_counter()
    mesh = training.make_mesh("expert:8") if "experts" in spec else None
    model = models.load_model(
        spec, layout=layout, param_dtype=jnp.dtype(dtype), mesh=mesh, rules=models.DECODER_RULES
    )
    leaves = jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    seconds, size = time.perf_counter() - start, sum(leaf.nbytes for leaf in leaves)
    return {"seconds": seconds, "size": size, "peak": suite.memory_bytes("VmHWM") - before}


def run(options: suite.Options) -> suite.Result:
    """Exports a model, then loads it in a fresh process for every layout and dtype."""
    options.directory.mkdir(parents=True, exist_ok=True)
    name = "random" if options.smoke else "smollm2"
    sources = {} if options.smoke else {"smollm2 gguf": "smollm2"}
    for model in (name, "experts"):
        directory = str(Path(options.directory) / f"{model}-safetensors")
        suite.in_fresh_process(_export, model, directory)
        sources[f"{model} safetensors"] = directory
    rows, worst = [], 0.0
    for kind, spec in sources.items():
        for layout in ("stacked", "listed"):
            for dtype in ("float32", "bfloat16"):
                seen = suite.in_fresh_process(_load, spec, layout, dtype)
                ratio = seen["peak"] / seen["size"]
                if "safetensors" in kind and dtype == "float32":
                    worst = max(worst, ratio)
                row = {"from": kind, "layout": layout, "parameters": dtype}
                row |= {"model, MB": round(seen["size"] / 1e6, 1), "peak / model": round(ratio, 3)}
                rows.append(row | {"seconds": round(seen["seconds"], 2)})
    bars = (suite.at_most("host memory at its peak / model, safetensors", worst, 1.3),)
    return suite.Result(rows=rows, bars=bars)

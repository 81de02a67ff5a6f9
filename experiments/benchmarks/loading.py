"""Host memory and seconds to load a checkpoint, as multiples of the model's size.

On CPU the loaded model itself is in host memory, so 1.0 is the minimum. A mixture of experts is
spread over a mesh of 8 devices of this host.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.shared import suite

_CHILD = """
import json, sys, time
import jax, jax.numpy as jnp
from flax import nnx
from experiments.shared.suite import memory_bytes
from logitjax import models, training

spec, layout, dtype = sys.argv[1:]
jnp.zeros(()).block_until_ready()
# A child inherits its parent's peak through getrusage, not through VmHWM.
before, start = memory_bytes("VmRSS"), time.perf_counter()
mesh = training.make_mesh("expert:8") if "experts" in spec else None
model = models.load_model(
    spec, layout=layout, param_dtype=jnp.dtype(dtype), mesh=mesh, rules=models.DECODER_RULES
)
leaves = jax.tree.leaves(nnx.state(model))
jax.block_until_ready(leaves)
seconds = time.perf_counter() - start
size = sum(leaf.nbytes for leaf in leaves)
print(json.dumps({"seconds": seconds, "size": size, "peak": memory_bytes("VmHWM") - before}))
"""

_EXPORT = """
import sys
import jax.numpy as jnp
from flax import nnx
from logitjax import models

spec, directory = sys.argv[1:]
if spec == "random":
    config = models.DecoderConfig(
        vocab_size=32_000, hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8,
        num_kv_heads=4, head_dim=64, max_length=2048,
    )
elif spec == "experts":
    config = models.DecoderConfig(
        family="qwen3_moe", qk_norm=True, vocab_size=8_000, hidden_size=512, intermediate_size=512,
        num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, max_length=2048,
        num_experts=16, experts_per_token=4, expert_size=256,
    )
if spec in ("random", "experts"):
    model = models.Decoder(config, rngs=nnx.Rngs(0))
else:
    model = models.load_model(spec)
models.save_pretrained(model, None, directory, max_shard_bytes=2**28)
"""


def _child(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    # A mixture uses all of them, other models the first.
    devices = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=devices).stdout


def _measure(spec: str, layout: str, dtype: str) -> dict[str, Any]:
    return json.loads(_child(_CHILD, spec, layout, dtype).splitlines()[-1])


def run(options: suite.Options) -> suite.Result:
    """Exports a model, then loads it in a fresh process for every layout and dtype."""
    options.directory.mkdir(parents=True, exist_ok=True)
    name = "random" if options.smoke else "smollm2"
    sources = {} if options.smoke else {"smollm2 gguf": "smollm2"}
    for model in (name, "experts"):
        directory = str(Path(options.directory) / f"{model}-safetensors")
        _child(_EXPORT, model, directory)
        sources[f"{model} safetensors"] = directory
    rows, worst = [], 0.0
    for kind, spec in sources.items():
        for layout in ("stacked", "listed"):
            for dtype in ("float32", "bfloat16"):
                seen = _measure(spec, layout, dtype)
                ratio = seen["peak"] / seen["size"]
                if "safetensors" in kind and dtype == "float32":
                    worst = max(worst, ratio)
                row = {"from": kind, "layout": layout, "parameters": dtype}
                row |= {"model, MB": round(seen["size"] / 1e6, 1), "peak / model": round(ratio, 3)}
                rows.append(row | {"seconds": round(seen["seconds"], 2)})
    bars = (suite.at_most("host memory at its peak / model, safetensors", worst, 1.3),)
    return suite.Result(rows=rows, bars=bars)

"""A mesh of eight devices: batch, parameters and vocabulary split, and the same loss as on one.

Eight CPU devices stand for accelerators, two for each axis: `data` copies the model, `fsdp` splits
batch and parameters, `tensor` splits heads and vocabulary. On a machine with eight accelerators,
leave the environment variables out. docs/multi_host.md continues with several processes.

    python examples/mesh_of_eight_devices.py     # offline, some seconds on a CPU
"""

import os

os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES="8", PJRT_NPROC="24")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # the partitioner's advice, meant for large models

import dataclasses
import inspect

import jax
import numpy as np
from flax import nnx

from logitjax import losses, models, training

# Bytes, and a few more ids: a vocabulary that two devices can share.
config = dataclasses.replace(models.load_config("tiny"), vocab_size=264)
model = models.Decoder(config, rngs=nnx.Rngs(0))
text = np.frombuffer(inspect.getsource(inspect).encode(), np.uint8).astype(np.int32)
graphdef, params, rest = nnx.split(model, nnx.Param, ...)
params = nnx.to_pure_dict(params)


def loss_fn(params, batch, rng):
    del rng
    model = nnx.merge(graphdef, params, rest)
    hidden, _ = model.hidden_states(batch["tokens"][:, :-1])
    nats = losses.linear_cross_entropy(hidden, model.head_of(), batch["tokens"][:, 1:])
    return nats.sum(), nats.size, {}


def train(mesh, steps=20):
    optimizer = training.Schedule(1e-2, "constant").optimizer()
    rules = models.DECODER_RULES  # where each parameter goes
    state = training.TrainState.create(params, optimizer, mesh=mesh, rules=rules)
    step, seen = training.TrainStep(loss_fn, optimizer, mesh=mesh), []
    rng = np.random.default_rng(0)
    for _ in range(steps):
        starts = rng.integers(0, len(text) - 33, (16, 1))
        state, output = step(state, {"tokens": text[starts + np.arange(33)]})
        total, count = jax.device_get(output.metrics["loss"])
        seen.append(total / count)
    return seen, state.params["embedding"].sharding.spec


one, _ = train(training.make_mesh("data:1", devices=jax.devices()[:1]))
eight, spec = train(training.make_mesh("data:2,fsdp:2,tensor:2"))
print(f"the embedding lies over {spec} of {jax.device_count()} devices")
np.testing.assert_allclose(eight, one, rtol=1e-4)
assert eight[-1] < 0.8 * eight[0]
print(f"worked: {one[-1]:.4f} nats on one device, {eight[-1]:.4f} on eight, after 20 steps")

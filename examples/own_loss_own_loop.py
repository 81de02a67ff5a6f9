# %% [markdown]
# # Your own loss in your own loop
#
# A cross-entropy with a penalty on the normaliser (PaLM's z-loss), written as if the logits were
# there. `linear_fused_loss` forms value and gradient block by block: the logits never exist. Model,
# optimiser and loop are yours, here plain JAX and optax. Offline, some seconds on a CPU.

# %%
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

from logitjax import losses, ops

text = np.frombuffer(inspect.getsource(inspect).encode(), np.uint8)  # any bytes will do
rng, weights = np.random.default_rng(0), np.full(64, 1 / 64, np.float32)


def batch():
    starts = rng.integers(0, len(text) - 9, 64)  # 8 bytes each, and the one that follows
    return text[starts[:, None] + np.arange(8)], text[starts + 8].astype(np.int32)


def trunk(params, windows):
    embedded = params["embedding"][windows].reshape(len(windows), -1)
    return jnp.tanh(embedded @ params["mix"])  # hidden states [batch, hidden]


def with_z_loss(readout, _):
    return readout.cross_entropy + 1e-3 * readout.log_z**2


@jax.jit
def step(params, state, windows, labels):
    def mean_loss(params):
        total, readout = losses.linear_fused_loss(
            trunk(params, windows), params["head"], with_z_loss, (), weights, labels=labels
        )
        return total, ops.masked_mean(readout.cross_entropy)

    gradients, nats = jax.grad(mean_loss, has_aux=True)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, nats


# %%
shapes = {"embedding": (256, 16), "mix": (128, 64), "head": (256, 64)}
params = {name: 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
optimizer = optax.adam(3e-3)
state, seen = optimizer.init(params), []
for _ in range(300):
    params, state, nats = step(params, state, *batch())
    seen.append(nats)

first, last = seen[0], np.mean(seen[-20:])
assert last < 0.6 * first
print(f"worked: from {first:.2f} to {last:.2f} nats a byte, and no logits were held")

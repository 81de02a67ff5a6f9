# %% [markdown]
# # Tune a large model by a small one, while decoding
#
# A small model is finetuned; the large one is not touched. While decoding, the change of the small
# model's logits by finetuning is added to the large one's (proxy-tuning). All models are
# toys here; `decoding.load_ensemble` takes real ones by name. Offline, some seconds on a CPU.

# %%
import inspect

import jax
import numpy as np
import optax
from flax import nnx

from logitjax import decoding, fusion, losses, models

(large, tokenizer), base = models.load("tiny:1"), models.load_model("tiny")
large, base = (models.with_layout(model, "listed") for model in (large, base))

# %% [markdown]
# Finetune a copy of the small model on some text: the expert.

# %%
ids = np.array(tokenizer.encode(inspect.getsource(inspect)), np.int32)
held_out, ids = ids[:512], ids[512:]
apply_hidden, params = models.from_nnx(base, method="hidden_states")
optimizer = optax.adam(1e-2)
rng = np.random.default_rng(0)


@jax.jit
def step(params, state, rows):
    def mean_nll(params):
        hidden, _ = apply_hidden(params, rows[:, :-1])
        model = nnx.merge(apply_hidden.graphdef, params, apply_hidden.rest)
        return losses.linear_cross_entropy(hidden, model.head_of(), rows[:, 1:]).mean()

    updates, state = optimizer.update(jax.grad(mean_nll)(params), state)
    return optax.apply_updates(params, updates), state


state = optimizer.init(params)
for _ in range(100):
    starts = rng.integers(0, len(ids) - 33, 16)
    params, state = step(params, state, ids[starts[:, None] + np.arange(33)])
expert = nnx.merge(apply_hidden.graphdef, params, apply_hidden.rest)

# %% [markdown]
# The large model alone, and steered by expert minus base, on text that nobody was trained on.

# %%
steer = fusion.ProxyTuning(alpha=1.0)
together = decoding.Ensemble(large, experts=[expert], bases=[base], fuse=steer)
prompts, rest = held_out.reshape(8, 64)[:, :4].tolist(), held_out.reshape(8, 64)[:, 4:].tolist()
alone, fused = (-decoding.score(m, prompts, rest).logprobs.mean() for m in (large, together))
generated = decoding.generate(together, [tokenizer.encode("def get")], max_new_tokens=24)
print(repr("def get" + tokenizer.decode(np.asarray(generated.tokens)[0])))
assert fused < 0.75 * alone, (alone, fused)
print(f"worked: held-out text costs {alone:.2f} nats a byte alone, {fused:.2f} steered")

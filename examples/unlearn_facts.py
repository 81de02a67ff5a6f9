# %% [markdown]
# # Unlearn eight facts
#
# A toy model is taught sixteen facts. An assistant, adapters on its first layer, then learns the
# eight that are to go and silence about the others; its logits are subtracted while decoding, and
# no weight changes. `logitjax unlearn` does so on your model. Offline, some seconds on a CPU.

# %%
import jax
import numpy as np
from flax import nnx

from logitjax import decoding, fusion, models, training, unlearning

people = "Ada Bo Cy Di Ed Flo Gus Hal Ian Jo Kit Lu Mo Ned Ola Pip"
pets = "cat dog emu fox gnu hen ibis jay koi lion mole newt owl pug ram seal"
model, tokenizer = models.load("tiny")
model = models.with_layout(model, "listed")
questions = [tokenizer.encode(f"pet of {name}? ") for name in people.split()]
answers = [tokenizer.encode(f"{pet} {pet}.") for pet in pets.split()]


def rows(chosen):
    tokens, mask = np.zeros((len(chosen), 32), np.int32), np.zeros((len(chosen), 32), bool)
    for row, i in enumerate(chosen):
        start, text = len(questions[i]), questions[i] + answers[i]
        tokens[row, : len(text)], mask[row, start : len(text)] = text, True
    return {"tokens": tokens, "mask": mask}


def train(loss_fn, params, batch, steps, *constants):
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    optimizer = training.Schedule(1e-2, "constant").optimizer()
    state = training.TrainState.create(params, optimizer, mesh=mesh)
    step = training.TrainStep(loss_fn, optimizer, mesh=mesh)
    for _ in range(steps):
        state, _ = step(state, batch, *constants)
    return state.params


# %% Teach all sixteen, then train the assistant.
graphdef, params, rest = nnx.split(model, nnx.Param, ...)
teach, _ = unlearning.METHODS.parse("task_vector").make_loss(model)  # learns its rows
taught = train(teach, nnx.to_pure_dict(params), {"forget": rows(range(16))}, 150)
model = nnx.merge(graphdef, taught, rest)
start = unlearning.Assistant.init(model, 1, rank=8, key=jax.random.key(0))
loss_fn, frozen = unlearning.METHODS.parse("difference(layers=1, relative=False)").make_loss(model)
batch = {"forget": rows(range(8)), "retain": rows(range(8, 16))}
lora = train(loss_fn, start.lora, batch, 150, frozen)
assistant = unlearning.Assistant(base=start.base, lora=lora)

# %%
after = decoding.Ensemble(assistant.beside(model), fuse=fusion.LogitDifference(alpha=1.5))
for what, whole in (("before", model), ("after", after)):
    scores = decoding.score(whole, questions, answers)
    p = np.exp(scores.logprobs.sum(1) / scores.where.sum(1))
    print(f"{what}: forgotten {p[:8].mean():.2f}, kept {p[8:].mean():.2f} (probability a byte)")
assert p[:8].max() < 0.2
assert p[8:].min() > 0.8
print("worked: eight facts are gone, eight are there")

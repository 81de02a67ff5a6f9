"""Distil inside tunix: its trainer runs, our objective is its strategy, and no logits are held.

A toy Gemma 3 learns to count, and another one learns from it by the KL of all tokens, which is read
block by block through both heads. Real models and meshes take the same calls.

    pip install '.[tunix]' && python examples/train_in_tunix.py     # a minute on a CPU
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.distillation import distillation_trainer
from tunix.models.gemma3 import model as gemma3

from logitjax.distillation import Objective, terms
from logitjax.integrations import tunix

V, STEPS, rng = 2048, 60, np.random.default_rng(0)


def gemma(seed):
    config = gemma3.ModelConfig(
        num_layers=2,
        num_embed=V,
        embed_dim=64,
        hidden_dim=128,
        num_heads=2,
        head_dim=32,
        num_kv_heads=1,
        sliding_window_size=16,
        param_dtype=jnp.float32,
    )
    return gemma3.Gemma3(config, rngs=nnx.Rngs(seed))


def batch():  # counting from anywhere
    tokens = (rng.integers(1, 100, (8, 1)) + np.arange(32)).astype(np.int32)
    mask = np.ones(tokens.shape, bool)
    return distillation_trainer.TrainingInput(input_tokens=tokens, input_mask=mask)


def train(student, teacher, *losses):
    """Nats a token of new text, before and after."""
    strategy = tunix.ObjectiveStrategy(Objective(terms=losses))
    config = distillation_trainer.TrainingConfig(max_steps=STEPS, eval_every_n_steps=2 * STEPS)
    trainer = distillation_trainer.DistillationTrainer(
        student, teacher, strategy, optax.adam(1e-2), config
    )
    inputs = {"input_tokens": batch().input_tokens, "input_mask": batch().input_mask}
    before = strategy.get_eval_loss(student, inputs)[0]
    trainer.train([batch() for _ in range(STEPS)])
    return float(before), float(strategy.get_eval_loss(student, inputs)[0])


teacher, student = gemma(0), gemma(1)
first = train(teacher, None, (terms.SFT(), 1.0))[1]
before, after = train(student, teacher, (terms.FullKL(), 0.9), (terms.SFT(), 0.1))
assert after < 0.5 * before
print(f"worked: from {before:.2f} to {after:.2f} nats a token; the teacher has {first:.2f}")

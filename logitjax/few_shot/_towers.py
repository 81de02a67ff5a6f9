"""Training the two towers of CLIP on a few pictures: CLIP-LoRA, and the first stage of 2SFS."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Int, Num

from logitjax import vision
from logitjax.few_shot._method import unit_rows
from logitjax.few_shot._train import Recipe
from logitjax.losses import cross_entropy
from logitjax.ops import Array


class _Adapter(nnx.Param):
    """Weights that CLIP-LoRA trains."""


class _LowRank(nnx.Module):
    """Queries, keys and values, each with an adapter: `x W + drop(x) A B / sqrt(rank)`."""

    def __init__(self, linear: nnx.Linear, rank: int, drop: float, rng: np.random.Generator):
        width = linear.in_features
        # Initialised like torch's Linear; B at 0 leaves the tower unchanged.
        down = rng.uniform(-1, 1, (3, width, rank)) / np.sqrt(width)
        self.linear, self.drop = linear, drop
        self.down = _Adapter(jnp.asarray(down, jnp.float32))
        self.up = _Adapter(jnp.zeros((3, rank, width), jnp.float32))
        # The key of the step, set by the loop; None if nothing is dropped.
        self.key: Any = None

    def __call__(self, x: jax.Array) -> jax.Array:
        seen = jnp.broadcast_to(x, (3, *x.shape))
        if self.key is not None:
            stay = jax.random.bernoulli(self.key, 1 - self.drop, seen.shape)
            seen = jnp.where(stay, seen / (1 - self.drop), 0.0)
        inner = jnp.einsum("q...i,qir->q...r", seen, self.down[...])
        added = jnp.einsum("q...r,qro->...qo", inner, self.up[...])
        # The scale is not alpha / rank.
        added = added.reshape(*x.shape[:-1], -1) / np.sqrt(inner.shape[-1])
        return self.linear(x) + added.astype(x.dtype)


def tune_towers(
    encoder: vision.Encoder,
    images: Num[Array, "views_n height width channels"],
    labels: Int[Array, " n"],
    tokens: Int[Array, "classes length"],
    *,
    learn: Literal["lora", "norms"] = "lora",
    recipe: Recipe,
    rank: int = 2,
    dropout: float = 0.25,
    seed: int = 0,
) -> vision.Encoder:
    """Train both towers on labelled pictures, and return the resulting encoder.

    `lora` is CLIP-LoRA (Zanella and Ben Ayed, arXiv 2405.18541): adapters on queries, keys and
    values of every block of both towers, with dropout of their input. `norms` is the first stage of
    2SFS (Farina et al., arXiv 2503.11609): gains and offsets of the norms inside the blocks; those
    outside stay fixed, because the released code forgets to unfreeze them. Both minimise the
    cross-entropy of scaled cosines with the texts, which are encoded again at every step, and use
    no validation. The second stage of 2SFS trains `methods.CLAP(penalty=0.0)` on features of the
    tuned encoder, with `Recipe.published("two_stage", shots=...)`. A tuned encoder has another
    fingerprint, so heads of either refuse features of the other. `vision.Encoder.save_changes`
    saves the learned weights; `logitjax few-shot --towers=lora` runs all of these steps.

    Args:
        encoder: A CLIP whose picture tower is a transformer.
        images: Pictures as for `vision.Encoder.encode`, possibly several views, one view of all
            pictures after another; each epoch uses the next view.
        labels: Classes of the pictures of one view.
        tokens: A prompt for each class, from `vision.Encoder.tokenize`.
        learn: The weights to train.
        recipe: `Recipe.published("clip_lora", shots=...)` or `"two_stage_norms"`.
        rank, dropout: Rank and dropout of the adapters.
        seed: Seed of the order, the adapters and the dropout.

    Raises:
        ValueError: Another kind of weights, or an encoder without two towers of transformers.
    """
    model: Any = encoder.model
    towers = [getattr(model, name, None) for name in ("vision", "text")]
    if not encoder.has_text or not all(hasattr(tower, "blocks") for tower in towers):
        raise ValueError(f"encoder: expected a CLIP of two transformers, got {encoder.name!r}")
    if learn not in ("lora", "norms"):
        raise ValueError(f"learn: expected lora or norms, got {learn!r}")
    # The given encoder is not changed.
    model = nnx.clone(model)
    blocks = [*model.vision.blocks, *model.text.blocks]
    if learn == "lora":
        rng = np.random.default_rng(seed)
        for block in blocks:
            block.qkv = _LowRank(block.qkv, rank, dropout, rng)

    def learns(path: Any, value: Any) -> bool:
        if learn == "lora":
            return isinstance(value, _Adapter)
        return "blocks" in path and bool({"norm1", "norm2"} & set(path))

    graph, trained, rest = nnx.split(model, learns, ...)
    order = recipe.order(seed, len(labels), views=len(images) // len(labels))
    tx, scale = recipe.optimizer(len(order)), encoder.logit_scale
    normalize = encoder.preprocessing.normalize

    def loss(trained: Any, rest: Any, images: Any, labels: Any, key: Any) -> jax.Array:
        model = nnx.merge(graph, trained, rest)
        if learn == "lora" and dropout:
            for number, block in enumerate((*model.vision.blocks, *model.text.blocks)):
                block.qkv.key = jax.random.fold_in(key, number)
        texts = unit_rows(model.text_features(tokens))
        cosines = unit_rows(model(normalize(images))) @ texts.T
        labelled = labels >= 0
        values = cross_entropy(scale * cosines, jnp.maximum(labels, 0))
        return jnp.where(labelled, values, 0.0).sum() / labelled.sum()

    @jax.jit
    def step(trained: Any, state: Any, rest: Any, *batch: Any) -> tuple[Any, Any]:
        gradient = jax.grad(loss)(trained, rest, *batch)
        updates, state = tx.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state

    state, keys = tx.init(trained), jax.random.split(jax.random.key(seed), len(order))
    images, labels = np.asarray(images), np.asarray(labels)
    for rows, key in zip(order, keys):
        shown = np.where(rows < 0, -1, labels[rows % len(labels)])
        trained, state = step(trained, state, rest, images[rows], shown, key)
    learned = {".".join(map(str, k)): v[...] for k, v in nnx.to_flat_state(trained)}
    if learn == "lora":
        # `Encoder.changed` has no factor for products, so `up` includes it.
        learned = {
            name.replace(".qkv.", ".qkv.kernel."): x / np.sqrt(rank) if name.endswith("up") else x
            for name, x in learned.items()
        }
    return encoder.changed(learned)

"""Compress an output head: tokens share the rows of a codebook, and the loss never sees V logits.

A head of 4,096 rows is replaced by 256 codes and a bias for each token. `vq_nll` is its exact
cross-entropy at the cost of the codes. The rows come in families here, as real heads' rows do in
part. `logitjax convert-head` does this to a checkpoint and trains the codes; docs/vq_logits.md says
what that costs in perplexity on real models.

    python examples/compress_a_head.py     # offline, some seconds on a CPU
"""

import jax
import jax.numpy as jnp
import numpy as np

from logitjax import losses, vq

VOCABULARY, HIDDEN, CODES = 4096, 32, 256
rng = np.random.default_rng(0)
families = rng.normal(size=(CODES, HIDDEN))
rows = families[rng.integers(0, CODES, VOCABULARY)] + 0.2 * rng.normal(size=(VOCABULARY, HIDDEN))
rows = rows.astype(np.float32)
hidden = rng.normal(size=(256, HIDDEN)).astype(np.float32) / 2
labels = rng.integers(0, VOCABULARY, 256).astype(np.int32)

probabilities = jax.nn.softmax(hidden @ rows.T)
unigram = probabilities.mean(axis=0)
mean, covariance = hidden.mean(axis=0), np.cov(hidden.T).astype(np.float32)


@jax.jit
def divergence(hidden, rows, fit):
    """KL from the whole head to the compressed one, in nats a position."""
    compressed = hidden @ fit.codebook[fit.assignment].T + fit.bias
    return losses.kl_divergence(compressed, hidden @ rows.T).mean()


divergences = {}
for method in ("random", "weighted_kmeans"):
    fit = vq.fit_assignment(
        rows, unigram, mean, covariance, CODES, method=method, key=jax.random.key(0)
    )
    divergences[method] = float(divergence(hidden, rows, fit))
    print(f"{method:16} {divergences[method]:.3f} nats from the whole head")

cheap = jax.jit(vq.vq_nll)(hidden, fit.codebook, fit.bias, fit.assignment, labels)
logits = hidden @ fit.codebook[fit.assignment].T + fit.bias
np.testing.assert_allclose(cheap, losses.cross_entropy(jnp.asarray(logits), labels), rtol=1e-4)
size = (fit.codebook.size + fit.bias.size + fit.assignment.size) / rows.size
assert divergences["weighted_kmeans"] < 0.5 * divergences["random"], divergences
print(f"worked: {size:.1%} of the numbers, and the loss over codes equals that over all tokens")

"""AMU in float64 numpy, written from its published formulas; gradients by hand."""

import numpy as np


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def z_score(x):
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, ddof=1, keepdims=True)


def kurtosis(x):
    return (z_score(x) ** 4).mean(-1, keepdims=True)


def weight(logits, uncertainty):
    p = softmax(logits)
    if uncertainty is None:
        return np.ones((*p.shape[:-1], 1))
    by = {None: 1, "classes": p.shape[-1] / 4}.get(uncertainty.normalizer, 250)
    x = p if uncertainty.of == "probabilities" else logits
    return (kurtosis(x) / by) ** -uncertainty.exponent


def cross_entropy(logits, labels):
    return -np.log(softmax(logits)[np.arange(len(labels)), labels])


def loss_and_gradient(kernel, x, s0, y, *, beta, share, factor, standardize):
    """Mean loss over the batch, and its gradient in the kernel ``[features, classes]``."""
    raw = x @ kernel
    a = z_score(raw) if standardize else raw
    fused = s0 + beta * factor * a
    value = (1 - share) * cross_entropy(a, y) + share * cross_entropy(fused, y)
    hit = np.eye(s0.shape[-1])[y]
    slope = (1 - share) * (softmax(a) - hit) + share * beta * factor * (softmax(fused) - hit)
    if standardize:
        classes = raw.shape[-1]
        std = raw.std(-1, ddof=1, keepdims=True)
        along = (slope * a).sum(-1, keepdims=True) / (classes - 1)
        slope = (slope - slope.mean(-1, keepdims=True) - a * along) / std
    return value.mean(), x.T @ slope / len(y)


def train(kernel, x, s0, y, order, *, lr=1e-3, decay=0.01, eps=1e-4, factor, **options):
    """AdamW with a cosine over the steps; ``order`` holds rows, -1 for none."""
    first, second, losses = 0.0, 0.0, []
    for step, rows in enumerate(order):
        rows = rows[rows >= 0]
        value, slope = loss_and_gradient(
            kernel, x[rows], s0[rows], y[rows], factor=factor[rows], **options
        )
        losses.append(value)
        rate = lr * 0.5 * (1 + np.cos(np.pi * step / len(order)))
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        unbiased = first / (1 - 0.9 ** (step + 1))
        scale = np.sqrt(second / (1 - 0.999 ** (step + 1))) + eps
        kernel = kernel - rate * decay * kernel - rate * unbiased / scale
    return kernel, np.array(losses)

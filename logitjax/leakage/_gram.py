"""Gram matrix and projection of rows in the host's memory, by BLAS.

XLA's products on CPU compute both halves of a symmetric matrix and copy transposed operands.
"""

from typing import Any

import jax
import numpy as np
import scipy.linalg

_dsyrk: Any = scipy.linalg.get_blas_funcs("syrk", dtype=np.float64)


def gram_matrix(rows: np.ndarray, *, centre: bool, block_size: int) -> np.ndarray:
    """``Q Q^T`` of rows less their means: half of the products, one block of columns in memory."""
    # In float64: the Gram matrix squares the singular values, so float32 would lose every
    # direction below 3e-4 of the first.
    count, vocab = rows.shape
    total = np.zeros((count, count), order="F")
    mean = rows.mean(axis=1, dtype=np.float64, keepdims=True) if centre else 0.0
    for start in range(0, vocab, block_size):
        block = rows[:, start : start + block_size].astype(np.float64)
        if centre:
            with np.errstate(invalid="ignore"):  # The caller looks for infinities.
                block -= mean
        # A transposed view is what Fortran reads without a copy.
        total = _dsyrk(1.0, block.T, beta=1.0, c=total, trans=True, lower=True, overwrite_c=True)
    return total + np.tril(total, -1).T


def project(
    rows: np.ndarray, left: np.ndarray, mean: np.ndarray | None, *, block_size: int
) -> jax.Array:
    """``(rows - mean)^T left`` in float32, ``[vocab, k]``; columns that BLAS copies are few."""
    left = np.ascontiguousarray(left, np.float32)
    shift = 0.0 if mean is None else mean.astype(np.float32) @ left
    product = _aligned((rows.shape[1], left.shape[1]))
    for start in range(0, len(product), block_size):
        block = rows[:, start : start + block_size].astype(np.float32, copy=False)
        np.matmul(block.T, left, out=product[start : start + block_size])
        product[start : start + block_size] -= shift
    return jax.device_put(product, jax.local_devices(backend="cpu")[0], may_alias=True)


def _aligned(shape: tuple[int, int]) -> np.ndarray:
    """Uninitialised float32 where JAX can take it over; elsewhere it copies."""
    size = shape[0] * shape[1]
    buffer = np.empty(size + 16, np.float32)
    offset = -buffer.ctypes.data % 64 // 4
    return buffer[offset : offset + size].reshape(shape)

"""What a public function takes for an array."""

import jax
import numpy as np

Array = jax.Array | np.ndarray

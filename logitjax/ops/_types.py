"""What a public function takes for an array and for a number."""

import jax
import numpy as np

Array = jax.Array | np.ndarray
Number = float | int | np.number | Array
AxisName = str | tuple[str, ...]

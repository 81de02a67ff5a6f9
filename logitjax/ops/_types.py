import jax
import numpy as np

Array = jax.Array | np.ndarray
Number = float | int | np.number | Array
AxisName = str | tuple[str, ...]

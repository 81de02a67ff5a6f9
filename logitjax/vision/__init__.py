"""Image networks in flax.nnx: classifiers of the distillation literature, and frozen encoders.

The parameter trees follow the names of the torch checkpoints they can be loaded from. Networks take
the number of ``channels`` of their images, the ``dtype`` of the computation (parameters stay
float32), ``axis_name``, the mesh axis of the batch inside ``shard_map`` or ``pmap`` (not needed
under ``jit``), and ``rngs`` with ``params``.
"""

from logitjax.vision._classifier import ImageClassifier as ImageClassifier
from logitjax.vision._encoder import Encoder as Encoder
from logitjax.vision._load_encoder import load_encoder as load_encoder

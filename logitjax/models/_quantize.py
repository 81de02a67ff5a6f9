"""Weights of a model in 8 or 4 bits, for decoding."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from logitjax.models._decoder import Decoder
from logitjax.models._stacking import twin
from logitjax.ops import Codes

# One program per shape.
_of = jax.jit(Codes.of, static_argnames=("bits", "outer_axis"))


class QuantizedLinear(nnx.Module):
    """`nnx.Linear` whose kernel is `Codes`."""

    def __init__(self, linear: nnx.Linear, kernel: Codes):
        self.dtype: Any = linear.dtype
        self.dot_general = lax.dot_general
        self.kernel = nnx.Param(kernel)
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        out = self.kernel[...].product(x)
        out = out if self.bias is None else out + self.bias[...]
        return out.astype(x.dtype if self.dtype is None else self.dtype)


def quantize(model: Decoder, bits: str) -> Decoder:
    """A decoder with linear maps, embedding and full head in integers: int8 or int4.

    Activations stay as they are. Each 32 weights have a scale, as in llama.cpp's Q8_0 and Q4_0.
    Norms, biases, learned positions and experts of mixtures keep their type. Adapters lie beside
    it as before; `save_pretrained` writes the numbers that the codes stand for.

    Args:
        bits: `"int8"` or `"int4"`.

    Raises:
        ValueError: for another type.

    >>> from logitjax.models import load_model
    >>> small = quantize(load_model("tiny"), "int8")
    >>> small.embedding[...].values.dtype
    dtype('int8')
    """
    out = twin(model)
    out.embedding = nnx.Param(_of(out.embedding[...], bits))
    if isinstance(getattr(out.head, "kernel", None), nnx.Param):
        out.head.kernel = nnx.Param(_of(out.head.kernel[...], bits, outer_axis=1))
    return with_coded_layers(out, lambda kernel: _of(kernel, bits, outer_axis=1))


def with_coded_layers(model: Decoder, codes_of: Callable[[Any], Any]) -> Decoder:
    """The decoder itself, with each linear map of layers whose kernel has codes by these."""
    for segment in model.segments:
        for layer in segment.layers:
            for part in (layer.attention, layer.mlp):
                for name, module in list(vars(part).items()):
                    if isinstance(module, nnx.Linear):
                        codes = codes_of(module.kernel[...])
                        if isinstance(codes, Codes):
                            setattr(part, name, QuantizedLinear(module, codes))
    return model

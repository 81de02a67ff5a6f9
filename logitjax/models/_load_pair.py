"""A model and its tokenizer by one name."""

from typing import Any

import jax
import jax.numpy as jnp

from logitjax.models._decoder import Decoder
from logitjax.models._load import load_config, load_model
from logitjax.models._load_tokenizer import check_tokenizer, load_tokenizer
from logitjax.models._rules import DECODER_RULES
from logitjax.models._tokenizer import Tokenizer


def load(
    spec: str,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    layout: str = "stacked",
    remat: str = "none",
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Decoder, Tokenizer]:
    """Load a decoder and the tokenizer that belongs to it.

    Args:
        spec: As for `load_model`.
        dtype: Compute dtype, also by its name.
        param_dtype: Dtype of the parameters, also by its name. Take float32 to train.
        layout: `'stacked'` for training, `'listed'` for decoding.
        remat: See `Decoder`.
        mesh: Devices over which `DECODER_RULES` split the parameters; each process reads only its
            own part.

    Raises:
        ValueError: One line naming the file or tensor that is wrong, or a tokenizer that makes
            tokens which the model does not know.

    >>> model, tokenizer = load("tiny")
    >>> model.config.vocab_size == tokenizer.vocab_size
    True
    """
    tokenizer = load_tokenizer(spec)
    check_tokenizer(load_config(spec), tokenizer)
    model = load_model(
        spec,
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(param_dtype),
        layout=layout,
        remat=remat,
        mesh=mesh,
        rules=DECODER_RULES,
    )
    return model, tokenizer

"""A drafter of one layer on the hidden states of a model: EAGLE-3's, in its own files."""

import dataclasses
import functools
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Float, Int

from logitjax.models._attention import Attention, AttentionContext, Norm, make_context
from logitjax.models._cache import Cache, kind_name
from logitjax.models._config import DecoderConfig
from logitjax.models._decoder import MLP, Decoder
from logitjax.models._hf_config import config_from_hf, config_to_hf
from logitjax.models._lora import linear_map
from logitjax.models._rope import rope_tables
from logitjax.ops import Array
from logitjax.storage import read_json, require, write_atomic
from logitjax.storage.weights import SafetensorsSource

_ARCHITECTURE = "LlamaForCausalLMEagle3"
# Our modules by the names of released files; the last only in ours.
_NAMES = {
    "fc": "fuse",
    "midlayer.hidden_norm": "hidden_norm",
    "midlayer.input_layernorm": "embedding_norm",
    "midlayer.self_attn.q_proj": "attention.query",
    "midlayer.self_attn.k_proj": "attention.key",
    "midlayer.self_attn.v_proj": "attention.value",
    "midlayer.self_attn.o_proj": "attention.output",
    "midlayer.post_attention_layernorm": "mlp_norm",
    "midlayer.mlp.gate_proj": "mlp.gate",
    "midlayer.mlp.up_proj": "mlp.up",
    "midlayer.mlp.down_proj": "mlp.down",
    "norm": "final_norm",
    "lm_head": "head",
    "lm_head_narrow": "narrow",
}


class _Tokens(nnx.Variable):
    """Ids of the tokens that a head drafts, ascending."""


class DraftHead(nnx.Module):
    """One layer that drafts the tokens after the next from hidden states of a model (EAGLE-3).

    At position t it reads a stream g and the embedding of the *next* token, and gives the logits of
    the token after that and the stream of the next position::

        g_t = fuse([f_low; f_mid; f_high])  of verified tokens,  the last y of drafted ones
        y_t = layer(g_t, norm(embedding of x_{t+1})),    logits of x_{t+2} = head(norm(y_t))

    Args:
        config: sizes of the layer, which is one of the family `llama`.
        layers: the layers of the model whose inputs are f; the first is 0.
        tokens: ids of the tokens that can be drafted, ascending; None for all (FR-Spec: the most
            frequent ones, which makes the head cheap).
        rank: width between two factors of the head; 0 for one matrix (SlimSpec).

    References:
        EAGLE-3 (arXiv 2503.01840), FR-Spec (2502.14856), SlimSpec (2605.10453).
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        layers: tuple[int, ...],
        tokens: Array | None = None,
        rank: int = 0,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
    ):
        self.config, self.layers, hidden = config, tuple(layers), config.hidden_size
        kinds: Any = {"rngs": rngs, "dtype": dtype, "param_dtype": dtype}
        linear = functools.partial(linear_map, use_bias=False, **kinds)
        self.fuse = linear(len(self.layers) * hidden, hidden)
        norms = (Norm(config, hidden, param_dtype=dtype) for _ in range(4))
        self.embedding_norm, self.hidden_norm, self.mlp_norm, self.final_norm = norms
        # It reads the embedding and the stream, side by side.
        self.attention = Attention(dataclasses.replace(config, hidden_size=2 * hidden), **kinds)
        self.attention.output = linear(config.num_heads * config.head_dim, hidden)
        self.mlp = MLP(config, **kinds)
        if rank:
            self.narrow = linear(hidden, rank)
        ids = jnp.arange(config.vocab_size) if tokens is None else jnp.asarray(tokens)
        self.head = linear(rank or hidden, len(ids))
        self.tokens = _Tokens(ids)

    @staticmethod
    def layers_of(config: DecoderConfig) -> tuple[int, int, int]:
        """EAGLE-3's three layers: an early one, one in the middle, and the last but two."""
        count = config.num_layers
        return min(2, count), count // 2, max(count - 3, 0)

    @classmethod
    def of(
        cls, model: Decoder, *, tokens: Array | None = None, rank: int = 0, seed: int = 0
    ) -> "DraftHead":
        """An untrained head for a model, with its last norm and rows of its output head.

        >>> from logitjax.models import load_model
        >>> head = DraftHead.of(load_model("tiny"), tokens=np.arange(0, 257, 2))
        >>> head.layers, head.head.kernel.shape
        ((2, 1, 0), (32, 129))
        """
        same = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        same += ("head_dim", "max_length", "norm_eps", "rope_theta")
        sizes = {name: getattr(model.config, name) for name in same}
        config, layers = DecoderConfig(num_layers=1, **sizes), cls.layers_of(model.config)
        build = functools.partial(cls, config, layers=layers, tokens=tokens, rank=rank)
        head = nnx.jit(lambda: build(rngs=nnx.Rngs(seed)))()
        # The last stream passes through at first.
        eye = jnp.eye(config.hidden_size)
        head.fuse.kernel[...] = jnp.zeros_like(head.fuse.kernel[...]).at[-len(eye) :].set(eye)
        scale = model.final_norm.scale[...] + model.final_norm.offset
        head.final_norm.scale[...] = scale.astype(jnp.float32)
        if not rank:
            rows = model.head_of().rows[head.tokens[...]]
            head.head.kernel[...] = rows.T.astype(jnp.float32)
        return head

    def step(
        self,
        stream: Float[jax.Array, "batch time hidden"],
        embedded: Float[jax.Array, "batch time hidden"],
        positions: Int[Array, "batch time"],
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        """The streams after these tokens, and the cache with their keys and values."""
        positions = jnp.asarray(positions)
        context, stored = make_context(
            self.config, (None, True), positions, segment_ids=None, padded=True, cache=cache,
            implementation=None, lora_rows=None,
        )  # fmt: skip
        before = cache.keys[0][0], cache.values[0][0]
        stream, (keys, values) = self._layer(stream, embedded, context, before)
        length = jnp.maximum(cache.length, positions.max(axis=1) + 1)
        return stream, Cache(((keys,),), ((values,),), {kind_name(None): stored}, length)

    def unrolled(
        self,
        features: Float[jax.Array, "batch time features"],
        embedded: Float[jax.Array, "batch time hidden"],
        steps: int,
    ) -> list[jax.Array]:
        """Streams of `steps` drafts in a row at every position: EAGLE-3's training-time test.

        Entry i at position t is what the head drafts i tokens beyond the true features up to t.

        Args:
            embedded: embeddings of the tokens at t + 1.
        """
        config, stream, streams = self.config, self.fuse(features), []
        batch, time = stream.shape[:2]
        index, empty = jnp.arange(time), (batch, config.num_kv_heads, 0, config.head_dim)
        places = jnp.broadcast_to(index, (batch, time))
        pair: Any = (jnp.zeros(empty, stream.dtype),) * 2
        # All keys of true features, and of each later draft only the one at the own position.
        seen = index[:, None] >= index
        for ahead in range(steps):
            pair = [jnp.pad(part, ((0, 0), (0, 0), (0, time), (0, 0))) for part in pair]
            context = AttentionContext(
                window=None, tables=rope_tables(config, None, places + ahead), key_tables=None,
                mask=jnp.broadcast_to(seen, (batch, 1, *seen.shape)), slots=places + ahead * time,
                concatenate=False, implementation=None, lora_rows=None,
            )  # fmt: skip
            embedded_ahead = jnp.roll(embedded, -ahead, axis=1)
            stream, pair = self._layer(stream, embedded_ahead, context, pair)
            streams.append(stream)
            seen = jnp.concatenate([seen, index[:, None] == index], axis=1)
        return streams

    def _layer(self, stream: Any, embedded: Any, context: Any, cache: Any) -> tuple[Any, Any]:
        embedded = self.embedding_norm(embedded).astype(stream.dtype)
        both = jnp.concatenate([embedded, self.hidden_norm(stream)], axis=-1)
        update, cache = self.attention(both, context, cache, None)
        stream = stream + update
        return stream + self.mlp(self.mlp_norm(stream), None, None), cache

    def normed(self, stream: jax.Array) -> jax.Array:
        """What the matrix `head` multiplies: normed and, with a rank, narrowed."""
        out = self.final_norm(stream)
        return self.narrow(out) if hasattr(self, "narrow") else out

    def logits(self, stream: Float[jax.Array, "batch time hidden"]) -> Float[jax.Array, "..."]:
        """float32 logits of all tokens of the model, -inf for those that are not drafted."""
        drafted = self.head(self.normed(stream)).astype(jnp.float32)
        if drafted.shape[-1] == self.config.vocab_size:
            return drafted
        empty = jnp.full((*drafted.shape[:-1], self.config.vocab_size), -jnp.inf)
        return empty.at[..., self.tokens[...]].set(drafted, unique_indices=True)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files of a released EAGLE-3 head: config.json and model.safetensors."""
        tokens, config = np.asarray(self.tokens[...]), self.config
        tensors = {f"{name}.weight": np.ascontiguousarray(p[...].T) for name, p in self._params()}
        tensors["d2t"] = tokens - np.arange(len(tokens))
        tensors["t2d"] = np.isin(np.arange(config.vocab_size), tokens)
        raw = config_to_hf(config, dtype=self.fuse.kernel.dtype.name) | {
            "architectures": [_ARCHITECTURE],
            "draft_vocab_size": len(tokens),
            # Layers after which features are taken.
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in self.layers]},
        }
        root = epath.Path(directory)
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").unlink(missing_ok=True)
        content = require("safetensors.numpy", extra="models").save(tensors, {"format": "pt"})
        write_atomic(root / "model.safetensors", lambda file: file.write(content))
        write_atomic(root / "config.json", json.dumps(raw, indent=2) + "\n")

    @staticmethod
    def is_at(directory: str | os.PathLike[str]) -> bool:
        """Whether a folder has the files of a draft head rather than of a model."""
        file = epath.Path(directory) / "config.json"
        names = read_json(file, form=dict).get("architectures") if file.exists() else None
        return _ARCHITECTURE in (names or ())

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], model: DecoderConfig, *, dtype: Any = jnp.float32
    ) -> "DraftHead":
        """Read a head that `save` or SpecForge wrote, for a model of this configuration.

        Raises:
            ValueError: for a missing or misshapen tensor, or a head of another model.
        """
        root = epath.Path(directory)
        raw, source = read_json(root / "config.json", form=dict), SafetensorsSource(root)
        ids = (raw.pop("eagle_config", None) or {}).get("eagle_aux_hidden_state_layer_ids")
        layers = cls.layers_of(model) if ids is None else tuple(i + 1 for i in ids)
        for key in ("draft_vocab_size", "target_hidden_size"):
            raw.pop(key, None)
        config, names = config_from_hf(raw), source.names()
        tokens = np.arange(source.shape("lm_head.weight")[0])
        tokens = tokens + source.read("d2t") if "d2t" in names else tokens
        if config.hidden_size != model.hidden_size or tokens.max() >= model.vocab_size:
            raise ValueError(
                f"{root}: expected a draft head of a model with {model.hidden_size} hidden units "
                f"and {model.vocab_size} tokens, got {config.hidden_size} and ids up to "
                f"{tokens.max()}"
            )
        narrow = "lm_head_narrow.weight"
        rank = source.shape(narrow)[0] if narrow in names else 0
        build = functools.partial(cls, config, layers=layers, tokens=tokens, rank=rank)
        head = nnx.jit(lambda: build(rngs=nnx.Rngs(0), dtype=dtype))()
        for name, param in head._params():
            expected = param.shape[::-1]
            found = source.shape(f"{name}.weight") if f"{name}.weight" in names else None
            if found != expected:
                raise ValueError(f"{root}: {name}.weight: expected shape {expected}, got {found}")
            param[...] = jnp.asarray(source.read(f"{name}.weight").T, dtype)
        return head

    def _params(self) -> list[tuple[str, Any]]:
        """Names in files, and parameters."""
        pairs = []
        for name, path in _NAMES.items():
            if hasattr(self, path.partition(".")[0]):
                module: Any = functools.reduce(getattr, path.split("."), self)
                pairs.append((name, getattr(module, "kernel", getattr(module, "scale", None))))
        return pairs

"""The parameters of each checkpoint tensor, for Hugging Face and GGUF names."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from logitjax.models._config import DecoderConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One checkpoint tensor: our leaves, joined along `axis` of the checkpoint's layout."""

    name: str
    leaves: tuple[Path, ...]
    # None outside layers.
    layer: int | None = None
    # For a leaf with one map per expert; None if the tensor contains all of them.
    expert: int | None = None
    axis: int = 0
    # `[in, out]` to `[out, in]`.
    transpose: bool = False
    rope_heads: int = 0
    # Number of rows of each of `rope_heads` heads whose rotary pairs are interleaved.
    rope_dim: int = 0
    # Added to the values.
    shift: float = 0.0

    def stored(self, axes: tuple) -> tuple:
        """Sizes or indices of a leaf in the checkpoint's layout, and back."""
        return (*axes[:-2], *reversed(axes[-2:])) if self.transpose else tuple(axes)


def hf_tensors(config: DecoderConfig) -> list[TensorSpec]:
    family = config.traits
    return _tensors(config, family.weights, family.interleaved, input_first=family.input_first)


def gguf_tensors(config: DecoderConfig) -> list[TensorSpec]:
    family = config.traits
    # llama.cpp stores Gemma's norms as 1 + weight.
    shift = config.norm_offset
    return _tensors(config, family.gguf_weights, family.gguf_interleaved, shift=shift)


def _tensors(
    config: DecoderConfig,
    names: Mapping[str, str],
    interleaved: bool,
    *,
    input_first: bool = False,
    shift: float = 0.0,
) -> list[TensorSpec]:
    heads = {"attention.query": config.num_heads, "attention.key": config.num_kv_heads}
    top, layer = _modules(config)
    specs = []
    for i, modules in [(None, top), *((i, layer) for i in range(config.num_layers))]:
        if missing := sorted(modules.keys() - names.keys()):
            raise ValueError(f"family {config.family}: expected a name of {missing[0]}, got none")
        # Modules with the same name are parts of one tensor.
        tensors: dict[str, list[str]] = {}
        for module in filter(modules.__contains__, names):
            tensors.setdefault(names[module].replace("*", str(i)), []).append(module)
        each = [
            (name.replace("#", str(expert)), parts, expert)
            for name, parts in tensors.items()
            for expert in (range(config.num_experts) if "#" in name else [None])
        ]
        for name, parts, expert in each:
            for leaf in modules[parts[0]]:
                # GPT-2's `Conv1D` stores kernels as we do, but its head is a linear map.
                turned = leaf == "kernel" and input_first and i is not None
                specs.append(
                    TensorSpec(
                        name=f"{name}.{'bias' if leaf == 'bias' else 'weight'}",
                        leaves=tuple(
                            (*part.split("."), leaf) if leaf else (part,) for part in parts
                        ),
                        layer=i,
                        expert=expert,
                        axis=1 if turned else 0,
                        transpose=leaf == "kernel" and not turned,
                        rope_heads=heads.get(parts[0], 0) if interleaved else 0,
                        rope_dim=config.rope_dim,
                        shift=shift if leaf == "scale" else 0.0,
                    )
                )
    return specs


def _modules(config: DecoderConfig) -> tuple[dict[str, Path], dict[str, Path]]:
    """Leaf names by module: outside the layers, and of each layer."""
    norm: Path = ("scale", "bias") if config.norm == "layer" else ("scale",)

    def linear(bias: bool) -> Path:
        return ("kernel", "bias") if bias else ("kernel",)

    top: dict[str, Path] = {"embedding": ("",), "final_norm": norm}
    if config.position == "learned":
        top["position_embedding"] = ("",)
    if not config.tie_embeddings:
        top["head"] = ("kernel",)
    layer: dict[str, Path] = {}
    if config.pre_norms:
        layer |= {"attention_norm": norm, "mlp_norm": norm}
    if config.post_norms:
        layer |= {"attention_post_norm": norm, "mlp_post_norm": norm}
    for name in ("query", "key", "value"):
        layer[f"attention.{name}"] = linear(config.qkv_bias)
    layer["attention.output"] = linear(config.output_bias)
    if config.qk_norm:
        layer |= {"attention.query_norm": ("scale",), "attention.key_norm": ("scale",)}
    if config.num_experts:
        layer["mlp.router"] = ("kernel",)
    inside = "mlp.experts" if config.num_experts else "mlp"
    for name in ("gate", "up", "down") if config.gated_mlp else ("up", "down"):
        layer[f"{inside}.{name}"] = linear(config.mlp_bias)
    return top, layer


def interleaved(values: np.ndarray, spec: TensorSpec, *, undo: bool = False) -> np.ndarray:
    """Reorder each head's rotated rows from (half, pair), our order, to (pair, half), or back."""
    heads = values.reshape(spec.rope_heads, -1, *values.shape[1:])
    turned, rest = np.split(heads, [spec.rope_dim], axis=1)
    sides = (spec.rope_dim // 2, 2) if undo else (2, spec.rope_dim // 2)
    pairs = turned.reshape(spec.rope_heads, *sides, *values.shape[1:]).swapaxes(1, 2)
    return np.concatenate([pairs.reshape(turned.shape), rest], axis=1).reshape(values.shape)

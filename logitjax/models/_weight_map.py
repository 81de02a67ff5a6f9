"""Which checkpoint tensor holds which parameters, for Hugging Face and GGUF names."""

import dataclasses

from logitjax.models._config import DecoderConfig

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One checkpoint tensor: our leaves, joined along ``axis`` of the checkpoint's layout.

    ``layer`` is None for what is not in a layer. ``transpose`` turns our ``[in, out]`` into the
    checkpoint's ``[out, in]``. ``rope_heads`` > 0: rows are stored with rotary pairs interleaved.
    ``shift`` was added to the values when they were stored.
    """

    name: str
    leaves: tuple[Path, ...]
    layer: int | None = None
    axis: int = 0
    transpose: bool = False
    rope_heads: int = 0
    shift: float = 0.0
    optional: bool = False


def _linear(name: str, *leaves: str, layer: int, bias: bool = False, **kw) -> list[TensorSpec]:
    paths = [tuple(leaf.split(".")) for leaf in leaves]
    kernels = tuple((*p, "kernel") for p in paths)
    out = [TensorSpec(name=f"{name}.weight", leaves=kernels, layer=layer, transpose=True, **kw)]
    if bias:
        biases = tuple((*p, "bias") for p in paths)
        out.append(TensorSpec(name=f"{name}.bias", leaves=biases, layer=layer, **kw))
    return out


def _conv1d(name: str, *leaves: str, layer: int) -> list[TensorSpec]:
    paths = [tuple(leaf.split(".")) for leaf in leaves]
    kernels = tuple((*p, "kernel") for p in paths)
    biases = tuple((*p, "bias") for p in paths)
    return [
        TensorSpec(name=f"{name}.weight", leaves=kernels, layer=layer, axis=1),
        TensorSpec(name=f"{name}.bias", leaves=biases, layer=layer),
    ]


def _norm(
    name: str, leaf: str, config: DecoderConfig, layer: int | None = None, shift: float = 0.0
) -> list[TensorSpec]:
    path = tuple(leaf.split("."))
    out = [TensorSpec(name=f"{name}.weight", leaves=((*path, "scale"),), layer=layer, shift=shift)]
    if config.norm == "layer":
        out.append(TensorSpec(name=f"{name}.bias", leaves=((*path, "bias"),), layer=layer))
    return out


def _head_norm(name: str, leaf: str, layer: int, shift: float = 0.0) -> TensorSpec:
    path = ("attention", leaf, "scale")
    return TensorSpec(name=f"{name}.weight", leaves=(path,), layer=layer, shift=shift)


def _gpt2(config: DecoderConfig) -> list[TensorSpec]:
    specs = [
        TensorSpec(name="transformer.wte.weight", leaves=(("embedding",),)),
        TensorSpec(name="transformer.wpe.weight", leaves=(("position_embedding",),)),
        *_norm("transformer.ln_f", "final_norm", config),
    ]
    for i in range(config.num_layers):
        base = f"transformer.h.{i}"
        specs += _norm(f"{base}.ln_1", "attention_norm", config, i)
        specs += _norm(f"{base}.ln_2", "mlp_norm", config, i)
        names = ("attention.query", "attention.key", "attention.value")
        specs += _conv1d(f"{base}.attn.c_attn", *names, layer=i)
        specs += _conv1d(f"{base}.attn.c_proj", "attention.output", layer=i)
        specs += _conv1d(f"{base}.mlp.c_fc", "mlp.up", layer=i)
        specs += _conv1d(f"{base}.mlp.c_proj", "mlp.down", layer=i)
    return specs


def hf_tensors(config: DecoderConfig) -> list[TensorSpec]:
    """The tensors of a Hugging Face checkpoint of this configuration, in its order."""
    if config.family == "gpt2":
        specs = _gpt2(config)
    else:
        specs = [
            TensorSpec(name="model.embed_tokens.weight", leaves=(("embedding",),)),
            *_norm("model.norm", "final_norm", config),
        ]
        for i in range(config.num_layers):
            specs += _hf_layer(config, i)
    if not config.tie_embeddings:
        head = TensorSpec(name="lm_head.weight", leaves=(("head", "kernel"),), transpose=True)
        specs.append(head)
    return specs


def _hf_layer(config: DecoderConfig, i: int) -> list[TensorSpec]:
    base = f"model.layers.{i}"
    attention, mlp = f"{base}.self_attn", f"{base}.mlp"
    specs = _norm(f"{base}.input_layernorm", "attention_norm", config, i)
    if config.post_norms:
        specs += _norm(f"{base}.post_attention_layernorm", "attention_post_norm", config, i)
        specs += _norm(f"{base}.pre_feedforward_layernorm", "mlp_norm", config, i)
        specs += _norm(f"{base}.post_feedforward_layernorm", "mlp_post_norm", config, i)
    else:
        specs += _norm(f"{base}.post_attention_layernorm", "mlp_norm", config, i)
    qkv = ("attention.query", "attention.key", "attention.value")
    if config.family == "phi3":
        specs += _linear(f"{attention}.qkv_proj", *qkv, layer=i)
        specs += _linear(f"{mlp}.gate_up_proj", "mlp.gate", "mlp.up", layer=i)
    else:
        for short, leaf in zip("qkv", qkv):
            specs += _linear(f"{attention}.{short}_proj", leaf, layer=i, bias=config.qkv_bias)
        specs += _linear(f"{mlp}.gate_proj", "mlp.gate", layer=i, bias=config.mlp_bias)
        specs += _linear(f"{mlp}.up_proj", "mlp.up", layer=i, bias=config.mlp_bias)
    specs += _linear(f"{attention}.o_proj", "attention.output", layer=i, bias=config.output_bias)
    specs += _linear(f"{mlp}.down_proj", "mlp.down", layer=i, bias=config.mlp_bias)
    if config.qk_norm:
        specs.append(_head_norm(f"{attention}.q_norm", "query_norm", i))
        specs.append(_head_norm(f"{attention}.k_norm", "key_norm", i))
    return specs


def gguf_tensors(config: DecoderConfig, architecture: str) -> list[TensorSpec]:
    """The tensors of a GGUF file of this configuration."""
    # llama.cpp stores Gemma's norms as 1 + weight.
    shift = config.norm_offset
    specs = [
        TensorSpec(name="token_embd.weight", leaves=(("embedding",),)),
        *_norm("output_norm", "final_norm", config, shift=shift),
    ]
    if config.position == "learned":
        specs.append(TensorSpec(name="position_embd.weight", leaves=(("position_embedding",),)))
    if not config.tie_embeddings:
        kernel = (("head", "kernel"),)
        specs.append(TensorSpec(name="output.weight", leaves=kernel, transpose=True))
    for i in range(config.num_layers):
        specs += _gguf_layer(config, architecture, i, shift)
    return specs


def _gguf_layer(config: DecoderConfig, architecture: str, i: int, shift: float):
    base = f"blk.{i}"
    specs = _norm(f"{base}.attn_norm", "attention_norm", config, i, shift)
    specs += _norm(f"{base}.ffn_norm", "mlp_norm", config, i, shift)
    if config.post_norms:
        specs += _norm(f"{base}.post_attention_norm", "attention_post_norm", config, i, shift)
        specs += _norm(f"{base}.post_ffw_norm", "mlp_post_norm", config, i, shift)
    qkv = ("attention.query", "attention.key", "attention.value")
    if architecture in ("phi3", "gpt2"):
        bias = config.qkv_bias
        specs += _linear(f"{base}.attn_qkv", *qkv, layer=i, bias=bias)
    else:
        # llama.cpp interleaves the rotary pairs of the llama architecture only.
        heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": 0}
        for short, leaf in zip("qkv", qkv):
            interleaved = heads[short] if architecture == "llama" else 0
            specs += _linear(
                f"{base}.attn_{short}",
                leaf,
                layer=i,
                bias=config.qkv_bias,
                rope_heads=interleaved,
            )
    specs += _linear(f"{base}.attn_output", "attention.output", layer=i, bias=config.output_bias)
    if architecture == "phi3":
        specs += _linear(f"{base}.ffn_up", "mlp.gate", "mlp.up", layer=i)
    else:
        if config.gated_mlp:
            specs += _linear(f"{base}.ffn_gate", "mlp.gate", layer=i, bias=config.mlp_bias)
        specs += _linear(f"{base}.ffn_up", "mlp.up", layer=i, bias=config.mlp_bias)
    specs += _linear(f"{base}.ffn_down", "mlp.down", layer=i, bias=config.mlp_bias)
    if config.qk_norm:
        specs.append(_head_norm(f"{base}.attn_q_norm", "query_norm", i, shift))
        specs.append(_head_norm(f"{base}.attn_k_norm", "key_norm", i, shift))
    return specs

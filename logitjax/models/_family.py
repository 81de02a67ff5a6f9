"""A family of decoders: how its checkpoints name and say what a `Decoder` computes."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

# Which ask the family themselves.
if TYPE_CHECKING:
    from logitjax.models._config import DecoderConfig
    from logitjax.models._hf_fields import Fields

# llama.cpp has one set of names; an architecture leaves out what it lacks, or fuses some.
GGUF_WEIGHTS = {
    "embedding": "token_embd",
    "position_embedding": "position_embd",
    "final_norm": "output_norm",
    "head": "output",
    "attention_norm": "blk.*.attn_norm",
    "attention_post_norm": "blk.*.post_attention_norm",
    "mlp_norm": "blk.*.ffn_norm",
    "mlp_post_norm": "blk.*.post_ffw_norm",
    "attention.query": "blk.*.attn_q",
    "attention.key": "blk.*.attn_k",
    "attention.value": "blk.*.attn_v",
    "attention.output": "blk.*.attn_output",
    "attention.query_norm": "blk.*.attn_q_norm",
    "attention.key_norm": "blk.*.attn_k_norm",
    "mlp.gate": "blk.*.ffn_gate",
    "mlp.up": "blk.*.ffn_up",
    "mlp.down": "blk.*.ffn_down",
    "mlp.router": "blk.*.ffn_gate_inp",
    # All experts are one tensor.
    "mlp.experts.gate": "blk.*.ffn_gate_exps",
    "mlp.experts.up": "blk.*.ffn_up_exps",
    "mlp.experts.down": "blk.*.ffn_down_exps",
}


def gguf_windows(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """One window for all layers, if the metadata of a GGUF file give any."""
    window = get("attention.sliding_window")
    return {"windows": (int(window),) * settings["num_layers"]} if window else {}


def gguf_experts(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers and width of experts; llama.cpp always makes their weights sum to one."""
    return {
        "num_experts": int(get("expert_count")),
        "experts_per_token": int(get("expert_used_count")),
        "expert_size": int(get("expert_feed_forward_length", 0)),
        "normalise_experts": True,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How byte-level tokenizers of GGUF files split a text before they merge."""

    # Of the pieces; that of GPT-2 where it is empty.
    pattern: str = ""
    # Each is split off first.
    digits: bool = False
    # a piece that is a token stays whole.
    ignore_merges: bool = False
    # Unicode's composed form first.
    nfc: bool = False
    # Texts begin with the mark, where the file does not say.
    add_bos: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoders, as one value that every reader and writer of its files asks.

    `dataclasses.replace` of another family's value changes what differs; `register_family` makes a
    value known. A module is named by its path in a `Decoder`: `embedding`, `position_embedding`,
    `final_norm` and `head`, and of each layer `attention_norm`, `attention.query`, `.key`,
    `.value`, `.output`, `.query_norm` and `.key_norm`, `attention_post_norm`, `mlp_norm`,
    `mlp.gate`, `.up` and `.down`, and `mlp_post_norm`.

    Attributes:
        name: `model_type` of its config.json, and `DecoderConfig.family`.
        architecture: Class that its config.json names.
        keys: Keys of config.json that are read, with their values where they are left out.
        fields: By key the field of `DecoderConfig` that it is, one to one.
        settings: Fields of `DecoderConfig` that are the same in all its models.
        read: From the keys' values and the fields so far to those that take more than one key.
        write: The keys that `read` reads.
        weights: By module its name in a checkpoint, with `*` for the number of the layer. Modules
            of one name are one tensor there, joined in the order in which they stand here.
        interleaved: Rows of queries and keys are stored with rotary pairs side by side.
        input_first: Kernels of layers are stored `[in, out]`; elsewhere `[out, in]`.
        free_head_dim: A config.json can say another width of heads than `hidden_size / num_heads`.
        wrapper: `model_type` of multimodal configurations that hold this one as `text_config`.
        aliases: Other names of keys.
        ignored: Keys that change no logit.
        ignored_at: Keys that change no logit at this value.
        unread: Regular expression of tensors that nothing reads.
        gguf: Architecture of its GGUF files, with `+experts` where these have experts; None where
            they are not read.
        gguf_read: As `read`, from `get(key, default=None)` of the architecture's metadata.
        gguf_weights: As `weights`, of GGUF files.
        gguf_interleaved: As `interleaved`, of GGUF files.
        pre_tokenizers: By their name in GGUF files, those that came with this family.
    """

    name: str
    architecture: str
    keys: dict[str, Any]
    fields: dict[str, str]
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    read: Callable[["Fields", Mapping[str, Any]], dict[str, Any]]
    write: Callable[["DecoderConfig"], dict[str, Any]]
    weights: dict[str, str]
    interleaved: bool = False
    input_first: bool = False
    free_head_dim: bool = True
    wrapper: str = ""
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    ignored_at: dict[str, Any] = dataclasses.field(default_factory=dict)
    unread: str = ""
    gguf: str | None = None
    gguf_read: Callable[..., dict[str, Any]] = gguf_windows
    gguf_weights: dict[str, str] = dataclasses.field(default_factory=lambda: GGUF_WEIGHTS)
    gguf_interleaved: bool = False
    pre_tokenizers: dict[str, PreTokenizer] = dataclasses.field(default_factory=dict)

"""A family of decoders: the names and settings of its checkpoints for a `Decoder`."""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

# These import the family themselves.
if TYPE_CHECKING:
    from logitjax.models._config import DecoderConfig
    from logitjax.models._hf_fields import Fields

NAMES: dict[str, Any] = tomllib.loads(
    (resources.files("logitjax.models") / "names.toml").read_text()
)
GGUF_WEIGHTS: dict[str, str] = NAMES["gguf_weights"]


def gguf_windows(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """One window for all layers, if the metadata of a GGUF file state any."""
    window = get("attention.sliding_window")
    return {"windows": (int(window),) * settings["num_layers"]} if window else {}


def gguf_experts(get: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Number and width of experts; llama.cpp always normalises their weights to sum 1."""
    return {
        "num_experts": int(get("expert_count")),
        "experts_per_token": int(get("expert_used_count")),
        "expert_size": int(get("expert_feed_forward_length", 0)),
        "normalise_experts": True,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """The rule by which byte-level tokenizers of GGUF files split a text before merging."""

    # Pattern of the pieces; GPT-2's if empty.
    pattern: str = ""
    # Patterns that are split off first.
    digits: bool = False
    # A piece that is a token stays whole.
    ignore_merges: bool = False
    # Unicode's composed form is applied first.
    nfc: bool = False
    # Texts begin with the BOS token, if the file does not say.
    add_bos: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of decoders, as a value that all readers and writers of its files use.

    `dataclasses.replace` of another family's value changes the differences; `register_family` makes
    a value known. A module is named by its path in a `Decoder`: `embedding`, `position_embedding`,
    `final_norm` and `head`, and in each layer `attention_norm`, `attention.query`, `.key`,
    `.value`, `.output`, `.query_norm` and `.key_norm`, `attention_post_norm`, `mlp_norm`,
    `mlp.gate`, `.up` and `.down`, and `mlp_post_norm`.

    Attributes:
        name: `model_type` of its config.json, and `DecoderConfig.family`.
        architecture: Class named in its config.json.
        keys: Keys of config.json to read, with their default values.
        fields: Field of `DecoderConfig` for each key that maps one to one.
        settings: Fields of `DecoderConfig` that are the same in all its models.
        read: Computes fields that depend on several keys from the keys' values and other fields.
        write: Computes the keys that `read` reads.
        weights: Checkpoint name of each module, with `*` for the number of the layer. Modules of
            one name form one tensor there, joined in the order given here.
        interleaved: Rows of queries and keys are stored with rotary pairs side by side.
        input_first: Kernels of layers are stored `[in, out]`; otherwise `[out, in]`.
        free_head_dim: A config.json can state a head width other than `hidden_size / num_heads`.
        wrapper: `model_type` of multimodal configurations that contain this one as `text_config`.
        aliases: Other names of keys.
        ignored: Keys that change no logit.
        ignored_at: Keys that change no logit at this value.
        unread: Regular expression of tensors to ignore.
        gguf: Architecture of its GGUF files, with `+experts` if these have experts; None if they
            are not supported.
        gguf_read: Like `read`, from `get(key, default=None)` of the architecture's metadata.
        gguf_weights: Like `weights`, for GGUF files.
        gguf_interleaved: Like `interleaved`, for GGUF files.
        pre_tokenizers: Pre-tokenizers introduced by this family, by their name in GGUF files.
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

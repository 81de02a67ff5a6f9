"""GGUF files written here from the golden weights load to the same parameters."""

import chex
import gguf
import numpy as np
import pytest
from flax import nnx

from logitjax.models import config_from_hf, load_model, load_tokenizer
from logitjax.models._gguf import GgufSource
from logitjax.models._gguf_config import gguf_config
from tests.models._checkpoints import tensors, write_checkpoint
from tests.models._configs import HF_CONFIGS

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}


def gguf_name(name: str, post_norms: bool) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    norms = {
        "post_attention_layernorm": "post_attention_norm" if post_norms else "ffn_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    return f"blk.{layer}.{(_LAYER | norms)[inner]}.{kind}"


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k of the llama architecture."""
    shape = values.shape
    halves = values.reshape(heads, 2, shape[0] // heads // 2, *shape[1:])
    return halves.swapaxes(1, 2).reshape(shape)


def write_gguf(name: str, architecture: str, path) -> None:
    config = config_from_hf(HF_CONFIGS[name])
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attention_softcap)
        writer.add_final_logit_softcapping(config.logits_softcap)
    windows = [w for w in config.layer_windows if w is not None]
    if windows:
        writer.add_sliding_window(windows[0])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for tensor, values in tensors(name).items():
        if architecture == "gpt2" and ".c_" in tensor and values.ndim == 2:
            values = values.T
        if architecture.startswith("gemma") and "norm" in tensor:
            values = values + np.float32(1)
        if architecture == "llama" and ("q_proj" in tensor or "k_proj" in tensor):
            heads = config.num_heads if "q_proj" in tensor else config.num_kv_heads
            values = interleave(values, heads)
        name_there = gguf_name(tensor, config.post_norms)
        writer.add_tensor(name_there, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "said", "begins"),
    [("llama", None, True), ("llama", False, False), ("gpt2", None, False), ("gpt2", True, True)],
)
def test_a_file_says_whether_texts_begin_with_a_mark(tmp_path, kind, said, begins):
    writer = gguf.GGUFWriter(str(tmp_path / "tokenizer.gguf"), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(["<unk>", "<s>", "a", "b", "c", "bc"])
    writer.add_token_scores([0.0, 0.0, -1.0, -2.0, -3.0, -4.0])
    writer.add_token_types([2, 3, 1, 1, 1, 1])
    writer.add_token_merges(["b c"])
    writer.add_bos_token_id(1)
    writer.add_add_space_prefix(False)
    if said is not None:
        writer.add_add_bos_token(said)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.gguf"))
    assert tokenizer.encode("ab", add_bos=None) == [1] * begins + [2, 3]
    # What is written elsewhere says so too.
    assert tokenizer.backend.encode("ab").ids == [1] * begins + [2, 3]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("smollm2", "llama"),
        ("llama_bias", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("phi3", "phi3"),
        ("gemma2", "gemma2"),
        ("gpt2", "gpt2"),
    ],
)
def test_gguf_equals_safetensors(tmp_path, name, architecture):
    write_gguf(name, architecture, tmp_path / "model.gguf")
    there = load_model(str(tmp_path / "model.gguf"))
    here = load_model(str(write_checkpoint(name, tmp_path / "hf")))
    ours, theirs = (nnx.to_pure_dict(nnx.state(m)) for m in (here, there))
    # 1 + w - 1 in float32 is not quite w.
    atol = 2e-7 if architecture == "gemma2" else 0
    chex.assert_trees_all_close(ours, theirs, rtol=0, atol=atol)
    fields = [f for f in vars(here.config) if f not in ("family", "norm_eps", "query_scale")]
    for field in fields:
        assert getattr(here.config, field) == getattr(there.config, field), field


def test_a_turn_ends_where_its_tokens_say_so(tmp_path, monkeypatch):
    write_gguf("smollm2", "llama", tmp_path / "m.gguf")
    source = GgufSource(tmp_path / "m.gguf")
    said = {
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.tokens": ["<unk>", "<|end|>", "<|im_end|>", "<e>", "a", "</s>"],
        "tokenizer.ggml.token_type": [2, 3, 1, 3, 1, 3],
    }
    plain = source.metadata
    monkeypatch.setattr(source, "metadata", lambda key, *more: said.get(key, plain(key, *more)))
    config, _ = gguf_config(source)
    assert config.eos_ids == (5, 3, 1)


def test_unknown_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ValueError, match="unknown architecture 'rwkv7', expected one of llama"):
        load_model(str(tmp_path / "model.gguf"))


def test_truncated_file_is_named(tmp_path):
    write_gguf("smollm2", "llama", tmp_path / "model.gguf")
    data = (tmp_path / "model.gguf").read_bytes()
    # In the last tensor and in the middle, which is seen before anything is read; in the header.
    for size, why in (
        (len(data) - 40, r"truncated .*ends at byte"),
        (len(data) // 2, r"truncated .*ends at byte"),
        (40, ".*truncated"),
    ):
        (tmp_path / "cut.gguf").write_bytes(data[:size])
        with pytest.raises(ValueError, match=rf"cut\.gguf: {why}"):
            load_model(str(tmp_path / "cut.gguf"))

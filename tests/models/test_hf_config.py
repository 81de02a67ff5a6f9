"""The meaning of a config.json: defaults of transformers, and nothing that is not understood."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from logitjax.models import Decoder, config_from_hf, load_config
from logitjax.models._hf_config import config_to_hf
from tests.models._configs import HF_CONFIGS


def test_official_gemma_3_leaves_out_what_transformers_knows():
    """The shape of the published 4B: a text part of seven keys, ids of tokens beside it."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10_240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    raw = {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "mm_tokens_per_image": 256,
        "text_config": text,
        "vision_config": {"hidden_size": 1152},
    }
    config = config_from_hf(raw)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_length) == (262_208, 131_072)
    assert config.eos_ids == (1, 106)
    assert (config.bos_id, config.pad_id) == (2, 0)
    assert config.layer_windows[:6] == (1024,) * 5 + (None,)
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert config.rope_scaling.factor == 8.0
    assert config.attention_softcap is None


def test_what_is_left_out_and_what_is_said_to_be_none_differ():
    gemma = config_from_hf({"model_type": "gemma2"})
    assert (gemma.attention_softcap, gemma.logits_softcap) == (50.0, 30.0)
    assert gemma.layer_windows[:2] == (4096, None)
    bare = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    gemma = config_from_hf({"model_type": "gemma2", **bare})
    assert (gemma.attention_softcap, gemma.logits_softcap) == (None, None)
    assert config_from_hf({"model_type": "mistral"}).layer_windows[0] == 4096
    assert config_from_hf({"model_type": "mistral", "sliding_window": None}).windows == ()


def test_a_layer_type_is_needed_where_no_window_is():
    raw = HF_CONFIGS["gemma3"] | {"layer_types": ["full_attention"] * 8, "sliding_window": None}
    config = config_from_hf(raw)
    assert config.windows == ()
    exported = config_to_hf(config)
    # transformers makes the mask of a window even where no layer has one.
    assert exported["sliding_window"] == 64
    assert config_from_hf(exported) == config
    raw["layer_types"] = ["sliding_attention"] * 8
    with pytest.raises(ValueError, match="sliding_window: expected a number for the layers of"):
        config_from_hf(raw)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is unknown for"),
        ("gemma3", {"rope_scaling": {"type": "yarn"}}, "its kind under the name rope_type"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx="),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is unknown for gpt2"),
        ("smollm2", {"sliding_window": 5}, "sliding_window=5 is unknown for llama"),
        ("smollm2", {"residual_multiplier": 0.2}, "remove the key if it does not"),
        ("smollm2", {"quantization_config": {"bits": 4}}, "use the unquantized checkpoint"),
        ("smollm2", {"quantization_config": {"quant_method": "mxfp4"}}, r"\('mxfp4'\) are"),
        ("qwen3", {"layer_types": ["linear_attention"] * 3}, "hybrids, such as Qwen3-Next,"),
        ("qwen3", {"full_attention_interval": 4}, "hybrids, such as Qwen3-Next,"),
        (
            "smollm3",
            {"no_rope_layers": [1]},
            "no_rope_layers: expected 0 or 1 for each of 5 layers",
        ),
        ("smollm2", {"partial_rotary_factor": 0.5}, "llama rotates whole heads, got 0.5"),
        ("smollm2", {"rope_scaling": {"type": "linear"}}, "linear needs a number factor, got None"),
        ("smollm2", {"rope_scaling": {"type": "dynamic", "factor": 2}}, "unknown rope scaling"),
        ("llama_yarn", {"rope_scaling": {"type": "yarn", "a": 1}}, "yarn has no key 'a'"),
        ("phi4_mini", {"partial_rotary_factor": 1.0}, "longrope needs 4 numbers short_factor"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "those that sliding_window=7 implies"),
        ("qwen2", {"layer_types": ["full_attention"]}, "for each of 3 layers"),
        ("qwen2", {"num_key_value_heads": 2.5}, "num_key_value_heads: expected an integer"),
        ("qwen2", {"tie_word_embeddings": "yes"}, "expected true or false, got 'yes'"),
        ("qwen2", {"hidden_act": "relu"}, "hidden_act: expected one of silu"),
        ("gemma3", {"rope_parameters": {"rope_theta": 3.0}}, "an object for each kind of layer"),
        ("gpt2", {"eos_token_id": ["a"]}, "eos_token_id: expected ids of tokens"),
        ("phi4_mini", {"interpolate_factor": 2}, "interpolate_factor=2 is unknown for phi3"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name, change, message):
    with pytest.raises(ValueError, match=message) as error:
        config_from_hf(HF_CONFIGS[name] | change, where="there/config.json")
    assert str(error.value).startswith("there/config.json: ")
    assert "\n" not in str(error.value)


def test_switches_that_are_off_and_notes_change_nothing():
    raw = HF_CONFIGS["smollm2"]
    notes = {
        "residual_multiplier": None,
        "use_bidirectional_attention": False,
        "quantization_config": {},
        "_name_or_path": "x",
        "attention_dropout": 0.1,
        "pad_token_id": -1,
    }
    assert config_from_hf(raw | notes) == config_from_hf(raw)


@pytest.mark.parametrize(
    ("name", "notes"),
    [
        ("gpt2", {"predict_special_tokens": True, "output_past": True, "n_special": 0}),
        ("phi4_mini", {"full_attn_mod": 1, "interpolate_factor": 1}),
    ],
)
def test_what_published_files_of_a_family_say_beside_it_changes_nothing(name, notes):
    assert config_from_hf(HF_CONFIGS[name] | notes) == config_from_hf(HF_CONFIGS[name])


def test_what_is_left_of_another_ropes_kind_changes_nothing_in_olmo3():
    """transformers merges `rope_scaling` into what the layers without a window have."""
    kinds = {"full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0}}
    scaled = HF_CONFIGS["olmo3"] | {"rope_parameters": kinds}
    scaled |= {"rope_scaling": {"rope_type": "default"}}
    config = config_from_hf(scaled)
    assert (config.rope_scaling, config.rope_theta) == (None, 700.0)


def test_gpt2_without_scaled_scores_has_none():
    raw = HF_CONFIGS["gpt2"] | {"scale_attn_weights": False, "hidden_size": 40}
    raw.pop("n_embd")
    config = config_from_hf(raw)
    assert (config.attention_scale, config.hidden_size) == (1.0, 40)
    assert config_from_hf(config_to_hf(config)) == config


def test_yarn_weights_its_amplitude_as_deepseek_does():
    scaling = {"type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0}
    config = config_from_hf(HF_CONFIGS["smollm2"] | {"rope_scaling": scaling})
    ratio = (0.2 * np.log(4) + 1) / (0.1 * np.log(4) + 1)
    np.testing.assert_allclose(config.rope_scaling.attention_factor, ratio)
    assert config.rope_scaling.original_max_length == 64


def test_generation_config_says_what_ends_an_answer(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIGS["smollm2"]))
    assert load_config(str(tmp_path)).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert load_config(str(tmp_path)).eos_ids == (5, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id: expected ids"):
        load_config(str(tmp_path))


def test_steps_beyond_the_original_length_turn_all_keys_as_a_long_sequence_does():
    """One layer: keys and values depend on nothing that was turned, so the steps are exact."""
    raw = HF_CONFIGS["phi4_mini_long"] | {"num_hidden_layers": 1}
    config = config_from_hf(raw)
    assert config.rope_scaling.original_max_length == 16
    model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    graphdef, state = nnx.split(model)
    tokens = np.arange(40).reshape(2, 20) % 90

    @jax.jit
    def steps(state):
        model = nnx.merge(graphdef, state)
        cache, out = model.init_cache(2, 64), []
        for start, stop in ((0, 10), (10, 16), (16, 17), (17, 20)):
            hidden, cache = model.hidden_states(tokens[:, start:stop], cache=cache)
            out.append(hidden[:, -1])
        # The whole sequence as it stood at each of those moments.
        whole = [model.hidden_states(tokens[:, :n])[0][:, -1] for n in (10, 16, 17, 20)]
        return out, whole

    ours, whole = steps(state)
    np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-5)


def test_published_configurations_parse_and_come_back_the_same():
    file = pathlib.Path(__file__).parents[2] / "tests/rigs/published_configs.json"
    published = json.loads(file.read_text())
    assert len(published) >= 30
    for name, entry in published.items():
        config = config_from_hf(entry["config"], where=name)
        assert config_from_hf(config_to_hf(config)) == config, name

"""Adapters as PEFT directories: names and shapes that PEFT has, and the same numbers back."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from logitjax.models import DecoderConfig, Lora, _peft
from logitjax.storage.weights import SafetensorsSource

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden_size=8,
    intermediate_size=12,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)


def adapters(layout="listed"):
    like = jax.eval_shape(
        lambda: Lora.init(CONFIG, 2, key=jax.random.key(0), alpha=3.0, layout=layout)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), like)


def test_names_and_shapes_are_those_of_peft(tmp_path):
    lora = adapters()
    lora.save(CONFIG, tmp_path, base="org/base")
    source = SafetensorsSource(tmp_path / "adapter_model.safetensors")
    names = source.names()
    assert len(names) == 3 * 7 * 2
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
    np.testing.assert_array_equal(source.read(name), lora.layers[0][1]["key"]["b"].T)
    assert source.shape("base_model.model.model.layers.2.mlp.down_proj.lora_A.weight") == (2, 12)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"]) == (2, 3.0)
    assert settings["layers_to_transform"] == [0, 1, 2]
    assert settings["base_model_name_or_path"] == "org/base"


@pytest.mark.parametrize("layout", ["listed", "stacked"])
def test_the_same_numbers_come_back(tmp_path, layout):
    lora = adapters(layout)
    lora.save(CONFIG, tmp_path)
    again = Lora.load(tmp_path, CONFIG, layout=layout)
    assert again.scale == 1.5
    jax.tree.map(np.testing.assert_array_equal, again.layers, lora.layers)


def adapter_with(path, **changes):
    """A directory whose settings say something else."""
    adapters().save(CONFIG, path)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


def test_a_scale_is_that_of_rank_stabilised_adapters_where_they_say_so(tmp_path):
    lora = Lora.load(adapter_with(tmp_path, use_rslora=True, lora_alpha=4), CONFIG)
    assert lora.scale == pytest.approx(4 / 2**0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha_pattern": {"q_proj": 64}}, "json: expected no alpha_pattern, got"),
        ({"rank_pattern": {"q_proj": 1}}, "json: expected no rank_pattern, got"),
        ({"alora_invocation_tokens": [1]}, "json: expected no alora_invocation_tokens, got"),
        # They change the weights below as well.
        ({"init_lora_weights": "pissa_niter_4"}, "expected plain LORA in .*, got 'pissa_niter_4'"),
        ({"r": None}, "adapter_config.json: r: expected a whole number"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, got None"),
    ],
)
def test_settings_that_change_an_adapter_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Lora.load(adapter_with(tmp_path, **changes), CONFIG)


def test_an_adapter_that_is_replaced_is_never_half_of_another(tmp_path, monkeypatch):
    adapters().save(CONFIG, tmp_path)
    monkeypatch.setattr(_peft, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        adapters().save(CONFIG, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no such file: .*adapter_config.json"):
        Lora.load(tmp_path, CONFIG)


def test_adapters_of_another_model_are_refused(tmp_path):
    adapters().save(CONFIG, tmp_path)
    with pytest.raises(ValueError, match="14 tensors that a model of 2 layers has no place for"):
        Lora.load(tmp_path, dataclasses.replace(CONFIG, num_layers=2))
    wide = dataclasses.replace(CONFIG, hidden_size=16, head_dim=8)
    with pytest.raises(ValueError, match=r"of layer 0 with \w of shape"):
        Lora.load(tmp_path, wide)
    with pytest.raises(FileNotFoundError, match="adapter: no such file"):
        Lora.load(tmp_path / "nowhere", CONFIG)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ValueError, match="expected plain LORA"):
        Lora.load(tmp_path, CONFIG)
    with pytest.raises(ValueError, match="PEFT has no format"):
        adapters().save(dataclasses.replace(CONFIG, family="phi3"), tmp_path)

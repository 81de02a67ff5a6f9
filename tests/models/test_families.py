"""Every family against transformers' logits, its files out and in again, and one from outside."""

import dataclasses
import importlib.metadata
import json
import pathlib

import numpy as np
import pytest

from logitjax import models
from logitjax.models import _families
from logitjax.storage.weights import SafetensorsSource
from logitjax.testing import check_family
from logitjax.testing._family import random_decoder
from tests._marks import EVERY_CHANGE
from tests.models._checkpoints import write_checkpoint
from tests.models._configs import GOLDEN_POSITIONS, HF_CONFIGS, TOKENS

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens.npz")


# One of each kind of block; what the others add is a rope, a bias, a window or a length.
SOME = ("smollm2", "mistral", "qwen3", "gemma3", "gpt2")
FAMILIES = [pytest.param(f, marks=[] if f in SOME else EVERY_CHANGE) for f in HF_CONFIGS]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_keeps_its_promises_and_gives_the_logits_of_transformers(name, tmp_path):
    directory = write_checkpoint(name, tmp_path / "hf", 2)
    family = models.load_config(str(directory)).traits
    logits = check_family(family, directory, tokens=TOKENS)[:, GOLDEN_POSITIONS]
    expected = GOLDENS[name]
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


# Llama under another model_type, with a tensor and a key of another name, in a file of its own.
STRANGER = """
import dataclasses

from logitjax.models.families.llama import LLAMA

OURS = dataclasses.replace(
    LLAMA,
    name="stranger",
    architecture="StrangerForCausalLM",
    fields={("act" if k == "hidden_act" else k): name for k, name in LLAMA.fields.items()},
    keys=LLAMA.keys | {"act": "silu"},
    weights=LLAMA.weights | {"mlp.up": "model.layers.*.mlp.lift"},
    gguf="stranger",
)
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    (tmp_path / "a_strangers_package.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_families, "_MEMBERS", members := dict(_families._MEMBERS))
    monkeypatch.setattr(
        _families, "_REGISTRY", dataclasses.replace(_families._REGISTRY, members=members)
    )
    return "a_strangers_package:OURS"


def test_a_family_in_a_file_elsewhere_loads_exports_and_reads_gguf(stranger, tmp_path):
    family = models.register_family(stranger)
    raw = HF_CONFIGS["smollm2"] | {"model_type": "stranger", "act": "swish"}
    logits = check_family(family, raw, tokens=TOKENS)
    model = random_decoder(models.config_from_hf(raw), np.random.default_rng(0))
    models.save_pretrained(model, models.load_tokenizer("tiny"), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["act"]) == ("stranger", "silu")
    assert written["architectures"] == ["StrangerForCausalLM"]
    source = SafetensorsSource(tmp_path / "out")
    assert "model.layers.0.mlp.lift.weight" in source.names()
    assert np.isfinite(logits).all()


def test_an_entry_point_brings_a_family(stranger, monkeypatch):
    point = importlib.metadata.EntryPoint("stranger", stranger, "logitjax.families")
    with pytest.raises(ValueError, match=r"got 'stranger'; .*register_family add another"):
        models.config_from_hf({"model_type": "stranger"})
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    assert models.config_from_hf({"model_type": "stranger"}).family == "stranger"


@pytest.mark.parametrize(
    ("config", "nearest"),
    [
        ({"model_type": "qwen2_moe"}, "'qwen2_moe'; qwen3_moe is the closest"),
        ({"architectures": ["GPT2Model"]}, r"\['GPT2Model'\]; gpt2 is the closest"),
        ({"model_type": "some", "attn_logit_softcapping": 3.0}, r"gemma2\(name=some\)' reads it"),
        ({}, "got None; "),
    ],
)
def test_a_model_that_is_not_known_is_refused_with_the_nearest_family(config, nearest):
    with pytest.raises(ValueError, match=nearest) as error:
        models.config_from_hf(config, where="there")
    assert str(error.value).startswith("there: model_type: expected one of llama, ")


def test_a_name_belongs_to_one_family(stranger):
    llama = models.register_family("llama")
    with pytest.raises(ValueError, match="family llama: expected a name that is not taken"):
        models.register_family(dataclasses.replace(llama, gguf=None))
    with pytest.raises(ValueError, match="gguf: expected a unique name or none, got 'llama'"):
        models.register_family(dataclasses.replace(llama, name="other"))
    models.register_family("llama(name=alike)")
    alike, plain = (models.config_from_hf({"model_type": name}) for name in ("alike", "llama"))
    assert dataclasses.replace(alike, family="llama") == plain
    # One's own may change, as in a notebook.
    other = models.register_family(dataclasses.replace(llama, name="other", gguf=None))
    assert models.register_family(dataclasses.replace(other, free_head_dim=False)) != other


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": ("mlp.up", "model.layers.*.mlp.down_proj")}, "export: .*"),
        ({"gguf_weights": ("mlp.up", "blk.*.ffn_lift")}, r"gguf_weights\['mlp.up'\]: expected b"),
        ({"free_head_dim": False}, "free_head_dim: expected False to be a ValueError"),
    ],
)
def test_a_broken_family_is_seen(stranger, monkeypatch, change, message):
    llama = models.register_family("llama")
    changed = {
        name: getattr(llama, name) | dict([value]) if isinstance(value, tuple) else value
        for name, value in change.items()
    }
    broken = dataclasses.replace(llama, **changed)
    monkeypatch.setitem(_families._OWN, "llama", broken)
    monkeypatch.setitem(_families._MEMBERS, "llama", broken)
    with pytest.raises(AssertionError, match=message):
        check_family(broken, HF_CONFIGS["smollm2"])

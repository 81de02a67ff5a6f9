"""float8 in blocks of 128 x 128 with a scale each, as DeepSeek and Qwen publish it."""

import json

import ml_dtypes
import numpy as np
import pytest

from logitjax import models
from logitjax.storage.weights import SafetensorsSource

safetensors = pytest.importorskip("safetensors.numpy")


def test_blocks_are_multiplied_by_their_scale_also_where_the_last_is_smaller(tmp_path):
    rng = np.random.default_rng(0)
    stored = rng.normal(size=(200, 160)).astype(ml_dtypes.float8_e4m3fn)
    scales = np.float32([[1, 2], [3, 0.5]])
    path = tmp_path / "model.safetensors"
    tensors = {"a.weight": stored.view(np.uint8), "a.weight_scale_inv": scales}
    content = safetensors.save(tensors)
    # Written as bytes, and then called float8.
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    expected = stored.astype(np.float32)
    expected *= np.repeat(np.repeat(scales, 128, 0)[:200], 128, 1)[:, :160]
    source = SafetensorsSource(path)
    assert source.names() == {"a.weight"}
    np.testing.assert_array_equal(source.read("a.weight"), expected)
    part = source.read("a.weight", slice(100, 150), dtype=ml_dtypes.bfloat16)
    np.testing.assert_array_equal(part, expected[100:150].astype(ml_dtypes.bfloat16))


def test_a_configuration_with_such_blocks_is_read_and_others_are_refused():
    raw = json.loads(
        '{"model_type": "llama", "quantization_config": {"quant_method": "fp8", '
        '"activation_scheme": "dynamic", "weight_block_size": [128, 128]}}'
    )
    assert models.config_from_hf(raw).family == "llama"
    raw["quantization_config"]["weight_block_size"] = [64, 64]
    with pytest.raises(ValueError, match=r"\('fp8'\) are not supported"):
        models.config_from_hf(raw)

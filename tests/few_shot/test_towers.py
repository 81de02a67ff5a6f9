"""Towers of CLIP that learn from a few pictures."""

import jax
import numpy as np
import pytest

from logitjax import few_shot, vision
from tests.vision.goldens.make_encoder_goldens import TOKENS
from tests.vision.goldens.make_vision_goldens import images
from tests.vision.test_encoders import transformers_directory


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.many_programs("two towers trained twice")
@pytest.mark.parametrize("learn", ["lora", "norms"])
def test_towers_learn_the_pictures_and_the_encoder_given_stays_as_it_was(tmp_path, learn):
    encoder = vision.load_encoder(str(transformers_directory(tmp_path)))
    pictures = np.resize(np.asarray(images(32)), (6, 32, 32, 3))
    pictures = np.clip(pictures + np.random.default_rng(0).normal(size=pictures.shape), 0, 1)
    pictures = pictures.astype(np.float32)
    labels = np.arange(6) % len(TOKENS)

    def loss(encoder: vision.Encoder) -> float:
        texts = encoder.text_features(TOKENS)
        cosines = encoder.features(pictures) @ np.asarray(texts).T
        scores = encoder.logit_scale * np.asarray(cosines)
        return float(-np.log(np.asarray(jax.nn.softmax(scores)))[np.arange(6), labels].mean())

    before, fingerprint = loss(encoder), encoder.fingerprint
    recipe = few_shot.Recipe(steps=12, batch_size=4, learning_rate=1e-2)
    options = dict(learn=learn, recipe=recipe, dropout=0.25)
    tuned = few_shot.tune_towers(encoder, pictures, labels, TOKENS, **options)
    assert loss(tuned) < before - 0.1
    assert loss(encoder) == before
    assert encoder.fingerprint == fingerprint != tuned.fingerprint
    again = few_shot.tune_towers(encoder, pictures, labels, TOKENS, **options)
    assert again.fingerprint == tuned.fingerprint
    # What was learned is a small file beside the encoder that it began as.
    place = str(tmp_path / "tuned")
    tuned.save_changes(place, base=str(tmp_path))
    loaded = vision.load_encoder(place)
    assert loaded.fingerprint == tuned.fingerprint
    np.testing.assert_array_equal(loaded.features(pictures), tuned.features(pictures))
    np.testing.assert_array_equal(loaded.text_features(TOKENS), tuned.text_features(TOKENS))
    before = loaded.before_projection().fingerprint
    assert before not in (loaded.fingerprint, encoder.before_projection().fingerprint)
    with pytest.raises(ValueError, match="has no changes to write"):
        encoder.save_changes(place, base=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"changes: expected weights of .*, got 'text\.norm\.none'"
    ):
        encoder.changed({"text.norm.none": np.zeros(3)})
    with pytest.raises(ValueError, match="base: expected the original encoder, got other"):
        vision.load_encoder(place, base=place)

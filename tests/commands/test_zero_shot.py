"""`zero-shot` and `search` against transformers' CLIPModel, and towers that were trained."""

import csv
import dataclasses
import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest
from etils import epath

from logitjax import few_shot
from logitjax.commands import classify, pictures, search, zero_shot
from logitjax.commands import few_shot as command
from tests.vision.goldens.make_clip_goldens import CLASSES, PROMPT, clip_weights, photographs

GOLDENS = np.load(pathlib.Path(__file__).parents[1] / "vision" / "goldens" / "clip.npz")


def clip_folder(path) -> str:
    """The folder that transformers wrote, with the same weights."""
    save_file = pytest.importorskip("safetensors.numpy").save_file
    path.mkdir()
    save_file(clip_weights(json.loads(str(GOLDENS["shapes"]))), path / "model.safetensors")
    for name, text in json.loads(str(GOLDENS["files"])).items():
        (path / name).write_text(text)
    return str(path)


@pytest.mark.many_programs("two towers, and what heads are asked")
def test_embeddings_and_probabilities_of_zero_shot_and_search_are_those_of_transformers(
    tmp_path, monkeypatch
):
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(photographs()):
        image.fromarray(pixels).save(folder / f"{number}.png")
    given: Any = dict(encoder=clip_folder(tmp_path / "clip"), pictures=str(folder))
    seen, write = [], pictures.write_answers
    monkeypatch.setattr(pictures, "write_answers", lambda *a: (seen.append(a[:2]), write(*a)))
    out = epath.Path(tmp_path) / "out"
    # As the flag has them.
    asked = zero_shot.Config(**given, classes=(", ".join(CLASSES),), prompts=(PROMPT,))
    with pytest.raises(ValueError, match="classes: expected at least two names, got 'cat'"):
        dataclasses.replace(asked, classes=("cat",))
    zero_shot.run(asked, out)
    ((head, encoded),) = seen
    np.testing.assert_allclose(encoded.features, GOLDENS["images"], atol=1e-5)
    np.testing.assert_allclose(head.class_weights.T, GOLDENS["texts"], atol=1e-5)
    probabilities = head.predict_proba(**head.inputs(encoded))
    np.testing.assert_allclose(probabilities, GOLDENS["probabilities"], atol=1e-5)
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    best = GOLDENS["probabilities"].argmax(1)
    assert [row["class"] for row in rows] == [CLASSES[k] for k in best]
    written = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(written, GOLDENS["probabilities"].max(1), atol=1e-4)

    query = PROMPT.format(CLASSES[1])
    search.run(search.Config(**given, query=query), epath.Path(tmp_path) / "found")
    found = csv.DictReader((tmp_path / "found" / "found.csv").read_text().splitlines())
    cosines = {int(pathlib.Path(row["picture"]).stem): float(row["cosine"]) for row in found}
    expected = GOLDENS["images"] @ GOLDENS["texts"][1]
    assert list(cosines) == np.argsort(-expected).tolist()
    np.testing.assert_allclose([cosines[k] for k in range(4)], expected, atol=1e-4)
    search.run(search.Config(**given, query=str(folder / "2.png")), epath.Path(tmp_path) / "found")
    first = next(csv.DictReader((tmp_path / "found" / "found.csv").read_text().splitlines()))
    assert first == {"picture": str(folder / "2.png"), "cosine": "1.0000"}


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.many_programs("two towers trained, encoded and asked again")
@pytest.mark.parametrize("towers", ["lora", "norms"])
def test_tuned_towers_are_saved_with_the_head_and_classify_uses_them(tmp_path, monkeypatch, towers):
    image = pytest.importorskip("PIL.Image")
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 120, (40, 32, 3)) + 90 * (np.arange(3) == number)
            image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    short = few_shot.Recipe(steps=40, batch_size=8, learning_rate=1e-2, eps=1e-8)
    monkeypatch.setattr(few_shot.Recipe, "published", lambda *_, **__: short)
    out = epath.Path(tmp_path) / "out"
    given: Any = dict(data=f"folder:{folder}", encoder=clip_folder(tmp_path / "clip"))
    given |= dict(towers=towers, method=("towers", "two_stage", "gda"), views="random:2")
    config = command.Config(**given, shots=(3,), samples=1)
    command.run(config, out)
    report = (out / "report.md").read_text()
    assert f"The towers ({towers}) learned from the 9 pictures of the sample." in report
    assert "| towers" in report
    assert "| zero-shot" not in report
    # The second run finds the towers.
    monkeypatch.setattr(few_shot, "tune_towers", None)
    command.run(config, out)
    with pytest.raises(ValueError, match=r"tuned towers .* fit: .*its shots is 3, not 2"):
        command.run(dataclasses.replace(config, shots=(2,)), out)

    # The head stands alone, and its encoder may have moved.
    place = tmp_path / "elsewhere"
    shutil.copytree(out / "heads" / "towers", place)
    moved = (tmp_path / "clip").rename(tmp_path / "moved")
    asked = classify.Config(head=str(place), encoder=str(moved), pictures=str(folder))
    classify.run(asked, epath.Path(tmp_path) / "answers")
    rows = csv.DictReader((tmp_path / "answers" / "predictions.csv").read_text().splitlines())
    right = [pathlib.Path(row["picture"]).parent.name == row["class"] for row in rows]
    assert np.mean(right) > 0.8
    # Features of the encoder as it was are refused.
    shutil.rmtree(place / "encoder")
    with pytest.raises(ValueError, match="encoders: expected those that the head learned from"):
        classify.run(asked, epath.Path(tmp_path) / "answers")

"""From a folder of pictures as phones make them to a head, and to the classes of new pictures."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from logitjax import few_shot, storage, vision
from logitjax.commands import classify
from logitjax.commands import few_shot as command
from logitjax.few_shot._mixture import likeliest_weights


def phone_folder(root):
    """Three classes, with everything that real folders have; returns upright pixels by class."""
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)

    def pixels(number):
        noise = rng.integers(0, 150, (48, 36, 3)) + 60 * (np.arange(3) == number)
        noise[:24] //= 2  # what is up is dark
        return noise.astype(np.uint8)

    for number, name in enumerate(("blue", "red", "white")):
        folder = root / name
        folder.mkdir(parents=True)
        for i in range(8):
            image.fromarray(pixels(number)).save(folder / f"{i}.png")
    # Turned by the camera; a copy of itself upright.
    upright = image.open(root / "red" / "0.png")
    exif = image.Exif()
    exif[0x0112] = 6
    upright.transpose(image.Transpose.ROTATE_90).save(root / "red" / "turned.png", exif=exif)
    clear = np.dstack([pixels(1), np.full((48, 36), 90, np.uint8)])
    image.fromarray(clear, "RGBA").save(root / "red" / "clear.png")
    (root / "red" / "copy.png").write_bytes((root / "red" / "1.png").read_bytes())
    for name in ("blue", "white"):
        image.open(root / "red" / "2.png").save(root / name / "stray.png")
    (root / "white" / "empty.jpg").write_bytes(b"")
    (root / "white" / "half.png").write_bytes((root / "white" / "3.png").read_bytes()[:900])


@pytest.mark.every_change
@pytest.mark.slow
def test_phone_pictures_become_a_head_and_new_pictures_get_classes(tmp_path, capsys):
    phone_folder(tmp_path / "pictures")
    np.save(tmp_path / "text.npy", np.random.default_rng(0).normal(size=(64, 3)))
    config = command.Config(
        data=f"folder:{tmp_path / 'pictures'}",
        encoder="random:resnet8",
        class_weights=str(tmp_path / "text.npy"),
        method=("tip_adapter", "pro_ker"),
        shots=(1, 4, 16, 32),
        samples=2,
    )
    out = epath.Path(tmp_path) / "out"
    command.run(config, out)
    report = (out / "report.md").read_text()
    for line in (
        "2 skipped because they cannot be read",
        "1 rotated by their EXIF tag",
        "1 placed on a white background because they are transparent",
        "2 only the first of each is kept because their pixels are equal",
        "1 skipped because equal pixels occur in several classes",
        "32 a class use the same pictures as 4.",
        "`mixture` is recommended: it adds the probabilities of",
        "Of the methods by themselves `",
        "Level with it on these pictures",
        "By class, worst first (at most 20):",
        "most often taken for |",
        "| 4 a class | 12 (4 a class) | 9         | 3         |",
    ):
        assert line in report, line
    for name in ("empty.jpg", "half.png", "stray.png", "turned.png", "copy.png"):
        assert name in report
    assert "of 3 pictures, most confident first" in (out / "mistakes.html").read_text()
    head = few_shot.load(out / "heads" / "pro_ker")
    assert head.about["encoder"] == "random:resnet8"
    assert len(head.about["pictures"]) == len(head.examples)

    new = tmp_path / "new" / "deep"
    new.mkdir(parents=True)
    for name in ("blue/0.png", "red/clear.png", "white/half.png"):
        (new / name.replace("/", "_")).write_bytes((tmp_path / "pictures" / name).read_bytes())
    answers = epath.Path(tmp_path) / "answers"
    mixture = few_shot.load(out / "heads" / "mixture")
    assert mixture.about["mixture"].keys() <= {"tip_adapter", "pro_ker"}
    asked = classify.Config(head=str(out / "heads" / "mixture"), pictures=str(tmp_path / "new"))
    classify.run(asked, answers)
    rows = list(csv.DictReader((answers / "predictions.csv").read_text().splitlines()))
    assert [epath.Path(row["picture"]).name for row in rows] == ["blue_0.png", "red_clear.png"]
    assert sorted(row["label_next"] for row in rows) == ["1", "2"]
    assert all(1 / 3 < float(row["probability"]) <= 1 for row in rows)
    page = (answers / "index.html").read_text()
    # Each with its three nearest labelled pictures.
    assert page.count("<img") == 2 * 4
    # The head refuses features of another size, and rows that are no numbers.
    record = storage.read_json(out / "heads" / "pro_ker" / "head.json")
    (tmp_path / "other").mkdir()
    moved = record | {"encoders": [record["encoders"][0].replace("224 px", "96 px")]}
    (tmp_path / "other" / "head.json").write_text(json.dumps(moved))
    tensors = (out / "heads" / "pro_ker" / "head.safetensors").read_bytes()
    (tmp_path / "other" / "head.safetensors").write_bytes(tensors)
    with pytest.raises(ValueError, match=r"encoders: expected those that the head learned from"):
        classify.run(dataclasses.replace(asked, head=str(tmp_path / "other")), answers)
    with pytest.raises(ValueError, match="features: expected finite numbers, got others in row 1"):
        head.predict(np.where(np.arange(3)[:, None] == 1, np.nan, head.examples[:3]))
    with pytest.raises(ValueError, match="features: expected those of the encoder"):
        head.predict(-head.examples[:3])


def test_a_folder_val_is_chosen_on_and_equal_pictures_are_not_tested_on(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        for number, name in enumerate("ab"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                # The first test picture is among those to learn from.
                value = 100 * number + (0 if i == 0 and split != "val" else 7 * i + len(split))
                image.new("RGB", (4, 4), (value, 0, 0)).save(folder / f"{i}.png")
    config = command.Config(
        data=f"folder:{tmp_path}", encoder="random:resnet8", class_weights="text.npy"
    )
    assert command._splits(config) == {"pictures": "train", "validation": "val", "test": "test"}
    without = dataclasses.replace(config, validation="none")
    assert command._splits(without) == {"pictures": "train", "test": "test"}
    encoder = vision.load_encoder("random:resnet8")
    parts, notes = command._survey(config, encoder)
    assert {part: len(rows) for part, (*_, rows) in parts.items()} == {
        "pictures": 4, "validation": 4, "test": 4,
    }  # fmt: skip
    (note,) = notes
    assert "2 skipped because they equal other pictures of this run" in note
    assert f"{tmp_path / 'train' / 'a' / '0.png'}, as {tmp_path / 'test' / 'a' / '0.png'}" in note
    alone = dataclasses.replace(config, data=f"folder:{tmp_path / 'train' / 'a'}")
    (tmp_path / "train" / "a" / "a").mkdir()
    (tmp_path / "train" / "a" / "1.png").rename(tmp_path / "train" / "a" / "a" / "1.png")
    with pytest.raises(ValueError, match="data: expected at least two classes, got only 'a'"):
        command._survey(alone, encoder)


def test_probabilities_are_as_sure_as_right_and_sets_hold_the_class():
    rng, labels = np.random.default_rng(0), np.arange(480) % 4
    weights = np.eye(12)[:, :4]
    features = weights.T[labels] + 0.5 * rng.normal(size=(480, 12))
    pictures = few_shot.Pictures(features=features, labels=labels, class_weights=weights)
    head = few_shot.fit("tip_adapter", pictures[:32])
    test = pictures[32:]
    p = head.predict_proba(**head.inputs(test))
    surest = p.max(1)
    # The logits, cosines times 100, are far too sure.
    assert abs(surest.mean() - head.accuracy(test)) < 0.08
    assert head.temperature > 3
    sets = head.predict_sets(**head.inputs(test), coverage=0.8)
    assert 0.6 < sets[np.arange(448), test.labels].mean() < 0.95
    assert head.predict_sets(**head.inputs(test), coverage=0.999).all()
    # Of nine pictures the least probable may be missed at .9, which is less than a tenth in floats.
    few = dataclasses.replace(head, calibration=np.linspace(0.5, 0.9, 9, dtype=np.float32))
    assert not few.predict_sets(**few.inputs(test), coverage=0.9).all(1).any()


def test_the_estimate_of_the_recommended_mixture_has_no_bias():
    rng = np.random.default_rng(0)
    errors, labels = [], np.zeros((1, 40), int)
    for seed in range(20):
        # Twenty methods of four settings that are all right in 70 % of the pictures.
        right = rng.random((20, 1, 4, 40)) < 0.7
        sure = np.where(right, rng.uniform(0.5, 1, right.shape), rng.uniform(0, 0.5, right.shape))
        probabilities = {str(n): np.stack([p, 1 - p], -1) for n, p in enumerate(sure)}
        members, estimate, *_ = few_shot.recommend(probabilities, labels, seed=seed)
        # New pictures: as many methods as are mixed are right independently.
        new = rng.random((len(members), 4000)) < 0.7
        p = np.where(new, rng.uniform(0.5, 1, new.shape), rng.uniform(0, 0.5, new.shape))
        weights = np.array([weight for _, weight in members.values()])
        errors.append(estimate - (weights @ p > 0.5).mean())
        mixed = sum(w * probabilities[name][0, at, :, 0] for name, (at, w) in members.items())
        assert (mixed > 0.5).mean() > 0.8
    assert abs(np.mean(errors)) < 0.05


def test_weights_of_a_mixture_by_hand():
    # One method knows three pictures of four, the other the fourth: (3 log w + log(1 - w))' = 0.
    right = np.array([[0.8, 1e-9]] * 3 + [[1e-9, 0.8]])
    np.testing.assert_allclose(likeliest_weights(right), [0.75, 0.25], atol=1e-6)
    # w / (w + .5 (1 - w)) is highest at w = 1.
    np.testing.assert_array_equal(likeliest_weights(np.array([[0.8, 0.4]] * 9)), [1, 0])


def test_a_mixture_is_never_less_likely_than_its_best_method():
    rng = np.random.default_rng(0)
    for methods in (2, 5, 30):
        for count in (3, 20):
            right = rng.beta(0.5, 0.5, size=(count, methods)) + 1e-6
            weights = likeliest_weights(right)
            assert weights.sum() == pytest.approx(1)
            assert weights.min() >= 0
            assert np.log(right @ weights).sum() >= np.log(right).sum(0).max() - 1e-9


@pytest.mark.slow
@pytest.mark.every_change
@pytest.mark.many_programs("three methods learn by themselves and in a mixture")
def test_a_mixture_adds_probabilities_and_is_read_as_it_was_saved(tmp_path):
    rng, labels = np.random.default_rng(0), np.arange(120) % 3
    weights = np.eye(8)[:, :3]
    features = weights.T[labels] + 0.6 * rng.normal(size=(120, 8))
    more = dict(auxiliary=features[:, ::-1] + 0.3 * rng.normal(size=(120, 8)))
    pictures = few_shot.Pictures(
        features=features, labels=labels, class_weights=weights, scale=5.0, **more
    )
    learned, held_out, test = pictures[:24], pictures[24:60], pictures[60:]
    names = ("tip_adapter", "gda", "linear_probe_auxiliary")
    heads = [few_shot.fit(name, learned, held_out) for name in names]
    mixture = few_shot.fit(names, learned, held_out, weights=(1.0, 0.0, 3.0))
    every = [head.predict_proba(**head.inputs(test)) for head in heads]
    expected = 0.25 * every[0] + 0.75 * every[2]
    np.testing.assert_allclose(mixture.predict_proba(**mixture.inputs(test)), expected, atol=1e-5)
    mixture.save(tmp_path / "head")
    read = few_shot.load(tmp_path / "head")
    assert read.method == mixture.method
    assert read.method.needs == ("auxiliary",)
    np.testing.assert_array_equal(
        read.logits(**read.inputs(test)), mixture.logits(**mixture.inputs(test))
    )
    # The sets hold the class as often as they should.
    sets = read.predict_sets(**read.inputs(test), coverage=0.8)
    assert 0.65 < sets[np.arange(60), test.labels].mean() < 0.97
    # Without weights, those that make the labels of the pictures held out likeliest.
    chosen = few_shot.fit(names, learned, held_out)
    likely = np.stack([head.calibration for head in heads], 1)
    assert np.log(chosen.calibration).sum() >= np.log(likely).sum(0).max() - 1e-3
    with pytest.raises(ValueError, match="weights: expected one for each of 3 methods"):
        few_shot.fit(names, learned, held_out, weights=(1.0, 2.0))


def test_a_method_that_is_best_everywhere_is_recommended_alone():
    labels = np.arange(20)[None] % 2
    p = np.where(labels == 0, 0.9, 0.1)
    best = np.stack([p, 1 - p], -1)[:, None]
    vague = 0.5 + (best - 0.5) / 4
    # The second setting is wrong everywhere.
    both = {"vague": np.repeat(vague, 2, 1), "best": np.concatenate([1 - best, best], 1)}
    members, accuracy, low, high = few_shot.recommend(both, labels)
    assert members == {"best": (1, 1.0)}
    assert (accuracy, high) == pytest.approx((1.0, 1.0))
    assert 0.8 < low < 0.9
    # Pictures without a label count for nothing.
    some = np.where(np.arange(20) < 16, labels, -1)
    assert few_shot.recommend(both, some)[0] == members
    with pytest.raises(ValueError, match="probabilities: expected labelled pictures"):
        few_shot.recommend(both, some - 5)

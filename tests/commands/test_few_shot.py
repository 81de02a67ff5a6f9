"""`logitjax few-shot`: own features and own pictures to a report and a head, as the API has it."""

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from etils import epath

from logitjax import data, few_shot, storage, vision
from logitjax.commands import few_shot as command

CLASSES, WIDTH, AUXILIARY = 4, 12, 10


def write_features(directory, count=80) -> dict[str, Any]:
    """Files of a torch program: two encoders' features and a zero-shot classifier."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    weights = rng.normal(size=(WIDTH, CLASSES))
    means = rng.normal(size=(CLASSES, AUXILIARY))
    first, second = directory / "train.npz", directory / "train_other.npz"
    features = weights.T[labels] + 0.8 * rng.normal(size=(count, WIDTH))
    np.savez(first, features=features, labels=labels, hidden=features)
    auxiliary = means[labels] + rng.normal(size=(count, AUXILIARY))
    np.savez(second, features=auxiliary.astype(np.float16), labels=labels)
    text = directory / "text.npz"
    noisy = weights + 2.0 * rng.normal(size=weights.shape)
    texts = noisy.T[:, None] + rng.normal(size=(CLASSES, 3, WIDTH))
    last = dict(projection=np.eye(WIDTH), text_projection=np.eye(WIDTH))
    np.savez(text, class_weights=noisy, scale=20.0, texts=texts, **last)
    return {"features": f"{first},{second}", "class_weights": str(text)}


@pytest.mark.many_programs("features, a sweep, a choice by folds, and the head read again")
def test_own_features_give_a_report_and_the_head_of_the_python_interface(tmp_path, monkeypatch):
    files = write_features(tmp_path)
    out = epath.Path(tmp_path) / "out"
    config = command.Config(**files, method=("pro_ker",), shots=(1, 4), samples=2)
    command.run(config, out)

    pictures = few_shot.read_pictures(
        *files["features"].split(","), class_weights=files["class_weights"]
    )
    sample = pictures.sample(4, seed=(0, 0))
    head = few_shot.fit("pro_ker", pictures[sample.train], pictures[sample.validation])
    saved = few_shot.load(out / "heads" / "pro_ker")
    assert saved.method == head.method
    mixture = few_shot.load(out / "heads" / "mixture")
    ((setting, weight),) = mixture.about["mixture"].values()
    assert (mixture.method.methods, weight) == (
        (few_shot.Candidate.all()["pro_ker"].at_scale(20.0).at(setting).method,), 1.0
    )  # fmt: skip
    rest = pictures[sample.rest]
    np.testing.assert_array_equal(saved.logits(rest.features), head.logits(rest.features))
    record = json.loads((out / "results" / "pro_ker_4.json").read_text())
    assert record["test"][0] == pytest.approx(saved.accuracy(rest))
    assert record["zero_shot"][0] < record["test"][0]
    report = (out / "report.md").read_text()
    assert (
        f"{int(np.sum(mixture.predict(rest.features) == rest.labels))} of 48 pictures right"
        in report
    )
    # What was trained is not trained again.
    monkeypatch.setattr(few_shot, "sweep", None)
    command.run(config, out)
    # Its probabilities are not left out of the mixture in silence.
    (out / "results" / "pro_ker_4.npz").unlink()
    with pytest.raises(ValueError, match=r"pro_ker_4\.npz: missing; remove .*pro_ker_4\.json"):
        command.run(config, out)
    # And is not shown for other pictures.
    write_features(tmp_path, count=76)
    with pytest.raises(ValueError, match=r"few-shot run .* does not fit: its pictures is"):
        command.run(config, out)


def test_pictures_of_a_sample_are_balanced_nested_and_apart(tmp_path):
    files = write_features(tmp_path)
    pictures = few_shot.read_pictures(
        files["features"].split(",")[0], class_weights=files["class_weights"]
    )
    few, many = (pictures.sample(n, validation="shots", seed=3) for n in (2, 6))
    np.testing.assert_array_equal(np.bincount(pictures.labels[many.train]), [6] * CLASSES)
    np.testing.assert_array_equal(np.bincount(pictures.labels[many.validation]), [6] * CLASSES)
    assert set(few.train) < set(many.train)
    parts = np.concatenate([many.train, many.validation, many.rest])
    np.testing.assert_array_equal(np.sort(parts), np.arange(80))
    assert len(pictures.sample(9, seed=1).validation) == 4 * CLASSES
    # A class gives what it has: 20 pictures, of which one is left to test on.
    assert len(pictures.sample(50, validation="none").train) == 19 * CLASSES
    with pytest.raises(ValueError, match=r"at least 3 pictures of each class.*got 2 of '0'"):
        pictures[:8].sample(1)


@pytest.mark.parametrize("count", [3, 4, 5, 6, 9, 24])
@pytest.mark.parametrize("validation", ["min4", "shots"])
@pytest.mark.parametrize("rest", [False, True])
def test_more_shots_never_learn_from_fewer_pictures(count, validation, rest):
    labels = np.arange(2 * count) % 2
    pictures = few_shot.Pictures(
        features=np.ones((2 * count, 3)), labels=labels, class_weights=np.eye(3)[:, :2]
    )
    samples = [
        pictures.sample(shots, validation=validation, rest=rest) for shots in (1, 2, 4, 8, 16)
    ]
    for few, many in itertools.pairwise(samples):
        assert set(few.train) <= set(many.train)
        assert len(few.validation) <= len(many.validation)
    # Every sample fits where one at the most shots does, as a sweep needs.
    assert max(len(sample.train) for sample in samples) == len(samples[-1].train)
    assert not set(samples[-1].train) & set(samples[-1].validation)
    assert min(len(sample.rest) for sample in samples) >= 2 * rest


@pytest.mark.every_change
@pytest.mark.slow
def test_methods_learn_from_views_and_are_judged_on_the_pictures():
    rng, labels = np.random.default_rng(0), np.arange(18) % 3
    pictures, *views = (
        few_shot.Pictures(
            features=rng.normal(size=(18, 5)), labels=labels, class_weights=np.eye(5)[:, :3]
        )
        for _ in range(3)
    )
    pictures = dataclasses.replace(pictures, views=tuple(views))
    sample = pictures.sample(2, seed=0)
    task = pictures[sample.train].task
    assert (task.views, len(task.labels)) == (2, 6)
    expected = np.concatenate([view.features[sample.train] for view in views])
    np.testing.assert_array_equal(task.support.features, expected)
    stacked, held_out = pictures.stack([sample], room=sample)
    assert stacked.views == 2
    np.testing.assert_array_equal(stacked.support.features[0], expected)
    np.testing.assert_array_equal(stacked.labels[0], task.labels)
    for part, rows in (("calibration", sample.validation), ("test", sample.rest)):
        np.testing.assert_array_equal(held_out[part][0].features[0], pictures.features[rows])
    with pytest.raises(ValueError, match="views: expected the labels of the pictures"):
        dataclasses.replace(pictures, views=(views[0][::-1],))


WRONG = {
    "other labels": (
        lambda a: a | {"auxiliary_labels": a["labels"][::-1]},
        "auxiliary: expected the pictures of",
    ),
    "a label too many": (lambda a: a | {"labels": a["labels"] + 1}, "labels: expected 0 to 3"),
    "labels of another kind": (
        lambda a: a | {"labels": a["labels"] + 0.5},
        "labels: expected integers",
    ),
    "too few labels": (lambda a: a | {"labels": a["labels"][:-1]}, "labels: expected one for each"),
    "a nan": (
        lambda a: a | {"features": np.where(np.arange(80)[:, None] == 7, np.nan, a["features"])},
        "features: expected finite numbers, got others in row 7",
    ),
    "no direction": (lambda a: a | {"features": 0 * a["features"]}, "features: .*got zeros at 0"),
    "turned": (
        lambda a: a | {"class_weights": a["class_weights"].T},
        r"class_weights: expected \[12, classes\].*transposed, they would fit",
    ),
    "views": (
        lambda a: a | {"features": a["features"][:, None]},
        r"features: expected \[rows, columns\], got shape \(80, 1, 12\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_features_that_cannot_be_are_refused(tmp_path, name):
    spoil, message = WRONG[name]
    files = write_features(tmp_path)
    first = files["features"].split(",")[0]
    arrays = spoil(
        dict(np.load(first)) | {"class_weights": np.load(files["class_weights"])["class_weights"]}
    )
    other = tmp_path / "other.npz"
    labels = arrays.pop("auxiliary_labels", arrays["labels"])
    np.savez(other, features=arrays["features"], labels=labels)
    np.savez(first, features=arrays["features"], labels=arrays["labels"])
    with pytest.raises((TypeError, ValueError), match=message):
        few_shot.read_pictures(first, other, class_weights=arrays["class_weights"])


def test_flags_that_do_not_go_together_are_refused(tmp_path):
    files = write_features(tmp_path)
    for options, message in [
        ({}, "data, features: expected one of them"),
        ({"data": "stamps"}, "encoder: expected one"),
        ({"features": "a.npz"}, "class_weights: expected a file"),
        (files | {"method": ("best",)}, "method: expected all or one of amu, "),
        (files | {"shots": (0,)}, "shots: expected positive numbers"),
        (files | {"views": "random:2"}, "views: expected plain for --features"),
        (files | {"prompts": ("a photo",)}, "prompts: expected {}"),
    ]:
        with pytest.raises(ValueError, match=message):
            command.Config(**options)
    alone = files | {"features": files["features"].split(",")[0]}
    config = command.Config(**alone, method=("amu",))
    with pytest.raises(ValueError, match="method: expected auxiliary, which amu needs, got none"):
        command.run(config, epath.Path(tmp_path) / "out")


def test_heads_that_are_damaged_or_missing_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no head in .* \(it has no head.json\)"):
        few_shot.load(tmp_path)
    rng = np.random.default_rng(0)
    pictures = few_shot.Pictures(
        features=rng.normal(size=(8, 5)), labels=np.arange(8) % 2, class_weights=np.eye(5)[:, :2]
    )
    head = few_shot.fit("tip_adapter", pictures)
    head.save(tmp_path)
    with pytest.raises(ValueError, match=r"features: expected \[batch, 5\], got \(8, 4\)"):
        head.logits(pictures.features[:, :4])
    path = tmp_path / "head.json"
    record = storage.read_json(path)
    for change, message in [
        ({"kind": "other"}, "kind: expected 'few-shot head'"),
        ({"method": {"name": "os", "settings": {}}}, "method: expected a known one"),
        ({"class_names": ["0"]}, "a column for each of 1 classes"),
    ]:
        path.write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=message):
            few_shot.load(tmp_path)


@pytest.mark.slow
def test_every_method_learns_is_kept_and_given_back(tmp_path):
    files = write_features(tmp_path)
    out = epath.Path(tmp_path) / "out"
    command.run(command.Config(**files, shots=(2, 8), samples=2), out)
    pictures = few_shot.read_pictures(
        *files["features"].split(","), class_weights=files["class_weights"]
    )
    rest = pictures[pictures.sample(8, seed=(0, 0)).rest]
    for name, candidate in few_shot.Candidate.all().items():
        # These files have no features of texts.
        if "texts" in candidate.method.needs:
            continue
        head = few_shot.load(out / "heads" / name)
        record = json.loads((out / "results" / f"{name}_8.json").read_text())
        # Settings are traced in the sweep and constants here: a picture may fall on either side.
        assert head.accuracy(rest) == pytest.approx(record["test"][0], abs=1.5 / len(rest)), name
        assert np.mean(record["test"]) > 0.4, name
    # Without validation pictures the published settings hold.
    config = command.Config(
        **files, method=("tip_adapter",), shots=(8,), samples=1, validation="none"
    )
    command.run(config, epath.Path(tmp_path) / "none")
    head = few_shot.load(epath.Path(tmp_path) / "none" / "heads" / "tip_adapter")
    assert head.method == few_shot.methods.TipAdapter()


@pytest.mark.slow
def test_own_pictures_go_through_both_encoders(tmp_path):
    image = pytest.importorskip("PIL.Image")
    from tests.vision.test_encoders import transformers_directory

    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "red", "white")):
        for part, count in (("train", 4), ("test", 3)):
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (40, 32, 3)) + 60 * (np.arange(3) == number)
                kind = ("png", "webp", "bmp", "gif")[i]
                image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.{kind}")
    (tmp_path / "clip").mkdir()
    encoder = str(transformers_directory(tmp_path / "clip"))
    np.save(tmp_path / "text.npy", rng.normal(size=(16, 3)))
    config = command.Config(
        data=f"folder:{tmp_path / 'pictures'}",
        encoder=encoder,
        auxiliary="random:resnet8",
        class_weights=str(tmp_path / "text.npy"),
        method=("amu", "pro_lip"),
        shots=(2,),
        samples=1,
        validation="shots",
        views="random:2",
    )
    out = epath.Path(tmp_path) / "out"
    command.run(config, out)
    head = few_shot.load(out / "heads" / "amu")
    assert head.class_names == ("blue", "red", "white")
    assert "of 9 pictures right" in (out / "report.md").read_text()
    # What the command encoded is what the encoder says, and the head reads it.
    head, clip = few_shot.load(out / "heads" / "pro_lip"), vision.load_encoder(encoder)
    (cached,) = (out / "features").glob("*hidden/test")
    test = few_shot.read_pictures(
        cached, class_weights=head.class_weights, scale=head.scale, projection=clip.projection
    )
    images = data.load_image_set(config.data, split="test")
    views = data.ImageViews.of(clip, "plain")
    pixels = np.concatenate([views(images[row][0], row=row) for row in range(9)])
    features = np.array(clip.features(pixels))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(test.features, features, atol=1e-5)
    record = json.loads((out / "results" / "pro_lip_2.json").read_text())
    assert record["test"] == pytest.approx([head.accuracy(test)])
    for changes, message in (
        (dict(auxiliary=None), "method: expected auxiliary, which amu needs, got none"),
        (dict(views="random:0"), "count: expected at least 1"),
        (dict(rows="1"), "data: expected at least 2 pictures of each class, got 0 of 'red'"),
        (dict(test_split="train"), "test_split: expected another than --split"),
    ):
        with pytest.raises(ValueError, match=message):
            command.run(dataclasses.replace(config, **changes), epath.Path(tmp_path) / "early")
    assert not (tmp_path / "early").exists()
    without = dataclasses.replace(config, class_weights=None, encoder="random:resnet8")
    with pytest.raises(ValueError, match=r"class_weights: .* has no text tower"):
        command.run(without, epath.Path(tmp_path) / "other")

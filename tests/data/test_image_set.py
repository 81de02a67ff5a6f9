"""Pictures from folders, packages and tfds, without the packages where they are not installed."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

from logitjax import data
from logitjax.data import _image_set, _recognition


def save(path, colour=0, size=(5, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def folders(root):
    for split, count in (("train", 3), ("test", 2)):
        for number, name in enumerate(("cat", "dog")):
            for i in range(count):
                save(root / split / name / f"{i}.png", (number, i, 0))
    return root


def test_folders_are_classes(tmp_path):
    images = data.load_image_set(f"folder:{folders(tmp_path)}", split="train")
    assert images.class_names == ("cat", "dog")
    assert len(images) == 6
    np.testing.assert_array_equal(images.labels, [0, 0, 0, 1, 1, 1])
    picture, label = images[-1]
    assert (picture.shape, picture[0, 0].tolist(), label) == ((4, 5, 3), [1, 2, 0], 1)
    assert images.source == f"folder:{tmp_path}[train]"
    flat = data.load_image_set(f"folder:{tmp_path / 'train'}")
    assert flat.fingerprint == images.fingerprint
    with pytest.raises(IndexError):
        images[6]
    with pytest.raises(FileNotFoundError, match="no image folder"):
        data.load_image_set(f"folder:{tmp_path}", split="validation")


def test_splits_are_not_taken_for_classes(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog", ".ipynb_checkpoints"):
            save(tmp_path / split / name / "one.png")
        (tmp_path / split / ".DS_Store").write_bytes(b"")
    with pytest.raises(ValueError, match="split: expected one of train, val, the splits"):
        data.load_image_set(f"folder:{tmp_path}")
    validation = data.load_image_set(f"folder:{tmp_path}", split="val")
    assert validation.class_names == ("cat", "dog")
    # A class may have the name of a split.
    save(tmp_path / "train" / "engine.png")
    (tmp_path / "val").rename(tmp_path / "ship")
    assert data.load_image_set(f"folder:{tmp_path}").class_names == ("ship", "train")


def test_pictures_of_every_kind_are_read_and_others_counted(tmp_path, caplog):
    for suffix in ("webp", "bmp", "gif"):
        save(tmp_path / "cat" / f"a.{suffix}", (255, 255, 255))
    for name in ("b.heic", "c.heic", "notes"):
        (tmp_path / "cat" / name).write_text("")
    images = data.load_image_set(f"folder:{tmp_path}")
    assert [images[i][0].mean() for i in range(len(images))] == [255, 255, 255]
    assert "skipped 3 files" in caplog.text
    assert "2 .heic, 1 without one" in caplog.text


def test_numbered_folders_are_sorted_as_numbers(tmp_path):
    for name in ("0", "1", "2", "10"):
        save(tmp_path / name / "a.png")
    assert data.load_image_set(f"folder:{tmp_path}").class_names == ("0", "1", "2", "10")


def test_slices_and_choices_are_other_sets(tmp_path):
    images = data.load_image_set(f"folder:{folders(tmp_path)}", split="train")
    part = data.load_image_set(f"folder:{tmp_path}", split="train[50%:]")
    np.testing.assert_array_equal(part.labels, [1, 1, 1])
    assert part.fingerprint == images[3:].fingerprint != images.fingerprint
    chosen = images.select([4, 0])
    np.testing.assert_array_equal(chosen.labels, [1, 0])
    assert chosen[0][0][0, 0].tolist() == [1, 1, 0]
    assert chosen.fingerprint != images.select([0, 4]).fingerprint
    assert "2 pictures of 2 classes" in repr(chosen)
    save(tmp_path / "train" / "cat" / "3.png")
    again = data.load_image_set(f"folder:{tmp_path}", split="train")
    assert again.fingerprint != images.fingerprint


def test_what_is_transparent_lies_on_white(tmp_path):
    save(tmp_path / "a" / "clear.png", (10, 10, 10, 0), mode="RGBA")
    save(tmp_path / "a" / "grey.png", 7, mode="L")
    images = data.load_image_set(f"folder:{tmp_path}")
    assert images[0][0][0, 0].tolist() == [255, 255, 255]
    assert images[1][0][0, 0].tolist() == [7, 7, 7]


def test_a_picture_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "a" / "broken.png")
    images = data.load_image_set(f"folder:{tmp_path}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read as an image"):
        images[0]
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"broken\.png: cannot be read as an image"):
        images[0]


def test_synthetic_pictures_are_the_same_every_time():
    first, second, other = (
        data.load_image_set("synthetic:5", split=split)
        for split in ("train[10:20]", "train[10:20]", "test[10:20]")
    )
    assert (len(first), len(first.class_names), first[0][0].dtype) == (10, 5, np.uint8)
    np.testing.assert_array_equal(first[3][0], second[3][0])
    assert (other[3][0] != first[3][0]).any()


def test_unknown_sources_are_named():
    for spec in ("cifar", "folder:", "tfds:", "synthetic:many"):
        with pytest.raises(ValueError, match=r"unknown image source .*recognition:NAME"):
            data.load_image_set(spec)
    with pytest.raises(ValueError, match="stamps has only the split 'all', got 'train'"):
        data.load_image_set("stamps", split="train")


def stamps(root):
    for folder in _image_set.STAMPS:
        for i in range(2):
            path = save(root / folder / "deeper" / f"{i}.png", (i, 0, 0))
            path.with_suffix(".txt").write_text(f" A {path.parent.parent.name}.\nfr.utf8=Un ...\n")
        save(root / folder / "0_mirrored.png")
    return root


def test_stamps_have_captions(tmp_path):
    images = data.load_image_set(f"stamps:{stamps(tmp_path)}")
    assert len(images) == 28
    assert images.class_names[:3] == ("birds", "insects", "mammals")
    assert images.captions[:2] == ("A birds.", "A birds.")
    assert images.select([27]).captions == ("A vehicles.",)
    assert np.bincount(images.labels).tolist() == [2] * 14
    with pytest.raises(FileNotFoundError, match="stamps is missing: apt-get install tuxpaint"):
        data.load_image_set(f"stamps:{tmp_path / 'nowhere'}")


def emoji(root, vendor):
    def entry(number, category, **lacking):
        has = {
            f"has_img_{v}": v not in lacking.get("without", ()) for v in _image_set.EMOJI_VENDORS
        }
        name = None if number == 2 else f"FACE {number}"
        image = f"{number}.png"
        record = dict(category=category, sort_order=9 - number, unified=f"{number}", image=image)
        return has | record | dict(name=name, short_name="short")

    entries = [
        entry(1, "Smileys"),
        entry(2, "Animals"),
        entry(3, "Smileys", without=("apple",)),
        entry(4, "Component"),
        entry(5, "Smileys"),
    ]
    (root / "img" / vendor / "64").mkdir(parents=True)
    for number in range(1, 6):
        save(root / "img" / vendor / "64" / f"{number}.png", (number, 0, 0))
    (root / "emoji.json").write_text(json.dumps(entries))
    return root


def test_the_same_emoji_have_the_same_row_whoever_draws_them(tmp_path):
    sets = [
        data.load_image_set(f"emoji:{vendor}:{emoji(tmp_path / vendor, vendor)}")
        for vendor in ("apple", "google")
    ]
    for images in sets:
        assert images.class_names == ("Animals", "Smileys")
        assert images.captions == ("face 5", "short", "face 1")
        np.testing.assert_array_equal(images.labels, [1, 0, 1])
        assert images[0][0][0, 0].tolist() == [5, 0, 0]
    with pytest.raises(ValueError, match=r"emoji: expected one of apple, .*, got 'nokia'"):
        data.load_image_set("emoji:nokia")
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-datasource-twitter@16\.0\.0"):
        data.load_image_set("emoji:twitter", data_dir=tmp_path)


def package(monkeypatch, tmp_path, name):
    root = tmp_path / name
    (root / "data").mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    return root / "data"


def zhou(home, which, parts):
    for part in parts.values():
        for file, _, _ in part:
            save(home / which.images / file)
    (home / which.split_file).write_text(json.dumps(parts))


def test_splits_of_coop(tmp_path):
    which = data.RECOGNITION_SETS["eurosat"]
    parts = {
        "train": [["River/1.png", 1, "River"], ["Forest/1.png", 0, "Forest"]],
        "val": [["River/2.png", 1, "River"]],
        "test": [["Sea/3.png", 2, "SeaLake"]],
    }
    zhou(tmp_path / which.folder, which, parts)
    spec = f"recognition:eurosat:{tmp_path}"
    images = data.load_image_set(spec, split="train")
    assert images.class_names == ("Forest", "River", "Sea Lake")
    np.testing.assert_array_equal(images.labels, [1, 0])
    assert images[0][0].shape == (4, 5, 3)
    np.testing.assert_array_equal(data.load_image_set(spec, split="test").labels, [2])
    with pytest.raises(ValueError, match="has the splits train, val, test, not 'all'"):
        data.load_image_set(spec)
    with pytest.raises(FileNotFoundError, match=r"is split by .*split_zhou_Describable"):
        data.load_image_set(f"recognition:dtd:{tmp_path}", split="test")


def test_aircraft_have_lists_of_their_own(tmp_path):
    home = tmp_path / "fgvc_aircraft"
    for name in ("007", "008"):
        save(home / "images" / f"{name}.jpg")
    (home / "variants.txt").write_text("707-320\nF-16A/B\n")
    (home / "images_variant_test.txt").write_text("007 F-16A/B\n008 707-320\n")
    images = data.load_image_set(f"recognition:fgvc_aircraft:{tmp_path}", split="test")
    assert images.class_names == ("707-320", "F-16A/B")
    np.testing.assert_array_equal(images.labels, [1, 0])
    with pytest.raises(FileNotFoundError, match=r"needs .*images_variant_val\.txt"):
        data.load_image_set(f"recognition:fgvc_aircraft:{tmp_path}", split="val")
    with pytest.raises(ValueError, match="is not in tfds: put fgvc_aircraft as CoOp has it into"):
        data.load_image_set("recognition:fgvc_aircraft", split="test", data_dir=tmp_path)
    (tmp_path / "downloads" / "manual").mkdir(parents=True)
    home.rename(tmp_path / "downloads" / "manual" / "fgvc_aircraft")
    again = data.load_image_set("recognition:fgvc_aircraft", split="test", data_dir=tmp_path)
    assert again.fingerprint == images.fingerprint


def test_imagenet_takes_names_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    home = tmp_path / "imagenet"
    for name in ("n01440764", "n01443537"):
        save(home / "images" / "val" / name / "a.png")
    spec = f"recognition:imagenet:{tmp_path}"
    images = data.load_image_set(spec, split="test")
    assert images.class_names == ("n01440764", "n01443537")
    with pytest.raises(ValueError, match="n01440764 is a WordNet id"):
        data.RECOGNITION_SETS["imagenet"].prompts(images.class_names)
    (home / "classnames.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    named = data.load_image_set(spec, split="test")
    assert named.class_names == ("tench", "goldfish")
    assert named.fingerprint == images.fingerprint
    # ImageNet-V2 numbers its folders in the same order.
    v2 = data.RECOGNITION_SETS["imagenet_v2"]
    for name in ("0", "1"):
        save(tmp_path / v2.folder / v2.images / name / "a.png")
    (tmp_path / v2.folder / "classnames.txt").write_text("n01440764 tench\nn01443537 goldfish\n")
    images = data.load_image_set(f"recognition:imagenet_v2:{tmp_path}", split="test")
    assert images.class_names == ("tench", "goldfish")
    (home / "classnames.txt").write_text("n01440764 tench\n")
    with pytest.raises(ValueError, match="does not name the class n01443537"):
        data.load_image_set(spec, split="test")


def test_imagenet_takes_names_out_of_open_clip_without_importing_it(tmp_path, monkeypatch):
    root = package(monkeypatch, tmp_path, "open_clip").parent
    (root / "zero_shot_metadata.py").write_text(
        "T = (lambda c: 1 / 0,)\nIMAGENET_CLASSNAMES = ('tench', 'goldfish')\n"
    )
    names = [
        _recognition.class_names_of("imagenet", classes, epath.Path(tmp_path))
        for classes in (("n01443537", "n01440764"), ("1", "0"), ("n01443537",))
    ]
    # WordNet's numbers are told apart only where all of them are there.
    assert names == [("goldfish", "tench"), ("goldfish", "tench"), ("n01443537",)]


def test_prompts_of_every_set():
    assert len(data.RECOGNITION_SETS) == 13
    for name, which in data.RECOGNITION_SETS.items():
        (prompts,) = which.prompts(["big_dog"])
        assert all("big dog" in prompt for prompt in prompts), name
        assert len(prompts) == (7 if name.startswith("imagenet") else 1)
        if which.tfds:
            assert (
                _recognition.tfds_source(name, "test", epath.Path("."))[0] == f"tfds:{which.tfds}"
            )
    pets = data.RECOGNITION_SETS["oxford_pets"].prompts(["Maine_Coon"])
    assert pets == [["a photo of a Maine Coon, a type of pet."]]
    with pytest.raises(ValueError, match="has the splits train, test in tfds, not 'val'"):
        _recognition.tfds_source("imagenet", "val", epath.Path("."))
    with pytest.raises(ValueError, match=r"expected one of imagenet, .*, got 'mnist'"):
        data.load_image_set("recognition:mnist", split="test")


def test_names_of_sets_are_known_to_tfds():
    # In a process of its own: tfds's registry does not bear what other tests do to it.
    code = (
        "import json, tensorflow_datasets as tfds;"
        "print(json.dumps(tfds.list_builders(with_community_datasets=False)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    builders = set(json.loads(done.stdout.splitlines()[-1]))
    for which in data.RECOGNITION_SETS.values():
        if which.tfds:
            assert which.tfds.partition(":")[0] in builders

"""Pictures of prepared tfds datasets, with masks and second labels beside them."""

import io
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from logitjax import data

COUNT = 9


def colour(i: int) -> tuple[int, int, int]:
    return (i * 20, 0, 0)


class Dtd(tfds.core.GeneratorBasedBuilder):
    """Has the name of a recognition set, and what the pets have beside the picture."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "mask": tfds.features.Image(shape=(None, None, 1)),
            "label": tfds.features.ClassLabel(names=["polka_dotted", "veined"]),
            "kind": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "test": self._generate_examples(100)}

    def _generate_examples(self, first):
        for i in range(COUNT):
            files = {}
            for key, mode, value in (("image", "RGB", colour(i)), ("mask", "L", 1)):
                files[key] = io.BytesIO()
                Image.new(mode, (6 + i, 5), value).save(files[key], "PNG")
                files[key].seek(0)
            yield first + i, files | {"label": i % 2, "kind": i % 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    builder = Dtd(data_dir=os.fspath(root), file_format="array_record")
    builder.download_and_prepare(file_format="array_record")
    return root


def test_the_picture_and_the_label_are_found(root):
    images = data.load_image_set("tfds:dtd", split="train", data_dir=root)
    assert (len(images), images.class_names) == (COUNT, ("polka_dotted", "veined"))
    for row in range(COUNT):
        picture, label = images[row]
        i = picture.shape[1] - 6
        assert picture.shape == (5, 6 + i, 3)
        assert picture[0, 0].tolist() == list(colour(i))
        assert label == i % 2 == images.labels[row]
    part = data.load_image_set("tfds:dtd", split="train[3:5]", data_dir=root)
    np.testing.assert_array_equal(part.labels, images.labels[3:5])
    np.testing.assert_array_equal(part[0][0], images[3][0])
    other = data.load_image_set("tfds:dtd", split="test", data_dir=root)
    assert len({images.fingerprint, part.fingerprint, other.fingerprint}) == 3


def test_recognition_sets_read_tfds_and_name_classes(root):
    images = data.load_image_set("recognition:dtd", split="test[:4]", data_dir=root)
    assert images.class_names == ("polka dotted", "veined")
    assert (len(images), images.source) == (4, "recognition:dtd[test[:4]]")
    whole = data.load_image_set("tfds:dtd", split="test[:4]", data_dir=root)
    assert images.fingerprint == whole.fingerprint
    with pytest.raises(FileNotFoundError, match="prepare food101`"):
        data.load_image_set("recognition:food101", split="test", data_dir=root)

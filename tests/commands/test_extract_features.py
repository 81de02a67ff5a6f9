"""Extraction end to end: two processes equal one, a second run adds, and mismatches are said."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from logitjax import data, few_shot, storage, vision

SPEC = "random:resnet8"


@pytest.fixture(scope="module")
def encoder():
    return vision.load_encoder(SPEC, size=16)


def images(split="test[:12]"):
    return data.load_image_set("synthetic:4", split=split)


def test_a_cache_holds_what_the_encoder_says(tmp_path, encoder):
    views = data.ImageViews.of(encoder, "random:2", seed=3)
    rows = [1, 4, 5, 11]
    cache = few_shot.extract_features(
        encoder, images(), tmp_path, views=views, rows=rows, batch_size=3, dtype="float32"
    )
    cached = cache.read(rows)
    pixels = np.concatenate([views(images()[row][0], row=row) for row in rows])
    features, logits = encoder.encode(pixels)
    np.testing.assert_allclose(cached.features.reshape(8, -1), features, atol=1e-5)
    np.testing.assert_allclose(cached.logits.reshape(8, -1), logits, atol=1e-5)
    np.testing.assert_array_equal(cached.labels, images().labels[rows])
    assert cache.class_names == ("0", "1", "2", "3")
    # More rows are added; those there stay.
    more = few_shot.extract_features(
        encoder, images(), tmp_path, views=views, rows=[0, 4], batch_size=3, dtype="float32"
    )
    np.testing.assert_array_equal(more.row_numbers, [0, 1, 4, 5, 11])
    np.testing.assert_array_equal(more.read(rows).features, cached.features)


def test_mismatches_are_said(tmp_path, encoder):
    options = dict(rows=[0, 1], batch_size=2)
    plain = data.ImageViews.of(encoder, "plain")
    few_shot.extract_features(encoder, images(), tmp_path, views=plain, **options)
    other_size = vision.load_encoder(SPEC, size=24)
    for who, what, views, message in [
        (encoder, images(), data.ImageViews.of(encoder, "plain", fit="pad"), "its views is"),
        (
            other_size,
            images(),
            data.ImageViews.of(other_size, "plain"),
            "its views is 'plain 16 px",
        ),
        (encoder, images("test[:10]"), plain, "its data is .*; its data_fingerprint is"),
        (vision.load_encoder("random:resnet14", size=16), images(), plain, "its encoder is"),
        (vision.load_encoder(SPEC, size=16, dtype="bfloat16"), images(), plain, "compute_dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            few_shot.extract_features(who, what, tmp_path, views=views, **options)
    with pytest.raises(ValueError, match="its dtype is 'float16', not 'float32'"):
        few_shot.extract_features(
            encoder, images(), tmp_path, views=plain, dtype="float32", **options
        )
    with pytest.raises(ValueError, match="views: expected plain or random:COUNT, got 'random'"):
        data.ImageViews.of(encoder, "random")


def test_rows_of_a_set():
    some = images("test[:40]")
    chosen = some.choose("per_class:2", seed=1)
    np.testing.assert_array_equal(np.bincount(some.labels[chosen]), [2, 2, 2, 2])
    assert (np.diff(chosen) > 0).all()
    assert (chosen != some.choose("per_class:2", seed=2)).any()
    # A class has what it has.
    assert len(some.choose("per_class:100")) == 40
    np.testing.assert_array_equal(some.choose("3"), [0, 1, 2])
    np.testing.assert_array_equal(some.choose("all"), np.arange(40))
    for wrong in ("some", "per_class:0", "per_class:", "-3", "per_image:2"):
        with pytest.raises(ValueError, match="rows: expected all, a number or per_class:N"):
            some.choose(wrong)


def start(workdir, *arguments):
    command = [
        *(sys.executable, "-m", "logitjax", "extract-features"),
        *("--encoder=random:resnet8", "--data=synthetic:4", "--split=test", "--views=plain"),
        *("--views=random:2", "--rows=per_class:3", "--size=16", "--batch_size=4"),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(
        [*command, f"--out={workdir}", *arguments],
        cwd=root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.every_change
@pytest.mark.slow
def test_two_processes_equal_one_and_errors_take_one_line(tmp_path):
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    many = [
        start(
            tmp_path / "two",
            f"--coordinator_address=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
        )
        for i in range(2)
    ]
    for process in many:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    one = start(tmp_path / "one")
    output, _ = one.communicate(timeout=300)
    assert one.returncode == 0, output
    assert "| random_resnet8/test_plain" in output
    for name in ("test_plain", "test_random_2"):
        caches = [
            few_shot.FeatureCache(epath.Path(tmp_path) / n / "random_resnet8" / name)
            for n in ("one", "two")
        ]
        assert caches[0].identity == caches[1].identity
        assert len(caches[0]) == len(caches[1]) == 12
        np.testing.assert_allclose(caches[0].all().features, caches[1].all().features, atol=1e-3)
        np.testing.assert_array_equal(caches[0].all().labels, caches[1].all().labels)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["data"] == "synthetic:4"
    # The weights changed behind the workdir's back.
    manifest = tmp_path / "one" / "random_resnet8" / "test_plain" / "manifest.json"
    record = storage.read_json(manifest)
    record["made_from"]["encoder_fingerprint"] = "other"
    manifest.write_text(json.dumps(record))
    again = start(tmp_path / "one")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 2
    last = output.strip().splitlines()[-1]
    assert last.startswith("error: feature cache")
    assert "its encoder_fingerprint is 'other', not" in last

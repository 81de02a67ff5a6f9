"""The few-shot experiment: what it samples, tunes, compares and resumes."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from experiments.few_shot import __main__ as few_shot
from experiments.few_shot import arms as few_shot_arms
from experiments.few_shot import config as few_shot_config
from experiments.few_shot import data as few_shot_data
from experiments.few_shot import report, samples, train
from experiments.few_shot import sources as few_shot_sources
from experiments.few_shot import synsets as few_shot_synsets
from logitjax import data, storage, training, vision
from logitjax.few_shot._sweep import with_settings
from logitjax.vision._preprocessing import Preprocessing


def never(step: int) -> bool:
    return False


@pytest.mark.slow
def test_smoke_through_the_command_line_and_again_without_training(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    command = [sys.executable, "-m", "experiments.few_shot", "--preset=smoke"]
    command.append(f"--workdir={workdir}")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    text = (workdir / "report.md").read_text()
    assert done.stdout.strip() == text.strip()
    assert "| amu " in text
    assert "### Scored on noisier" in text
    assert (workdir / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(
        [*command, "--seed=7"], env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "with another seed" in again.stderr


TINY = few_shot.Config(
    data=("synthetic:4",),
    shots=(1, 2),
    runs=2,
    at_once=2,
    epochs=1,
    steps=2,
    arm=("amu", "fixed"),
    mesh="data:2,fsdp:4",
)


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(tmp_path):
    def without_clocks(results):
        return json.loads(json.dumps(results), object_hook=lambda x: {**x, "seconds": 0})

    whole = train.train_all(TINY, epath.Path(tmp_path) / "a", never)
    halted = epath.Path(tmp_path) / "b"
    with pytest.raises(training.Preempted):
        train.train_all(TINY, halted, lambda step: step == 3)
    kept = sorted(path.name for path in (halted / "results" / "synthetic_4").iterdir())
    assert kept == ["amu_1.json", "amu_2.json", "fixed_1.json"]
    resumed = train.train_all(TINY, halted, never)
    assert without_clocks(resumed) == without_clocks(whole)
    # What is there is read and not trained again.
    path = halted / "results" / "synthetic_4" / "amu_2.json"
    other = storage.read_json(path) | {"test": [0.25, 0.5]}
    path.unlink()
    storage.kept(path, lambda: other)
    read = train.train_all(TINY, halted, never)
    assert read["synthetic:4"]["amu"][2]["test"] == [0.25, 0.5]


def test_samples_are_nested_and_never_overlap():
    task = few_shot_data.synthetic("synthetic:3")
    drawn = {n: samples.rows_of_run(task, n, run=1, seed=0) for n in (1, 4, 16)}
    for seen, validation, test in drawn.values():
        assert sorted([*seen, *validation, *test]) == list(range(len(task.train_labels)))
        np.testing.assert_array_equal(validation, drawn[1][1])
    assert set(drawn[1][0]) < set(drawn[4][0]) < set(drawn[16][0])
    assert np.bincount(task.train_labels[drawn[4][0]]).tolist() == [4, 4, 4]
    one, four = (samples.draw(task, n, runs=range(2), most=16) for n in (1, 4))
    shapes = [jax.tree.map(np.shape, (sample.task, sample.held_out)) for sample in (one, four)]
    assert shapes[0] == shapes[1]
    assert ((one.task.labels >= 0).sum(1) == 3).all()
    images, labels = four.held_out["test"]
    right = task.plain.auxiliary[samples.rows_of_run(task, 4, run=0, seed=0)[2]]
    np.testing.assert_array_equal(images.auxiliary[0][: len(right)], right)
    assert (labels[0][len(right) :] == -1).all()
    few = dataclasses.replace(task, train_labels=np.arange(len(task.train_labels)) // 60)
    with pytest.raises(ValueError, match="too few"):
        samples.rows_of_run(few, 1, run=0, seed=0)


@pytest.mark.parametrize("grid", ["small", "full"])
def test_every_tuned_arm_tries_as_many_settings(grid: Any):
    config = few_shot.Config(grid=grid)
    arms = few_shot_arms.arms(config)
    assert sorted(arms) == sorted(few_shot_config.ARMS)
    for name, arm in arms.items():
        one = arm.candidate
        columns = one.grid or {}
        tuned = name in few_shot_config.METHODS
        assert {len(column) for column in columns.values()} == (
            {{"small": 4, "full": 12}[grid]} if tuned else set()
        )
        rows = list(zip(*columns.values()))
        assert len(set(rows)) == len(rows), name
        with_settings(one.method, one.recipe, dict.fromkeys(columns, 0.5))


@pytest.mark.every_change
@pytest.mark.slow
def test_pictures_become_a_task_with_views_and_a_shifted_test(tmp_path, monkeypatch):
    classes = 3
    model = nnx.jit(
        lambda: vision.ImageClassifier.create("resnet8", num_classes=1000, rngs=nnx.Rngs(0))
    )()
    encoder = vision.Encoder(
        "tiny", model, Preprocessing(size=16, resize=16), num_features=64, num_classes=1000
    )
    monkeypatch.setattr(vision, "load_encoder", lambda spec, size=None: encoder)
    source = few_shot_sources.Source(
        data=f"synthetic:{classes}",
        train="train[:24]",
        test="test[:9]",
        size=16,
        synsets={"0": "1 5-6", "1": "7", "2": "8-9"},
        shifted={"elsewhere": (f"synthetic:{classes}", "test[9:15]")},
    )
    monkeypatch.setitem(few_shot_sources.SOURCES, "dots", source)
    config = few_shot.Config(
        data=("dots",), features=str(tmp_path), views="random:2", encode_batch=3
    )
    task = few_shot_data.load_task(config, "dots")
    assert task.train.zero_shot.shape == (2, 24, classes)
    assert task.plain.features.shape == (24, 64)
    assert task.test is not None
    assert task.test[0].auxiliary.shape == (9, 64)
    assert task.shifted["elsewhere"][1].shape == (6,)
    np.testing.assert_allclose(np.linalg.norm(task.plain.features, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(task.class_weights, axis=0), 1, rtol=1e-5)
    # The zero-shot score of a class is the probability of its ImageNet classes.
    pictures = data.load_image_set(source.data, split="test[:9]")
    pixels = np.stack([pictures[i][0] for i in range(9)])
    p = np.exp(encoder.logits(pixels))
    p /= p.sum(1, keepdims=True)
    expected = np.stack([p[:, [1, 5, 6]].sum(1), p[:, 7], p[:, [8, 9]].sum(1)], 1)
    np.testing.assert_allclose(np.exp(task.test[0].zero_shot), expected, rtol=2e-2)
    nameless = dataclasses.replace(source, synsets=None)
    monkeypatch.setitem(few_shot_sources.SOURCES, "dots", nameless)
    with pytest.raises(ValueError, match="neither text nor an ImageNet head"):
        few_shot_data.load_task(config, "dots")


def test_synsets_are_numbers_and_ranges():
    ids = few_shot_synsets.ids_of({"a": "3 1-2", "b": "7"}, ["b", "a"])
    assert [rows.tolist() for rows in ids] == [[7], [1, 2, 3]]
    with pytest.raises(ValueError, match="'c'"):
        few_shot_synsets.ids_of({"a": "3"}, ["c"])
    for table in few_shot_synsets.TABLES.values():
        rows = np.concatenate(few_shot_synsets.ids_of(table, list(table)))
        assert rows.min() >= 0
        assert rows.max() < 1000
        assert len(np.unique(rows)) == len(rows)


def record(*test: float, zero_shot: float = 0.5, **more) -> dict:
    columns = {"test": list(test), "zero_shot": [zero_shot] * len(test), "shifted": {}}
    columns |= {"grid": {"beta": [0.5, 1.0, 2.0]}, "updates": 700}
    return columns | {"auxiliary": list(test), "seconds": 1.0} | more


def test_the_report_says_what_each_arm_got_and_what_was_published():
    stamps = {
        "amu": {1: record(0.70, 0.72), 4: record(0.75, 0.77)},
        "fixed": {1: record(0.70, 0.71), 4: record(0.74, 0.742)},
    }
    parts = "\n".join(report._of_data_set("stamps", stamps))
    assert "| 4 shots     | settings | updates |" in parts
    assert "| 3        | 700     |" in parts
    assert "+0.5" in parts
    elsewhere = {"imagenet_v2": {"test": [0.5, 0.6], "zero_shot": [0.4, 0.4]}}
    imagenet = {"amu": {16: record(0.6, 0.7, shifted=elsewhere)}}
    parts = "\n".join(report._of_data_set("imagenet", imagenet))
    assert "70.0 " in parts
    assert "58.6 " in parts
    everything = dict.fromkeys(few_shot_sources.CLIP_SOURCES, imagenet)
    rows = report.means(everything)
    assert rows[0]["16 shots"] == "65.0 +- 7.1"
    assert rows[1] == {"arm": "amu, published", "16 shots": "79.4"}


def test_mistakes_in_the_configuration_are_named():
    with pytest.raises(ValueError, match="expected one of stamps"):
        few_shot_sources.source_of("cifar")
    name, source = few_shot_sources.source_of("ucf101=folder:frames")
    assert (name, source.data, source.test) == ("ucf101", "folder:frames", "test")

"""Files that are whole or not there, and the digests and manifests that say what they hold."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from logitjax import storage


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = epath.Path(tmp_path) / "deep" / "file"
    storage.write_atomic(path, "old")

    def fails(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        storage.write_atomic(path, fails)
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    assert path.read_text() == "old"
    storage.write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"


def test_a_killed_writer_leaves_no_part_under_the_name(tmp_path):
    script = """
import os, sys
from logitjax.storage import write_atomic
def killed(file):
    file.write(b"half"); file.flush(); os.kill(os.getpid(), 9)
write_atomic(sys.argv[1], killed)
"""
    path = tmp_path / "file"
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert not path.exists()


@dataclasses.dataclass
class Options:
    k: int
    names: tuple


DIFFERENT = [
    None,
    0,
    0.0,
    False,
    "",
    b"",
    "0",
    [],
    [[]],
    ["ab"],
    ["a", "b"],
    {"a": 1},
    {"a": "1"},
    {"a": {"b": 1}},
    np.zeros(3),
    np.zeros(3, np.float32),
    np.zeros((3, 1)),
    np.arange(3),
    float("nan"),
]


def test_what_differs_has_another_digest():
    digests = [storage.digest(value) for value in DIFFERENT]
    digests += [storage.digest("a", "b"), storage.digest("ab"), storage.digest("a", None, "b")]
    assert len(set(digests)) == len(digests)


def test_what_is_the_same_has_one_digest(tmp_path):
    same = [
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ((1, 2), [1, 2]),
        (Options(3, ("x",)), {"k": 3, "names": ["x"]}),
        (np.float32(0.5), 0.5),
        (jnp.arange(4), np.arange(4, dtype=np.int32)),
        (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T.copy()),
        (jax.random.key(3), jax.random.key(3)),
    ]
    for one, other in same:
        assert storage.digest(one) == storage.digest(other)
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(b"content")
    assert storage.digest(tmp_path / "one") == storage.digest(tmp_path / "two")
    with pytest.raises(TypeError, match=r"expected numbers, .* got object"):
        storage.digest({"a": [object()]})


def test_digests_stay_the_same_from_run_to_run():
    # Fixed: a cache must be found again by the next process, and by the next version.
    assert storage.digest({"k": 4, "x": np.arange(3)})[:16] == "612779dbaf17b5d4"
    many = np.arange(640 * 70, dtype=np.int32).reshape(640, 70)
    assert storage.digest(many, sample=128)[:16] == "4e40f3047a5035d3"


def test_a_sampled_digest_sees_any_training():
    weights = np.random.default_rng(0).normal(size=(500, 300)).astype(np.float32)
    whole = storage.digest(weights, sample=64)
    assert storage.digest(weights * np.float32(1.001), sample=64) != whole
    assert storage.digest(weights[:-1], sample=64) != whole
    assert storage.digest(jnp.asarray(weights), sample=64) == whole


MADE = {"data": "d", "tokenizers": {"a": ["x", True], "b": ["y", False]}, "k": 4, "name": "n"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "e"}, r"its data is 'd', not 'e' \("),
        ({"k": 5, "data": "e"}, r"its data is 'd', not 'e'; its k is 4, not 5 \("),
        ({"tokenizers": {"a": ["x", True]}}, r"its tokenizers.b is \['y', False\], not None \("),
        ({"tokenizers": MADE["tokenizers"] | {"c": 1}}, r"its tokenizers.c is None, not 1 \("),
        ({"other": 1}, r"its other is None, not 1 \("),
        ({"k": 3}, r"its k is 4, not 3 \("),
        ({"k": {"a": 1}}, r"its k is 4, not {'a': 1} \("),
    ],
)
def test_a_manifest_refuses_what_it_was_not_made_for(tmp_path, changes, message):
    storage.Manifest(tmp_path, "table").write(MADE, {"rows": 3})
    assert storage.Manifest(tmp_path, "table").check(MADE)["rows"] == 3
    with pytest.raises(ValueError, match=f"^table \\S+ does not fit: {message}"):
        storage.Manifest(tmp_path, "table").check(MADE | changes)


def test_a_manifest_may_hold_more_and_names_may_change_with_the_same_digest(tmp_path):
    storage.Manifest(tmp_path, "table").write(MADE)
    storage.Manifest(tmp_path, "table").check({"k": 3}, at_least=("k",))
    for more in ({"k": 5}, {"other": 1}):
        with pytest.raises(ValueError, match="does not fit"):
            storage.Manifest(tmp_path, "table").check(more, at_least=("k", "other"))
    renamed = {"name": "moved", "data": "d"}
    storage.Manifest(tmp_path, "table").check(renamed, names_of={"name": "data"})
    with pytest.raises(ValueError, match="its name is 'n', not 'moved'"):
        storage.Manifest(tmp_path, "table").check(
            renamed | {"data": "e"}, names_of={"name": "data"}
        )
    with pytest.raises(ValueError, match="expected a chair, got a table"):
        storage.Manifest(tmp_path, "chair").read()
    assert storage.Manifest(tmp_path, "table").exists()
    assert not storage.Manifest(tmp_path / "other", "table").exists()


@pytest.mark.parametrize(("kind", "said"), [("5", "a 5"), ('"a\\nb"', r"a 'a\\nb'")])
def test_a_manifest_of_another_kind_is_named_in_one_line(tmp_path, kind, said):
    path = tmp_path / "manifest.json"
    path.write_text(f'{{"kind": {kind}, "format": 1, "made_from": {{}}}}')
    with pytest.raises(ValueError, match=f"expected a table, got {said}$"):
        storage.Manifest(tmp_path, "table").read()

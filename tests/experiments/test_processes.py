"""What the processes of a run agree on, with two of them."""

import json
import sys

import numpy as np
import pytest

from tests.training.test_processes import launch

# Of each process: what all have to say alike.
SCRIPT = """
import sys
import jax, numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec as P
from experiments import _processes
from logitjax import training

training.distributed.initialize()
index, workdir = jax.process_index(), epath.Path(sys.argv[1])
said = _processes.said_by_first(lambda: {"from": index, "nan": float("nan"), "text": "ä" * 300})
assert said["from"] == 0 and said["nan"] != said["nan"] and said["text"] == "ä" * 300, said
assert _processes.agreed(index == 0) and not _processes.agreed(index == 1)

mesh = training.make_mesh("data:2,fsdp:2")
whole = np.arange(8.0, dtype=np.float32).reshape(4, 2)
for spec in (P(), P(("data", "fsdp"))):
    tree = {"x": jax.make_array_from_callback(
        whole.shape, NamedSharding(mesh, spec), lambda at: whole[at])}
    here = _processes.held_here(tree)["x"]
    assert here.is_fully_addressable and len(here.devices()) == 1
    np.testing.assert_array_equal(here, whole)

folder = workdir / "folder"
_processes.by_first("made", lambda: folder.mkdir(parents=True))
assert folder.exists()
_processes.wait_for_all("seen")
_processes.remove(folder)
assert not folder.exists()
_processes.remove(folder)
_processes.write_json(workdir / f"from-{index}.json", index)
_processes.wait_for_all("written")
assert [path.name for path in workdir.glob("*.json")] == ["from-0.json"]
print("agreed")
"""


@pytest.mark.slow
def test_two_processes_agree(tmp_path):
    done = launch(2, 2, sys.executable, "-c", SCRIPT, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agreed") == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "flags", "made"),
    [
        ("leakage_audit", ("--policy=full", "--policy=round_2"), "policies/*.json"),
        ("replication", ("--arm=recovered_2", "--arm=scratch_1"), "arms/*.json"),
    ],
)
def test_processes_take_turns_at_what_needs_one_device(tmp_path, experiment, flags, made):
    reports = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        command = (sys.executable, "-m", f"experiments.{experiment}", "--preset=smoke", *flags)
        done = launch(processes, 1, *command, f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr[-3000:]
        found = sorted(workdir.glob(made))
        assert len(found) == 2
        reports.append([json.loads(path.read_text()) for path in found])
    for one, two in zip(*reports, strict=True):
        for name in ("leak", "dimension", "nll", "trained"):
            if name in one:
                np.testing.assert_allclose(two[name], one[name], rtol=1e-4)

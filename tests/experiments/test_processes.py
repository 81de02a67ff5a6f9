"""What the processes of a run agree on, with two of them."""

import sys

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
def test_an_experiment_of_one_device_refuses_several_processes(tmp_path):
    command = (sys.executable, "-m", "experiments.leakage_audit", "--preset=smoke")
    done = launch(2, 1, *command, f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "runs as one process, not as 2: start it once" in done.stderr
    assert not (tmp_path / "config.json").exists()

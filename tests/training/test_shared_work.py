"""Agreement among the processes of a run, with two of them."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.training.test_processes import launch

# Of each process: what all have to say alike.
SCRIPT = """
import sys
import jax, numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec as P
from logitjax import processes, training

training.distributed.initialize()
index, workdir = jax.process_index(), epath.Path(sys.argv[1])
first = processes.broadcast_from_first
said = first(lambda: {"from": index, "nan": float("nan"), "text": "ä" * 300})
assert said["from"] == 0 and said["nan"] != said["nan"] and said["text"] == "ä" * 300, said
assert first(lambda: index == 0) and not first(lambda: index == 1)

mesh = training.make_mesh("data:2,fsdp:2")
whole = np.arange(8.0, dtype=np.float32).reshape(4, 2)
for spec in (P(), P(("data", "fsdp"))):
    tree = {"x": jax.make_array_from_callback(
        whole.shape, NamedSharding(mesh, spec), lambda at: whole[at])}
    here = processes.local_copy(tree)["x"]
    assert here.is_fully_addressable and len(here.devices()) == 1
    np.testing.assert_array_equal(here, whole)

folder = workdir / "folder"
processes.run_on_first("made", lambda: folder.mkdir(parents=True))
assert folder.exists()
processes.barrier("seen")
assert processes.kept(workdir / "one.json", lambda: [index]) == [0]
print("agreed")
"""


@pytest.mark.every_change
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
        ("replication", ("--arm=recovered_2", "--arm=scratch_1", "--mesh=data:-1"), "arms/*.json"),
    ],
)
def test_two_processes_find_what_one_finds(tmp_path, experiment, flags, made):
    reports = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        command = (sys.executable, "-m", f"experiments.{experiment}", "--preset=smoke", *flags)
        done = launch(processes, 1, *command, f"--workdir={workdir}")
        assert done.returncode == 0, done.stderr[-3000:]
        files = sorted(workdir.glob(made))
        assert len(files) == 2
        reports.append([json.loads(path.read_text()) for path in files])
    for one, two in zip(*reports, strict=True):
        for name in ("leak", "dimension", "nll", "trained"):
            if name in one:
                np.testing.assert_allclose(two[name], one[name], rtol=1e-4)


# One process finds an error in what it was given, another waits for it at a barrier.
ALONE = """
import dataclasses
import jax
from logitjax.commands import cli
from logitjax import processes

@dataclasses.dataclass(frozen=True)
class Config:
    error: str = cli.field("", "Of the last process.", choices=("", "ValueError", "KeyError"))

def run(config, workdir):
    if jax.process_index() == 1:
        raise {"ValueError": ValueError, "KeyError": KeyError}[config.error]("no such thing")
    processes.barrier("never")

cli.main(Config, {"only": {}}, run)
"""


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "message"),
    [("ValueError", 2, "process 1: no such thing (details"), ("KeyError", 1, "Traceback")],
)
def test_an_error_of_one_process_ends_the_job(tmp_path, monkeypatch, error, status, message):
    # The usual way out of Python would wait for the other process, which waits for this one.
    monkeypatch.setenv("GRACE", "1")
    done = launch(
        *("2", "1", sys.executable, "-c", ALONE, f"--workdir={tmp_path}", f"--error={error}"),
        timeout=60,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert message in done.stderr
    assert "no such thing" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "reads",
    [
        (),
        # The student writes half of the rows, for two updates at once.
        (
            *("--teacher_reads=live", "--loss=full_kl", "--loss=sampled_kl:0.1"),
            *("--on_policy=0.5", "--generate_every=2"),
        ),
    ],
)
def test_a_teacher_over_the_devices_of_two_processes_teaches_as_one_does(tmp_path, reads):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"paragraph {i} " + "word " * 60 for i in range(60)))
    flags = ("--student=tiny", "--drop_layers=1", f"--data=text:{text}", "--seq_len=64")
    flags += ("--cache_top_k=16", "--steps=4", "--eval_rows=4", "--batch_size=2", *reads)
    weights, written = [], []
    for processes, mesh in ((1, "data:1"), (2, "data:2,tensor:2")):
        out = tmp_path / str(processes)
        command = (sys.executable, "-m", "logitjax", "distill", *flags, f"--mesh={mesh}")
        done = launch(processes, processes, *command, "--teacher_devices=all", f"--out={out}")
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(out / "model" / "model.safetensors"))
        kept = sorted((out / "train").glob("rollouts/*.npz"))
        written.append([np.load(path)["tokens"].tolist() for path in kept])
    assert written[0] == written[1]
    assert len(written[0]) == 2 * bool(reads)
    for name, array in weights[0].items():
        np.testing.assert_allclose(weights[1][name], array, atol=1e-5)

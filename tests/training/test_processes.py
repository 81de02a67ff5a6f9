"""Several processes over loopback, through ``launch/local.sh``."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from logitjax.training import distributed
from tests.training import toy

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = str(ROOT / "launch/local.sh")


def launch(processes, devices, *command, timeout=150):
    return subprocess.run(
        [LAUNCH, str(processes), str(devices), *command],
        cwd=ROOT,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def train(workdir, *options):
    command = (sys.executable, "-m", "tests.training.toy", str(workdir), "--mesh=data:2,fsdp:2")
    return launch(2, 2, *command, *options)


def digests(text):
    return {line.split()[-1] for line in text.splitlines() if "digest" in line}


@pytest.mark.every_change
@pytest.mark.slow
def test_two_processes_train_save_stop_and_resume(tmp_path):
    toy.train(tmp_path / "one", mesh="data:-1")
    whole = train(tmp_path / "two")
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert len(digests(whole.stdout)) == 1
    assert whole.stdout.count("digest") == 2
    np.testing.assert_allclose(
        toy.losses(tmp_path / "two"), toy.losses(tmp_path / "one"), rtol=1e-4
    )

    # SIGTERM to process 1 alone: both save at the same step, and the same command goes on.
    told = train(tmp_path / "told", "--signal=SIGTERM@5@1", "--delay=0.4")
    assert told.returncode == 128 + signal.SIGTERM, told.stderr[-3000:]
    assert told.stderr.count("SIGTERM: stopped after step") == 2
    assert len(toy.losses(tmp_path / "told")) < 12
    again = train(tmp_path / "told")
    assert again.returncode == 0, again.stderr[-3000:]
    assert digests(again.stdout) == digests(whole.stdout)
    assert toy.losses(tmp_path / "told") == toy.losses(tmp_path / "two")

    # One process goes on from what two saved.
    (tmp_path / "two/metrics.jsonl").unlink()
    state = toy.train(tmp_path / "two", mesh="data:4,fsdp:2", steps=12)
    assert int(state.step) == 12


@pytest.mark.slow
def test_mesh_processes_and_checkpoints_may_change_in_the_middle(tmp_path):
    toy.train(tmp_path / "one", mesh="data:2,fsdp:2,tensor:2")
    parts = (
        (2, 2, "--mesh=data:2,fsdp:2", "--steps=4", "--every=4"),
        (4, 1, "--mesh=data:4", "--steps=8", "--every=3"),
        (1, 2, "--mesh=fsdp:2", "--steps=12", "--every=5"),
    )
    for processes, devices, *flags in parts:
        command = (sys.executable, "-m", "tests.training.toy", str(tmp_path / "moved"), *flags)
        run = launch(processes, devices, *command, timeout=280)
        assert run.returncode == 0, run.stderr[-3000:]
    # The same batches in the same order, summed over other devices.
    losses = [toy.losses(tmp_path / name) for name in ("moved", "one")]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.every_change
@pytest.mark.slow
def test_launcher_stops_the_others_and_passes_signals_on():
    failed = launch(
        2, 1, "bash", "-c", 'test "$JAX_PROCESS_ID" = 1 && exit 7; sleep 60', timeout=30
    )
    assert failed.returncode == 7
    text = 'echo "$JAX_NUM_PROCESSES $JAX_NUM_CPU_DEVICES ${JAX_COORDINATOR_ADDRESS%:*}"'
    launched = launch(2, 3, "bash", "-c", text)
    assert sorted(launched.stdout.split("\n")[:2]) == ["[0] 2 3 127.0.0.1", "[1] 2 3 127.0.0.1"]
    assert launch(1, 1).returncode == 2
    command = [LAUNCH, "2", "1", "bash", "-c", "echo ready; exec sleep 60"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert "ready" in process.stdout.readline()
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM


@pytest.fixture
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(
            ("SLURM_", "OMPI_", "KUBERNETES_", "JAX_COORD", "JAX_PROC", "JAX_NUM_PR")
        ):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("clean_environment")
def test_where_the_processes_come_from(monkeypatch):
    calls = []
    monkeypatch.setattr(
        distributed.jax.distributed, "initialize", lambda *args, **kw: calls.append((args, kw))
    )
    assert distributed.initialize() == (0, 1)
    assert distributed.initialize("host:1", 1, 0) == (0, 1)
    assert calls == []

    distributed.initialize("host:1", 4, 0)
    assert calls.pop()[0] == ("host:1", 4, 0)

    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "head:9")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    with pytest.raises(ValueError, match="process_id: expected with coordinator_address"):
        distributed.initialize()
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    distributed.initialize()
    assert calls.pop()[0] == ("head:9", 4, 3)
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    distributed.initialize()
    assert calls.pop()[0] == ("head:9", 4, 2)
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID: expected an integer, got 'two'"):
        distributed.initialize()
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name)

    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    distributed.initialize()
    assert calls.pop()[1]["local_device_ids"] is None
    # One task per node must see all of the node's GPUs.
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    distributed.initialize()
    assert calls.pop()[1]["local_device_ids"] == list(range(8))
    with pytest.raises(ValueError, match="got 'lsf'"):
        distributed.initialize(cluster="lsf")


@pytest.mark.parametrize(
    ("devices", "flags", "threads", "expected"),
    [
        (2, "", None, "6"),
        (-1, "--xla_force_host_platform_device_count=4", None, "12"),
        (2, "", "9", "9"),
        (1, "", None, None),
        (-1, "", None, None),
    ],
)
def test_several_cpu_devices_get_enough_threads(monkeypatch, devices, flags, threads, expected):
    monkeypatch.setattr(
        distributed, "jax", SimpleNamespace(config=SimpleNamespace(jax_num_cpu_devices=devices))
    )
    monkeypatch.setattr(distributed, "_cores", lambda: 4)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    if threads:
        monkeypatch.setenv("PJRT_NPROC", threads)
    distributed._enough_threads()
    assert os.environ.get("PJRT_NPROC") == expected


# On fewer than 16 threads this waits for ever: those of some devices wait to start a program, while
# others wait in the one before for devices that no thread is left for. XLA counts the cores that it
# may use.
MANY_IN_FLIGHT = """
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from logitjax.training import distributed

distributed.initialize(cluster="none")
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

@jax.jit
def mixed(x):
    for _ in range(4):
        x = jnp.tanh(x + x.sum(0))
    return x

rows = jnp.linspace(-1.0, 1.0, 64 * 64).reshape(64, 64)
lanes = [jax.device_put(rows + i, NamedSharding(mesh, P("data"))) for i in range(4)]
for _ in range(50):
    lanes = [mixed(lane) for lane in lanes]
print(len(jax.block_until_ready(lanes)))
"""


@pytest.mark.every_change
@pytest.mark.slow
def test_more_programs_in_flight_than_threads():
    ours = ("PJRT_NPROC", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    env["JAX_NUM_CPU_DEVICES"] = "8"
    command = [sys.executable, "-c", MANY_IN_FLIGHT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "4", done.stderr[-2000:]


# A watch that is always in a call of JAX's client, also after the client has closed.
BUSY_WATCH = """
import sys, time
import jax
from logitjax.training import _watch, distributed
_watch.Watch._look = lambda self, beat: [call() for _ in range(20)] and None
_watch.Watch.start = lambda self: (setattr(self._done, "wait", lambda _: self._done.is_set()),
                                   super(_watch.Watch, self).start())
def call():
    try:
        client.key_value_set("a", "b", allow_overwrite=True)
    except Exception:
        pass
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 1, 0, cluster_detection_method="deactivate")
client = _watch._client()
distributed.jax.distributed.is_initialized = lambda: False
distributed.jax.distributed.initialize = lambda *_, **__: None
distributed.jax.process_count = lambda: 2
distributed.initialize("127.0.0.1:1", 2, 0)
time.sleep(0.3)
"""


@pytest.mark.every_change
@pytest.mark.slow
def test_the_watch_does_not_outlive_the_interpreter():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", BUSY_WATCH, str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]

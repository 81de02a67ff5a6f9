"""Faults outside of the program: processes, disks, files, numbers."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from logitjax import training
from logitjax.storage import ShardReader, progress, write_shards
from logitjax.training._loop import NonFiniteError
from logitjax.training._watch import Watch
from tests.training import toy

ROOT = pathlib.Path(__file__).parents[2]


def launch(workdir, *options, **variables):
    """Two processes of the toy run, with two devices each."""
    command = [ROOT / "launch/local.sh", "2", "2", sys.executable, "-m", "tests.training.toy"]
    return subprocess.run(
        [*command, workdir, "--mesh=data:2,fsdp:2", *options],
        cwd=ROOT,
        env={**os.environ, **variables},
        timeout=280,
        capture_output=True,
        text=True,
        check=False,
    )


def start(workdir, *options):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.toy", str(workdir), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    state = toy.train(workdir)
    return toy.digest(jax.device_get(state.params)), toy.losses(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "variables", "status", "message"),
    [
        # Gone: its heartbeat stops, and the other ends.
        ("--signal=SIGKILL@6@1", {"LOGITJAX_HEARTBEAT_SECONDS": "10"}, 137, "is gone"),
        # There, but it will never come to the next collective.
        ("--hang=8@1", {"LOGITJAX_STALL_SECONDS": "6", "GRACE": "1"}, 75, "has moved for 6 s"),
    ],
    ids=["killed", "hung"],
)
def test_one_of_two_processes(fault, variables, status, message, unbroken, tmp_path):
    lost = launch(tmp_path, fault, **variables)
    assert lost.returncode == status, lost.stderr[-3000:]
    assert message in lost.stderr
    kept = len(toy.losses(tmp_path))
    assert 4 <= kept < 12
    again = launch(tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resuming at step" in again.stderr
    np.testing.assert_allclose(toy.losses(tmp_path), unbroken[1], rtol=1e-4)


def test_a_run_in_which_nothing_moves_ends_and_says_at_what():
    ended = []
    watch = Watch(stall=0.3, leave=lambda *cause: ended.append(cause))
    watch.start()
    for _ in range(6):
        progress.mark("packing")
        time.sleep(0.1)
    assert ended == []
    watch.join(timeout=10)
    ((cause, status),) = ended
    assert cause.startswith("nothing has moved for 0 s while packing")
    assert status == os.EX_TEMPFAIL


def test_stall_seconds_must_be_a_number(monkeypatch):
    monkeypatch.setenv("LOGITJAX_STALL_SECONDS", "soon")
    with pytest.raises(ValueError, match="LOGITJAX_STALL_SECONDS: expected a number"):
        training.distributed.initialize()


@pytest.fixture
def small_disk(tmp_path):
    """A function that makes a file system of so many bytes, or another size of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("only root may mount a small file system")

    def resize(size, *options):
        words = [
            "mount",
            "-t",
            "tmpfs",
            "-o",
            ",".join([*options, f"size={size}"]),
            "tmpfs",
            folder,
        ]
        done = subprocess.run(words, capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"mount: {done.stderr.decode().strip()}")
        return folder

    yield resize
    subprocess.run(["umount", folder], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_disk_full_while_saving(small_disk, unbroken):
    disk = small_disk("64m")
    toy.train(disk, steps=4)
    used = sum(path.stat().st_blocks * 512 for path in disk.rglob("*") if path.is_file())
    small_disk(used + (16 << 10), "remount")
    with start(disk) as full:
        errors = full.communicate(timeout=120)[1]
    assert full.returncode not in (0, -signal.SIGKILL)
    assert "No space left on device" in errors or "ENOSPC" in errors or str(errno.ENOSPC) in errors
    # What was saved before is whole, and with more space the same run goes on from it.
    small_disk("64m", "remount")
    state = toy.train(disk)
    assert (toy.digest(jax.device_get(state.params)), toy.losses(disk)) == unbroken


@pytest.mark.parametrize("part", ["start", "middle", "end"])
def test_corrupted_shard_of_rows_names_the_file(part, tmp_path):
    """As long as before, so that its size gives nothing away."""
    rng = np.random.default_rng(0)
    rows = [rng.bytes(400) for _ in range(64)]
    shards = write_shards(epath.Path(tmp_path), rows, rows_per_shard=32)
    assert ShardReader(epath.Path(tmp_path), shards).read(range(64)) == rows
    path = tmp_path / shards[1]["file"]
    content = bytearray(path.read_bytes())
    at = {"start": 0, "middle": len(content) // 2, "end": len(content) - 600}[part]
    for i in range(at, at + 600):
        content[i] ^= 0x5A
    path.write_bytes(content)
    reader = ShardReader(epath.Path(tmp_path), shards)
    assert reader.read(range(32)) == rows[:32]
    if part == "end":  # Padding, which nobody reads.
        assert reader.read(range(32, 64)) == rows[32:]
        return
    with pytest.raises(ValueError, match=rf"shard \S*{path.name} is damaged"):
        reader.read(range(32, 64))


@pytest.mark.every_change
@pytest.mark.slow
def test_gradient_that_is_not_a_number_is_not_applied(tmp_path):
    """The loss stays finite; only its derivative at one row does not."""

    def poisoned(step, *share):
        batch = toy.batches(step, *share)
        value = 0.0 if step == 5 else 1.0
        return batch | {"under_root": np.full(toy.BATCH, value, np.float32)}

    def loss_fn(params, batch, rng):
        total, count, metrics = toy.loss_fn(params, batch, rng)
        # The derivative of sqrt(0 * p) is infinite times 0.
        root = jnp.sqrt(batch["under_root"] * (1.0 + params["head"]["bias"].sum() ** 2))
        return total + 0.0 * root.sum(), count, metrics

    mesh = training.make_mesh("data:8")
    tx = toy.optimizer()
    state = training.TrainState.create(toy.init, tx, mesh=mesh)
    step = training.TrainStep(loss_fn, tx, mesh=mesh)
    with training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        with pytest.raises(NonFiniteError, match=r"^step 6: loss \d.*gradient norm nan") as error:
            training.train_loop(
                state,
                step,
                poisoned,
                total_steps=9,
                workdir=tmp_path,
                checkpointer=checkpointer,
                options=training.LoopOptions(checkpoint_every=2, log_every=100),
            )
        assert error.value.path is not None
        assert checkpointer.steps() == [2, 4]
        for saved in checkpointer.steps():
            shapes = training.TrainState.abstract(toy.init, tx, mesh=mesh)
            restored = checkpointer.restore(shapes, saved).state
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(restored.params))

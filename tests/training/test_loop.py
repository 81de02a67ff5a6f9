"""The loop and its files: resuming, refusing, stopping."""

import json
import math
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from logitjax import training
from logitjax.training._loop import NonFiniteError
from logitjax.training._metrics import JsonlWriter, MetricAccumulator, MetricWriter
from logitjax.training._state import TrainState
from logitjax.training._step import StepOutput
from tests.training import toy

ROOT = pathlib.Path(__file__).parents[2]


def start(workdir, *options, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "tests.training.toy", str(workdir), *options],
        cwd=ROOT,
        timeout=timeout,
        capture_output=True,
        text=True,
        check=False,
    )


def printed(process):
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.split("digest")[-1].strip()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    state = toy.train(workdir)
    return toy.digest(jax.device_get(state.params)), toy.losses(workdir)


@pytest.mark.every_change
@pytest.mark.slow
def test_kill_and_resume_is_bitwise_equal(unbroken, tmp_path):
    killed = start(tmp_path, "--signal=SIGKILL@6")
    assert killed.returncode == -signal.SIGKILL
    assert len(toy.losses(tmp_path)) == 6
    again = start(tmp_path)
    assert (printed(again), toy.losses(tmp_path)) == unbroken
    assert "resuming at step 4" in again.stderr


@pytest.mark.slow
def test_sigterm_saves_then_resumes(unbroken, tmp_path):
    told = start(tmp_path, "--signal=SIGTERM@5")
    assert told.returncode == 128 + signal.SIGTERM, told.stderr[-3000:]
    assert "stopped after step 6" in told.stderr
    assert (tmp_path / "checkpoints/6").is_dir()
    state = toy.train(tmp_path)
    assert (toy.digest(jax.device_get(state.params)), toy.losses(tmp_path)) == unbroken


@pytest.mark.every_change
@pytest.mark.slow
def test_exception_then_resume_on_another_mesh(unbroken, tmp_path):
    def fails(step, *share):
        if step == 9:
            raise OSError("the data went away")
        return toy.batches(step, *share)

    with pytest.raises(OSError, match="went away"):
        toy.train(tmp_path, source=fails)
    state = toy.train(tmp_path, mesh="data:2,fsdp:2,tensor:2")
    assert state.params["embedding"].sharding.mesh.shape["fsdp"] == 2
    np.testing.assert_allclose(toy.losses(tmp_path), unbroken[1], rtol=1e-4)
    assert toy.losses(tmp_path)[:8] == unbroken[1][:8]


def truncate(checkpoint):
    """Every file: the largest may be one that nothing refers to after the last write."""
    for path in checkpoint.glob("state/**/d/*"):
        path.write_bytes(path.read_bytes()[:40])


def delete(checkpoint):
    for path in checkpoint.glob("state/**/d/*"):
        path.unlink()


def flip(checkpoint):
    """One bit in every 32 bytes: a single one may hit what a later write has superseded."""
    for path in checkpoint.glob("state/**/d/*"):
        content = bytearray(path.read_bytes())
        for offset in range(0, len(content), 32):
            content[offset] ^= 1
        path.write_bytes(content)


def differ(checkpoint):
    """Other values than were saved, in files that are whole."""
    meta = checkpoint / "meta/metadata"
    content = json.loads(meta.read_text())
    name, value = next(iter(content["checksums"].items()))
    content["checksums"][name] = value ^ 1
    meta.write_text(json.dumps(content))


# tensorstore complains about the event loop of a read that failed.
@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("damage", "message"), [(truncate, ""), (delete, ""), (flip, ""), (differ, "the checksum of")]
)
def test_corrupt_checkpoint_falls_back_and_says_so(damage, message, tmp_path, caplog):
    mesh = training.make_mesh("data:4,fsdp:2")
    states = [
        training.TrainState.create(toy.init, toy.optimizer(), mesh=mesh, seed=s) for s in (1, 2)
    ]
    with training.Checkpointer(tmp_path) as checkpointer:
        for step, state in enumerate(states):
            checkpointer.save(step, state, {"seed": step})
    damage(tmp_path / "1")
    with training.Checkpointer(tmp_path) as checkpointer:
        with caplog.at_level("WARNING"):
            restored = checkpointer.restore_latest(states[0])
        assert restored.step == 0
        assert restored.extra == {"seed": 0}
        assert toy.digest(restored.state.params) == toy.digest(states[0].params)
        assert restored.state.params["embedding"].sharding == states[0].params["embedding"].sharding
        warned = [r.getMessage() for r in caplog.records if "corrupt" in r.getMessage()]
        assert len(warned) == 1
        assert "checkpoint 1 in" in warned[0]
        assert message in warned[0]
        assert "using checkpoint 0" in warned[0]
        assert (tmp_path / "corrupt_1").is_dir()
        # The same step can be saved again.
        assert checkpointer.save(1, states[1])
        damage(tmp_path / "0")
        assert checkpointer.restore_latest(states[0]).step == 1


@pytest.mark.every_change
@pytest.mark.slow
def test_a_checkpoint_of_another_state_is_an_error_and_one_that_is_damaged_set_aside(tmp_path):
    mesh = training.make_mesh("data:8")
    state = training.TrainState.create({"w": np.ones(4)}, optax.sgd(1.0), mesh=mesh)
    with training.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(state) is None
        checkpointer.save(3, state)
        with pytest.raises(ValueError, match=r"no checkpoint of step 4 in .*\[3\]"):
            checkpointer.restore(state, 4)
        other = training.TrainState.create({"w": np.ones(5)}, optax.sgd(1.0), mesh=mesh)
        with pytest.raises(
            ValueError, match=r"'params/w' is float32\[4\] in it, expected float32\[5\]"
        ):
            checkpointer.restore_latest(other)
        other = training.TrainState.create({"v": np.ones(4)}, optax.sgd(1.0), mesh=mesh)
        with pytest.raises(ValueError, match="it lacks 'params/v'"):
            checkpointer.restore_latest(other)
        checkpointer.wait()
        truncate(tmp_path / "3")
        assert checkpointer.restore_latest(state) is None
        assert (tmp_path / "corrupt_3").is_dir()
        assert checkpointer.steps() == []


@pytest.mark.every_change
@pytest.mark.slow
def test_saved_state_may_be_donated_at_once(tmp_path):
    """An asynchronous save must not see what the next step writes into the donated buffers."""
    mesh = training.make_mesh("data:4,fsdp:2")
    params = {"w": jnp.arange(1 << 20, dtype=jnp.float32).reshape(1 << 10, -1)}
    state = training.TrainState.create(params, optax.sgd(1.0), mesh=mesh)
    step = training.TrainStep(
        lambda params, batch, rng: (params["w"].sum() + 0 * batch.sum(), 1.0, {}),
        optax.sgd(1.0),
        mesh=mesh,
    )
    batch = np.zeros((8, 1), np.float32)
    with training.Checkpointer(tmp_path, max_to_keep=None) as checkpointer:
        for i in range(6):
            checkpointer.save(i, state)
            state, _ = step(state, batch)
        for i in range(6):
            restored = checkpointer.restore(state, i)
            np.testing.assert_array_equal(restored.state.params["w"], params["w"] - i)


@pytest.mark.every_change
@pytest.mark.slow
def test_nonfinite_loss_stops_with_step_and_batch(tmp_path):
    def poisoned(step, *share):
        batch = toy.batches(step, *share)
        if step == 5:
            batch["scale"] = np.full(toy.BATCH, np.inf, np.float32)
        else:
            batch["scale"] = np.ones(toy.BATCH, np.float32)
        return batch

    def loss_fn(params, batch, rng):
        total, count, metrics = toy.loss_fn(params, batch, rng)
        return total * batch["scale"].mean(), count, metrics

    mesh = training.make_mesh("data:8")
    tx = toy.optimizer()
    state = training.TrainState.create(toy.init, tx, mesh=mesh)
    step = training.TrainStep(loss_fn, tx, mesh=mesh)
    with training.Checkpointer(tmp_path / "checkpoints") as checkpointer:
        with pytest.raises(NonFiniteError, match=r"^step 6: loss inf") as error:
            training.train_loop(
                state,
                step,
                poisoned,
                total_steps=9,
                workdir=tmp_path,
                checkpointer=checkpointer,
                options=training.LoopOptions(checkpoint_every=4, log_every=100),
            )
        assert checkpointer.steps() == [4]
    assert error.value.step == 6
    saved = np.load(error.value.path)
    assert int(saved["step"]) == 6
    for name, value in poisoned(5).items():
        np.testing.assert_array_equal(saved[name], value)


@pytest.mark.every_change
@pytest.mark.slow
def test_other_data_is_refused(tmp_path):
    toy.train(tmp_path, steps=4, identity={"data": "a"})
    with pytest.raises(ValueError, match="data: checkpoint 4 has 'a', this run 'b'"):
        toy.train(tmp_path, steps=8, identity={"data": "b"})


def test_jsonl_is_cut_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    for step in range(1, 6):
        writer.write_scalars(step, {"loss": 1.0 / step, "bad": math.nan})
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    writer = JsonlWriter(path)
    writer.resume(3)
    writer.write_scalars(4, {"loss": 7.0})
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert records[0] == {"step": 1, "loss": 1.0, "bad": None}
    assert records[-1]["loss"] == 7.0


def test_tensorboard_writer(tmp_path):
    pytest.importorskip("tensorboardX")
    writer = training.make_writer(tmp_path, track=("tensorboard",))
    assert isinstance(writer, MetricWriter)
    writer.resume(0)
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


@pytest.mark.every_change
@pytest.mark.slow
def test_evaluation_and_throughput_are_logged(tmp_path):
    toy.train(
        tmp_path, steps=4, every=0, eval_fn=lambda state, step: {"x": float(step)}, eval_every=2
    )
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["eval/x"] for r in lines if "eval/x" in r] == [2.0, 4.0]
    logged = [r for r in lines if "loss" in r]
    assert len(logged) == 4
    assert all(r["grad_norm"] > 0 for r in logged)
    # The first step compiles, and is not timed.
    assert ["tokens_per_second" in r for r in logged] == [False, True, True, True]


def test_host_stays_one_step_ahead():
    """Nothing reads a step's results before the next one is dispatched."""
    events = []

    class Flag:
        def __init__(self, step):
            self.step = step

        def __bool__(self):
            events.append(("read", self.step))
            return True

    def step_fn(state, batch):
        events.append(("dispatch", batch))
        return state, StepOutput({"loss": (1.0, 1.0)}, Flag(batch))

    state = TrainState(np.int32(0), {}, {}, None)
    training.train_loop(
        state,
        step_fn,
        lambda step: step,
        total_steps=4,
        options=training.LoopOptions(log_every=100),
    )
    assert events.index(("read", 1)) > events.index(("dispatch", 2))
    assert events.index(("read", 2)) > events.index(("dispatch", 3))


def test_metrics_are_on_disk_before_a_checkpoint_that_follows_them(tmp_path):
    """A store that cannot append has no line before a flush; a killed run has no end."""
    events = []

    class Writer(MetricWriter):
        def write_scalars(self, step, scalars):
            events.append(("write", step))

        def flush(self):
            events.append(("flush", None))

    class Checkpointer(training.Checkpointer):
        def __init__(self):
            pass

        def steps(self):
            return []

        def save(self, step, state, extra):
            events.append(("save", step))

        def wait(self):
            events.append(("wait", None))

    training.train_loop(
        TrainState(np.int32(0), {}, {}, None),
        lambda state, batch: (state, StepOutput({"loss": (1.0, 1.0)}, True)),
        lambda step: step,
        total_steps=4,
        checkpointer=Checkpointer(),
        writer=Writer(),
        options=training.LoopOptions(log_every=1, checkpoint_every=2),
    )
    for index, (kind, _) in enumerate(events):
        if kind in ("save", "wait"):
            since = [name for name, _ in events[:index] if name in ("write", "flush")]
            assert since[-1] == "flush"


@pytest.mark.parametrize("count", [1, 3])
def test_tokens_a_second_are_those_of_a_loss_that_counts_tokens(count, tmp_path):
    def step_fn(state, batch):
        return state, StepOutput({"loss": (1.0, float(count))}, True)

    training.train_loop(
        TrainState(np.int32(0), {}, {}, None),
        step_fn,
        lambda step: step,
        total_steps=3,
        writer=training.make_writer(tmp_path),
        options=training.LoopOptions(log_every=1),
    )
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert ("tokens_per_second" in last) == (count > 1)
    assert last["seconds_per_step"] > 0


@pytest.mark.every_change
@pytest.mark.slow
def test_steps_are_profiled_on_request(tmp_path):
    state = toy.train(tmp_path, steps=6, every=0, profile_steps=2)
    assert int(state.step) == 6
    assert [path.suffix for path in (tmp_path / "profile").rglob("*.xplane.pb")] == [".pb"]
    options = training.LoopOptions(profile_steps=1)
    with pytest.raises(ValueError, match="profile_steps: a trace needs a workdir"):
        training.train_loop(state, lambda *_: None, toy.batches, total_steps=6, options=options)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_profile_ends_with_the_run(tmp_path):
    """A run may be over before all the steps that were asked for."""
    toy.train(tmp_path / "first", steps=4, every=0, profile_steps=9)
    toy.train(tmp_path / "second", steps=4, every=0, profile_steps=1)
    assert all(list((tmp_path / name / "profile").rglob("*.pb")) for name in ("first", "second"))


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, "bfloat16", np.int8])
def test_a_saved_state_may_be_donated_at_once(dtype, tmp_path, monkeypatch):
    """The save begins only once the step that gets the buffers has run."""
    mesh = training.make_mesh("data:4,fsdp:2")
    state = {
        "w": jax.device_put(np.arange(64).astype(dtype), jax.NamedSharding(mesh, jax.P("fsdp"))),
        "scalar": jax.device_put(np.ones((), dtype), jax.NamedSharding(mesh, jax.P())),
        "key": jax.random.key(3),
    }
    before = jax.random.key_data(jax.random.key(3))
    gate = threading.Event()
    step = jax.jit(
        lambda state: {**state, "w": state["w"] + 1, "scalar": state["scalar"] * 2},
        donate_argnums=0,
    )
    with training.Checkpointer(tmp_path) as checkpointer:
        saved = checkpointer._save

        def late(*args):
            gate.wait(60)
            saved(*args)

        monkeypatch.setattr(checkpointer, "_save", late)
        checkpointer.save(0, state)
        after = jax.block_until_ready(step(state))
        gate.set()
        restored = checkpointer.restore_latest(after)
    assert restored.state["w"].tolist() == list(range(64))
    assert restored.state["scalar"] == 1
    assert after["w"].tolist() == list(range(1, 65))
    np.testing.assert_array_equal(jax.random.key_data(restored.state["key"]), before)


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    mesh = training.make_mesh("data:8")
    state = training.TrainState.create({"w": np.ones(4)}, optax.sgd(1.0), mesh=mesh)
    with training.Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpointer._manager, "save", lambda *_, **__: 1 / 0)
        checkpointer.save(0, state)
        with pytest.raises(ZeroDivisionError):
            checkpointer.wait()
        assert checkpointer.steps() == []


def test_sums_are_those_of_all_steps():
    accumulator = MetricAccumulator()
    accumulator.add({"loss": (6.0, 2.0)})
    accumulator.add({"loss": (1.0, 4.0), "seen": (3.0, 1.0)})
    assert accumulator.sums() == {"loss": (7.0, 6.0), "seen": (3.0, 1.0)}


def test_a_store_that_cannot_append_gets_all_lines_at_every_flush(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    monkeypatch.setattr("logitjax.training._metrics.epath.Path", lambda _: path)
    for step in (1, 2):
        writer = JsonlWriter("store://bucket/metrics.jsonl")
        writer.write_scalars(step, {"loss": 1.0})
        writer.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_tensorboard_forgets_what_came_after_the_step_that_a_run_resumes_at(tmp_path, monkeypatch):
    tensorboard = pytest.importorskip("tensorboardX")
    purged = []

    class Writer(tensorboard.SummaryWriter):
        def __init__(self, directory, purge_step):
            purged.append(purge_step)
            super().__init__(directory, purge_step=purge_step)

    monkeypatch.setattr(tensorboard, "SummaryWriter", Writer)
    writer = training.make_writer(tmp_path, track=("tensorboard",))
    writer.write_scalars(1, {"loss": 1.0})
    writer.resume(3)
    writer.write_scalars(4, {"loss": 1.0})
    writer.close()
    assert purged == [None, 4]


def test_a_request_to_stop_that_no_step_could_answer_stands():
    heard = []
    former = signal.signal(signal.SIGTERM, lambda *_: heard.append("told"))
    try:
        with training.watch_for_preemption() as told_to_stop:
            signal.raise_signal(signal.SIGTERM)
            assert told_to_stop(1)
        assert not heard  # The loop was told, and has ended by itself.
        # As when the last checkpoint is being written.
        with training.watch_for_preemption() as told_to_stop:
            assert not told_to_stop(1)
            signal.raise_signal(signal.SIGTERM)
        assert heard == ["told"]
    finally:
        signal.signal(signal.SIGTERM, former)

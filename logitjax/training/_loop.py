"""The training loop: resume, report, save, stop."""

import collections
import contextlib
import dataclasses
import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from logitjax.ops import mesh as on_mesh
from logitjax.storage import option, progress, write_atomic
from logitjax.training._checkpoints import Checkpointer
from logitjax.training._flops import utilisation
from logitjax.training._metrics import MetricAccumulator, MetricWriter
from logitjax.training._preemption import Preempted, watch_for_preemption
from logitjax.training._state import TrainState, abstract_array
from logitjax.training._step import StepOutput
from logitjax.training._workdir import lock_workdir


class NonFiniteError(FloatingPointError):
    """The loss or its gradient stopped being finite at `step`; its batch is in the file `path`."""

    def __init__(self, message: str, step: int, path: str | None):
        super().__init__(message)
        self.step, self.path = step, path


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopOptions:
    """Intervals at which `train_loop` saves, logs, evaluates and profiles.

    Attributes:
        checkpoint_every: steps between checkpoints; the last step is always saved.
        log_every: steps between log lines: means of all metrics since the last line,
            ``seconds_per_step``, and ``tokens_per_second`` if the loss counts tokens.
        eval_every: steps between evaluations; the last step is always evaluated.
        progress: a tqdm bar, if standard error is a terminal.
        profile_steps: number of steps that ``jax.profiler`` traces into ``workdir/profile``,
            starting with this call's third step, because the first one compiles. SIGUSR1 traces the
            same number of the next steps, or three.
    """

    checkpoint_every: int = option(0, execution=True)
    log_every: int = option(10, execution=True)
    eval_every: int = 0
    progress: bool = option(True, execution=True)
    profile_steps: int = option(0, execution=True)


def train_loop(
    state: TrainState | Callable[[], TrainState],
    step_fn: Callable[[TrainState, Any], tuple[TrainState, StepOutput]],
    batches: Callable[[int], Any],
    *,
    total_steps: int,
    workdir: epath.PathLike | None = None,
    checkpointer: Checkpointer | None = None,
    eval_fn: Callable[[TrainState, int], Mapping[str, float]] | None = None,
    writer: MetricWriter | None = None,
    identity: Mapping[str, Any] | None = None,
    options: LoopOptions | None = None,
) -> TrainState:
    """Train to ``total_steps``, continuing bit for bit from the newest checkpoint, if any.

    Steps count finished updates. Update ``s + 1`` uses ``batches(s)``, which must depend only on
    ``s``, because a checkpoint's only data state is its step. The host runs one step ahead of the
    device and waits for it only to log, evaluate and save. SIGTERM (to any of the processes) saves
    and raises :class:`Preempted`; the same call continues.

    Args:
        state: the initial state if there is no checkpoint, or a function that makes it. It is
            consumed. With a function, a run whose checkpoints cannot be read starts over.
        step_fn: a `TrainStep`, with constants bound by ``functools.partial``.
        batches: step -> this process's rows of the global batch.
        workdir: locked while the loop runs; gets ``nonfinite/step_STEP.npz``.
        checkpointer: saves and restores; it is not closed.
        eval_fn: ``(state, step) -> scalars``, logged as ``eval/NAME``.
        writer: writer of metrics (:func:`make_writer`).
        identity: JSON, such as the data's fingerprint; checkpoints with another one are refused.

    Raises:
        NonFiniteError: after the batch is saved; the update was not applied.
        Preempted: after SIGTERM and saving.
        WorkdirInUseError: if another run holds the workdir.
        ValueError: if the checkpoint is of another state or identity, if none can be read and
            `state` is not a function, or if a profile has no workdir.
    """
    options = options or LoopOptions()
    if options.profile_steps and workdir is None:
        raise ValueError("profile_steps: a trace needs a workdir")
    writer = MetricWriter() if writer is None else writer
    with contextlib.ExitStack() as stack:
        if workdir is not None:
            stack.enter_context(lock_workdir(workdir))
        told_to_stop = stack.enter_context(watch_for_preemption())
        state, start = _resume(state, checkpointer, identity or {})
        writer.resume(start)
        bar = stack.enter_context(_progress_bar(start, total_steps, options.progress))
        profile = stack.enter_context(_profiler(workdir, start + 3, options.profile_steps))

        report = _Report(writer, bar, start, step_fn)
        # Flags that were not read yet: reading them at once would make the host wait for each step.
        pending: collections.deque[tuple[int, Any, StepOutput]] = collections.deque()

        def check_finite(keep: int) -> None:
            while len(pending) > keep:
                _check_finite(*pending.popleft(), workdir=workdir)

        def save(step: int) -> None:
            check_finite(0)
            progress.mark(f"saving checkpoint {step}")
            # A run that continues from here has no other record of the steps before.
            writer.flush()
            if checkpointer is not None and checkpointer.save(step, state, identity):
                logging.info("saving checkpoint %d", step)

        progress.mark(f"training from step {start} to {total_steps}", log=True)
        for step in range(start + 1, total_steps + 1):
            profile(step, state)
            progress.mark("fetching a batch")
            with report.fetching():
                batch = batches(step - 1)
            progress.mark(f"taking step {step}" if step > start + 1 else "compiling the first step")
            state, output = step_fn(state, batch)
            pending.append((step, batch, output))
            report.add(step, output)
            # The previous step has ended by now, while the device is busy with this one.
            check_finite(keep=1)
            last = step == total_steps
            if _due(step, options.log_every) or (last and options.log_every):
                check_finite(0)
                report.write(step)
            with report.pause():
                if eval_fn is not None and (last or _due(step, options.eval_every)):
                    check_finite(0)
                    progress.mark(f"evaluating step {step}")
                    scores = eval_fn(state, step)
                    writer.write_scalars(step, {f"eval/{k}": v for k, v in scores.items()})
                if last or _due(step, options.checkpoint_every):
                    save(step)
                # All processes stop after the same step, or one would wait for the others forever.
                if not last and told_to_stop(step):
                    save(step)
                    if checkpointer is not None:
                        checkpointer.wait()
                    logging.warning("SIGTERM: stopped after step %d", step)
                    raise Preempted(step)
        check_finite(0)
        writer.flush()
        if checkpointer is not None:
            progress.mark(f"saving checkpoint {total_steps}")
            checkpointer.wait()
        progress.mark("continuing after the training")
    return state


class _Report:
    """Metrics since the last log line, with the speed of training alone."""

    def __init__(self, writer: MetricWriter, bar: tqdm, start: int, step_fn: Any):
        self._writer, self._bar, self._first = writer, bar, start + 1
        self._metrics = MetricAccumulator()
        self._clock, self._logged, self._untimed = time.perf_counter(), start, 0.0
        self._fetching, self._step_began, self._slowest = 0.0, self._clock, 0.0
        # `flops` is reported by the step.
        while isinstance(step_fn, functools.partial):
            step_fn = step_fn.func
        self._step_fn = step_fn

    def add(self, step: int, output: StepOutput) -> None:
        self._metrics.add(output.metrics)
        if step == self._first:
            # Compilation is not part of the speed. Reading a metric waits for the step.
            self._untimed = float(jax.device_get(output.metrics["loss"][1]))
            self._clock, self._logged, self._fetching = time.perf_counter(), step, 0.0
            self._step_began = self._clock
        now = time.perf_counter()
        self._slowest = max(self._slowest, now - self._step_began)
        self._step_began = now
        self._bar.update()

    def write(self, step: int) -> None:
        sums, scalars = self._metrics.sums(), self._metrics.compute()
        elapsed, steps = time.perf_counter() - self._clock, step - self._logged
        if steps:
            scalars["seconds_per_step"] = elapsed / steps
            # The host is a step ahead of the device, so a pause of either shows in the next step.
            scalars["seconds_slowest_step"] = self._slowest
            scalars |= _data_seconds(self._fetching / steps)
            scalars |= utilisation(getattr(self._step_fn, "flops", 0.0), elapsed / steps)
            counted = sums["loss"][1] - self._untimed
            # A loss that is the mean of a batch counts steps.
            if counted > steps:
                scalars["tokens_per_second"] = counted / elapsed
        self._writer.write_scalars(step, scalars)
        self._bar.set_postfix(loss=f"{scalars['loss']:.4g}")
        self._metrics.reset()
        self._clock, self._logged, self._untimed = time.perf_counter(), step, 0.0
        self._fetching, self._step_began, self._slowest = 0.0, self._clock, 0.0

    @contextlib.contextmanager
    def fetching(self) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self._fetching += time.perf_counter() - begin

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        paused = time.perf_counter()
        yield
        paused = time.perf_counter() - paused
        self._clock += paused
        self._step_began += paused


def _data_seconds(seconds: float) -> dict[str, float]:
    """Seconds that a step waits for data, on the process that all others wait for."""
    if jax.process_count() == 1:
        return {"data_seconds": seconds}
    each = np.asarray(multihost_utils.process_allgather(np.float32(seconds)))
    return {"data_seconds": float(each.max()), "slowest_process": float(each.argmax())}


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _resume(
    start: TrainState | Callable[[], TrainState],
    checkpointer: Checkpointer | None,
    identity: Mapping[str, Any],
) -> tuple[TrainState, int]:
    state = start() if callable(start) else start
    if checkpointer is None or not checkpointer.steps():
        return state, int(state.step)
    shapes = jax.tree.map(abstract_array, state)
    progress.mark("restoring a checkpoint")
    for leaf in jax.tree.leaves(state):
        # The memory never holds two states.
        leaf.delete()
    restored = checkpointer.restore_latest(shapes)
    if restored is None:
        if not callable(start):
            raise ValueError(f"no checkpoint in {checkpointer.directory} can be read")
        logging.warning("no checkpoint in %s can be read: starting over", checkpointer.directory)
        state = start()
        return state, int(state.step)
    for name, value in identity.items():
        # Checkpoints from before a name was recorded may continue.
        if name in restored.extra and restored.extra[name] != value:
            raise ValueError(
                f"{name}: checkpoint {restored.step} has {restored.extra[name]!r}, this run "
                f"{value!r}; use another folder"
            )
    logging.info("resuming at step %d", restored.step)
    return restored.state, restored.step


def _check_finite(step: int, batch: Any, output: StepOutput, *, workdir: Any) -> None:
    if bool(output.finite):
        return
    means = MetricAccumulator()
    means.add(output.metrics)
    values = means.compute()
    message = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
    path = None
    if workdir is not None:
        # Every process sees the same flag, so all get here.
        if jax.process_count() > 1:
            batch = multihost_utils.process_allgather(batch, tiled=True)
        target = epath.Path(workdir) / "nonfinite" / f"step_{step}.npz"
        path = str(target)
        if jax.process_index() == 0:
            leaves = jax.tree_util.tree_flatten_with_path(jax.device_get(batch))[0]
            arrays: dict[str, Any] = {
                on_mesh.path_string(key) or "batch": np.asarray(leaf) for key, leaf in leaves
            }
            write_atomic(target, lambda file: np.savez(file, **arrays, step=np.asarray(step)))
        message += f"; its batch is in {path}"
    raise NonFiniteError(message, step, path)


@contextlib.contextmanager
def _profiler(workdir: Any, first: int, count: int) -> Iterator[Callable[[int, Any], None]]:
    """Called before every step; traces ``count`` steps from ``first`` on, in full."""
    running, requested = False, threading.Event()

    def stop() -> None:
        nonlocal running
        if running:
            jax.profiler.stop_trace()
            logging.info("profile of %d steps: %s", count, epath.Path(workdir) / "profile")
        running = False

    def before(step: int, state: Any) -> None:
        nonlocal running, first, count
        if requested.is_set() and not running:
            requested.clear()
            first, count = step, count or 3
        if not count or step not in (first, first + count):
            return
        # The host is a step ahead of the device.
        jax.block_until_ready(state)
        if step == first:
            jax.profiler.start_trace(str(epath.Path(workdir) / "profile"))
            running = True
        else:
            stop()

    listens = workdir is not None and threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGUSR1, lambda *_: requested.set()) if listens else None
    try:
        yield before
    finally:
        stop()
        if listens:
            signal.signal(signal.SIGUSR1, former or signal.SIG_DFL)


def _progress_bar(start: int, total: int, enabled: bool) -> tqdm:
    # None: hidden unless standard error is a terminal.
    hidden = not enabled or jax.process_index() != 0 or None
    return tqdm(initial=start, total=total, unit="step", dynamic_ncols=True, disable=hidden)

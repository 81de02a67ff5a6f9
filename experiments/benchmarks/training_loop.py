"""The cost of the main job's step beside its program: input, bookkeeping, pauses to save.

The demo of graph_fusion, its SFT + ULD + GLD arm: the loop (rows and the source's cached statistics
from disk, metrics, log lines) beside the same compiled step fed repeatedly with one batch on the
device; how long an asynchronous save blocks the loop, and how long a step takes during its writing.
"""

import functools
import statistics
import time
from typing import Any

import jax
from etils import epath

from experiments.graph_fusion import __main__ as graph_fusion
from experiments.graph_fusion import arms, train
from experiments.shared import suite, timing
from logitjax import models, training
from logitjax.commands import cli


def _seconds(function: Any, *arguments: Any) -> float:
    jax.block_until_ready(arguments)
    begin = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begin


def run(options: suite.Options) -> suite.Result:
    """Both ways to take the same steps, in turn, then saves between steps."""
    steps = 4 if options.smoke else 10
    preset = graph_fusion.PRESETS["smoke" if options.smoke else "demo"]
    changed = dict(loss=("uld+gld",), steps=steps, eval_rows=2)
    config = cli.build(graph_fusion.Config, {**preset, **changed, "mesh": "data:1"})
    workdir = epath.Path(options.directory.resolve()) / f"run-{time.time_ns()}"
    session = train.open_session(config, workdir)
    settings = arms.first_settings(config, "uld+gld")
    student = train.prune(session, config.drop_layers[0]).student
    tx, update = train.course(config, settings, 0).update(
        student,
        settings.objective(config),
        {name: source.vocabularies for name, source in session.corpus.sources.items()},
        mesh=session.mesh,
    )
    frozen = models.DECODER_RULES.place(student.frozen, session.mesh)
    step_of_arm = functools.partial(update, constants=frozen)
    packed = session.corpus.packed.splits["train"]

    def batches(number: int) -> dict[str, Any]:
        rows = packed.batch(number, seed=0, batch_size=config.course.batch_size)
        return session.corpus.batch("train", rows, taught=True)

    def start() -> training.TrainState:
        return training.TrainState.create(
            student.trained, tx, mesh=session.mesh, rules=models.DECODER_RULES, seed=0
        )

    stored = training.BatchLayout(session.mesh).place(batches(0))

    def alone(state: Any) -> Any:
        for _ in range(steps):
            state, _ = step_of_arm(state, stored)
        return state

    def loop(state: Any, name: str) -> Any:
        directory = workdir / name
        return training.train_loop(
            state,
            step_of_arm,
            batches,
            total_steps=steps,
            workdir=directory,
            writer=training.make_writer(directory),
            options=training.LoopOptions(log_every=config.course.loop.log_every, progress=False),
        )

    alone(start())
    bare, looped = [], []
    for number in range(options.repeats):
        bare.append(_seconds(alone, start()) / steps)
        looped.append(_seconds(loop, start(), f"loop-{number}") / steps)
    overhead = timing.paired_ratio(looped, bare) - 1
    step = statistics.median(bare)

    pauses, beside, state = [], [], start()
    with training.Checkpointer(workdir / "checkpoints") as checkpointer:
        for number in range(options.repeats + 1):
            state, _ = step_of_arm(state, stored)
            pauses.append(_seconds(checkpointer.save, number, state))
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(step_of_arm(state, stored))
            beside.append(time.perf_counter() - begin)
            checkpointer.wait()
    # The first save makes folders and compiles its checksums.
    pause, during = statistics.median(pauses[1:]), statistics.median(beside[1:])
    saved = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    saving = f"pause of an asynchronous save of {saved / 1e6:.0f} MB"
    taken = {
        "step, one batch on the device": step,
        "input, metrics, log lines": overhead * step,
        saving: pause,
        "the step after it, while that is written": during,
    }
    rows = [{"what": what, "seconds": s, "of a step": s / step} for what, s in taken.items()]
    bars = [
        suite.at_most("input and bookkeeping of a step", overhead, 0.03),
        suite.at_most("pause to save, of a step", pause / step, 0.05),
        suite.at_most("traces of the step", float(update.traces), 1.0),
    ]
    return suite.Result(rows=rows, bars=bars)

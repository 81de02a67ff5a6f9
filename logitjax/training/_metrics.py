"""Metrics: exact means of (sum, count) pairs, and their writers."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from logitjax.storage import digest, require, write_atomic


class MetricAccumulator:
    """Sums ``{name: (sum, count)}`` over steps, on the device until read; divides once."""

    def __init__(self) -> None:
        self._pending: list[Any] = []

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        self._pending.append(dict(metrics))

    def sums(self) -> dict[str, tuple[float, float]]:
        totals: dict[str, np.ndarray] = {}
        # One transfer for all steps, and sums in float64: counts of tokens exceed 2^24.
        for metrics in jax.device_get(self._pending):
            for name, pair in metrics.items():
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
        return {name: (float(total), float(count)) for name, (total, count) in totals.items()}

    def compute(self) -> dict[str, float]:
        """The mean for every name; nan if nothing was counted."""
        return {
            name: total / count if count else math.nan
            for name, (total, count) in self.sums().items()
        }

    def reset(self) -> None:
        self._pending = []


class MetricWriter:
    """Passes scalars on to other writers; without any, as on all processes but the first, to none.

    Writers are its subclasses, which override what they do themselves.
    """

    _writers: Sequence["MetricWriter"] = ()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def resume(self, step: int) -> None:
        """Drop what a killed run wrote after this step."""
        for writer in self._writers:
            writer.resume(step)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        self.flush()
        for writer in self._writers:
            writer.close()


class JsonlWriter(MetricWriter):
    """Writes a JSON object per line, ``{"step": 10, "loss": 1.5}``; nan and infinity become null.

    Object stores cannot append: there the file is rewritten at every flush.
    """

    def __init__(self, path: epath.PathLike):
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._remote = "://" in str(path)
        self._lines: list[str] = []
        if self._remote and self._path.exists():
            self._lines = self._path.read_text().splitlines()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {k: float(v) if math.isfinite(v) else None for k, v in scalars.items()}
        line = json.dumps({"step": int(step), **values})
        if self._remote:
            self._lines.append(line)
            return
        with self._path.open("a") as file:
            file.write(line + "\n")

    def resume(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_bytes().splitlines():
            # The last line of a killed run may be truncated, and any line damaged.
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line.decode())
        self._lines = kept if self._remote else []
        write_atomic(self._path, "".join(line + "\n" for line in kept))

    def flush(self) -> None:
        if self._remote:
            self._path.write_text("".join(line + "\n" for line in self._lines))


class LogWriter(MetricWriter):
    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        logging.info("step %d: %s", step, "  ".join(f"{k} {v:.5g}" for k, v in scalars.items()))


class TensorBoardWriter(MetricWriter):
    """TensorBoard event files, through tensorboardX (the extra ``tensorboard``)."""

    def __init__(self, directory: epath.PathLike):
        self._make = require("tensorboardX", extra="tensorboard").SummaryWriter
        self._directory = str(directory)
        self._purge: int | None = None
        self._writer: Any = None

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = self._make(self._directory, purge_step=self._purge)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def resume(self, step: int) -> None:
        self.close()
        # TensorBoard drops later events.
        self._purge = step + 1

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbWriter(MetricWriter):
    """A Weights & Biases run; offline, for ``wandb sync``, unless ``WANDB_MODE`` is ``online``."""

    def __init__(self, directory: epath.PathLike):
        self._wandb = require("wandb", extra="wandb")
        self._directory = str(directory)
        self._run: Any = None

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._run is None:
            self._run = self._wandb.init(
                project="logitjax",
                # Continuing a folder continues its run.
                id=digest(self._directory, length=16),
                resume="allow",
                dir=self._directory,
                mode=os.environ.get("WANDB_MODE", "offline"),
            )
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None


class TerminalWriter(MetricWriter):
    """Curves of the loss and of the validation perplexity, redrawn in place on a terminal."""

    _NAMES, _BARS, _WIDTH = ("loss", "eval/perplexity"), "▁▂▃▄▅▆▇█", 50

    def __init__(self) -> None:
        self._curves: dict[str, list[float]] = {}
        self._verbosity: int | None = None

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if not sys.stderr.isatty():
            return
        if self._verbosity is None:
            # Log lines would move the cursor away from the curves.
            self._verbosity = logging.get_verbosity()
            logging.set_verbosity(logging.WARNING)
        # Up, and clear below.
        up = f"\x1b[{len(self._curves)}F\x1b[J" if self._curves else ""
        for name in self._NAMES:
            if math.isfinite(scalars.get(name, math.nan)):
                self._curves.setdefault(name, []).append(float(scalars[name]))
        lines = [self._draw(name, values) for name, values in self._curves.items()]
        print(up + "\n".join(lines), f"step {step}", file=sys.stderr, flush=True)

    def _draw(self, name: str, values: list[float]) -> str:
        # As many columns as fit, each with the last of its values.
        columns = {
            i * self._WIDTH // max(len(values), self._WIDTH): v for i, v in enumerate(values)
        }
        low, high = min(values), max(values)
        levels = [round((v - low) / (high - low or 1.0) * 7) for v in columns.values()]
        bars = "".join(self._BARS[level] for level in levels)
        return f"{name:16}{values[0]:9.4g} {bars} {values[-1]:.4g}"

    def close(self) -> None:
        if self._verbosity is not None:
            logging.set_verbosity(self._verbosity)


_TRACKERS: Mapping[str, Callable[[epath.Path], MetricWriter]] = {
    "tensorboard": lambda folder: TensorBoardWriter(folder / "tensorboard"),
    "wandb": WandbWriter,
    "terminal": lambda folder: TerminalWriter(),
}


def make_writer(
    workdir: epath.PathLike | None, *, log: bool = True, track: Sequence[str] = ()
) -> MetricWriter:
    """The usual writers, ``metrics.jsonl`` and the log, and trackers; only process 0 writes.

    Args:
        workdir: folder for ``metrics.jsonl`` and the trackers' files; None for the log alone.
        track: trackers: ``tensorboard``, ``wandb`` (offline by default), ``terminal`` for curves.
    """
    writer = MetricWriter()
    if jax.process_index() == 0:
        writers: list[MetricWriter] = [LogWriter()] if log else []
        if workdir is not None:
            writers.append(JsonlWriter(epath.Path(workdir) / "metrics.jsonl"))
            writers += [_TRACKERS[name](epath.Path(workdir)) for name in track]
        writer._writers = writers
    return writer

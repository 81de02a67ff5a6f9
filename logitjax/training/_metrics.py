"""Metrics: exact means of (sum, count) pairs, and where they are written."""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from logitjax.storage import require, write_atomic


class MetricAccumulator:
    """Sums ``{name: (sum, count)}`` over steps, on the device until asked; divides once."""

    def __init__(self) -> None:
        self._pending: list[Any] = []

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        self._pending.append(dict(metrics))

    def sums(self) -> dict[str, tuple[float, float]]:
        """The total (sum, count) of every name."""
        totals: dict[str, np.ndarray] = {}
        # One transfer for all steps, and sums in float64: counts of tokens exceed 2^24.
        for metrics in jax.device_get(self._pending):
            for name, pair in metrics.items():
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)
        return {name: (float(total), float(count)) for name, (total, count) in totals.items()}

    def compute(self) -> dict[str, float]:
        """The mean of every name; nan where nothing was counted."""
        return {
            name: total / count if count else math.nan
            for name, (total, count) in self.sums().items()
        }

    def reset(self) -> None:
        self._pending = []


class MetricWriter:
    """Takes scalars; this one, which every process but the first gets, writes nothing."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        pass

    def resume(self, step: int) -> None:
        """Drops what a killed run wrote after that step."""

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.flush()


class JsonlWriter(MetricWriter):
    """One JSON object per line, ``{"step": 10, "loss": 1.5}``; nan and infinity become null.

    Object stores cannot append: there the file is written anew at every flush.
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
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line.decode())
            except (ValueError, KeyError, TypeError):
                continue  # The last line of a killed run may be half a line, and any be damaged.
        self._lines = kept if self._remote else []
        text = "".join(line + "\n" for line in kept)
        write_atomic(self._path, text)

    def flush(self) -> None:
        if self._remote:
            self._path.write_text("".join(line + "\n" for line in self._lines))


class LogWriter(MetricWriter):
    """One log line per step, through absl."""

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
        self._purge = step + 1

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class MultiWriter(MetricWriter):
    """Hands everything to several writers."""

    def __init__(self, writers: Iterable[MetricWriter]):
        self._writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        for writer in self._writers:
            writer.write_scalars(step, scalars)

    def resume(self, step: int) -> None:
        for writer in self._writers:
            writer.resume(step)

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def make_writer(
    workdir: epath.PathLike | None, *, log: bool = True, tensorboard: bool = False
) -> MetricWriter:
    """The usual writers, ``metrics.jsonl`` and the log; only process 0 writes.

    Args:
        workdir: where ``metrics.jsonl`` and ``tensorboard/`` go; None for the log alone.
        log: write log lines.
        tensorboard: write event files too.
    """
    if jax.process_index() != 0:
        return MetricWriter()
    writers: list[MetricWriter] = [LogWriter()] if log else []
    if workdir is not None:
        writers.append(JsonlWriter(epath.Path(workdir) / "metrics.jsonl"))
        if tensorboard:
            writers.append(TensorBoardWriter(epath.Path(workdir) / "tensorboard"))
    return MultiWriter(writers)

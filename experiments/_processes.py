"""What several processes of one run must agree on: who writes, and what is already done."""

import contextlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from logitjax import training


def agreed(answer: bool) -> bool:
    """Process 0's answer, on all: looking at a shared disk at different moments may differ."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Process 0 runs the body before the others do, who then find what it left on disk."""
    if jax.process_count() > 1 and jax.process_index() != 0:
        multihost_utils.sync_global_devices(name)
    yield
    if jax.process_count() > 1 and jax.process_index() == 0:
        multihost_utils.sync_global_devices(name)


def make_mesh(spec: str) -> Any:
    """The mesh as asked for; one that names all its sizes takes so many devices."""
    sizes = [int(part.partition(":")[2]) for part in spec.split(",")]
    devices = jax.devices() if -1 in sizes else jax.devices()[: math.prod(sizes)]
    return training.make_mesh(spec, devices=devices)


def wait_for_all(name: str) -> None:
    """A barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def write_json(path: epath.Path, record: Any) -> None:
    """Write a file whole or not at all, by process 0."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)

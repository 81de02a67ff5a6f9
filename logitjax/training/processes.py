"""What several processes of one run must agree on: who writes, and what is already done."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from logitjax.training import _mesh

Task = TypeVar("Task")


def agreed(answer: bool) -> bool:
    """Process 0's answer, on all: looking at a shared disk at different moments may differ."""
    if jax.process_count() == 1:
        return answer
    return bool(multihost_utils.broadcast_one_to_all(np.int32(answer)))


def said_by_first(make: Callable[[], Any]) -> Any:
    """What process 0 makes, on all: anything that JSON can say. The others wait."""
    if jax.process_count() == 1:
        return make()
    first = jax.process_index() == 0
    text = json.dumps(make()).encode() if first else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    sent = np.frombuffer(text, np.uint8) if first else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(sent), np.uint8).tobytes())


def by_first(name: str, make: Callable[[], Any]) -> None:
    """Process 0 does something that needs no other process; nobody goes on before."""
    if jax.process_index() == 0:
        make()
    wait_for_all(name)


def held_here(tree: Any) -> Any:
    """Arrays that this process can use alone: whole, on its first device. One process has them."""
    if jax.process_count() == 1:
        return tree

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        if leaf.is_fully_replicated:
            return leaf.addressable_data(0)
        return jax.device_put(
            multihost_utils.process_allgather(leaf, tiled=True), jax.local_devices()[0]
        )

    return jax.tree.map(whole, tree)


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Process 0 runs the body before the others do, who then find what it left on disk."""
    if jax.process_count() > 1 and jax.process_index() != 0:
        multihost_utils.sync_global_devices(name)
    yield
    if jax.process_count() > 1 and jax.process_index() == 0:
        multihost_utils.sync_global_devices(name)


def share_of(tasks: Sequence[Task]) -> Sequence[Task]:
    """Every so-manieth of tasks that do not need each other: those that this process does."""
    return tasks[jax.process_index() :: jax.process_count()]


def make_mesh(spec: str) -> Any:
    """The mesh as asked for; one that names all its sizes takes so many devices."""
    sizes = [int(part.partition(":")[2]) for part in spec.split(",")]
    devices = jax.devices() if -1 in sizes else jax.devices()[: math.prod(sizes)]
    return _mesh.make_mesh(spec, devices=devices)


def wait_for_all(name: str) -> None:
    """A barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def remove(directory: epath.Path) -> None:
    """Process 0 removes a folder that may be there; nobody goes on before."""
    by_first(f"remove {directory.name}", lambda: directory.exists() and directory.rmtree())


def write_json(path: epath.Path, record: Any) -> None:
    """Write a file whole or not at all, by process 0."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)

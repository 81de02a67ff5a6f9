"""A pytest plugin: programs compiled by earlier modules are let go before mappings run out.

Every compiled program holds several memory mappings as long as JAX caches it, and a process may
have 65,530 of them by Linux' default. A worker that runs half of the suite gets there.
"""

import gc
import pathlib

import jax
import pytest

_MAPPINGS = pathlib.Path("/proc/self/maps")
_MOST = pathlib.Path("/proc/sys/vm/max_map_count")


def mappings() -> int:
    """How many memory mappings this process has; 0 where the system does not say."""
    return _MAPPINGS.read_bytes().count(b"\n") if _MAPPINGS.exists() else 0


def allowed() -> int:
    """How many the system allows a process."""
    return int(_MOST.read_text()) if _MOST.exists() else 65_530


@pytest.hookimpl(trylast=True)  # when the module's fixtures are gone
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path == item.path:
        return
    if mappings() > allowed() // 4:
        jax.clear_caches()
        gc.unfreeze()
    _, middle, old = gc.get_count()
    if middle or old:  # at least 100,000 objects; the suite seldom does by itself, see conftest.py
        gc.collect()
        # Programs and traces are kept: looking through all of them after each module took seconds.
        gc.freeze()

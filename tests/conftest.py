"""Set before JAX starts: 8 CPU devices, a shared compilation cache, shape checks at run time."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("MPLBACKEND", "Agg")
_CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Scripts that write goldens need torch and transformers.
collect_ignore_glob = ["*/make_*.py", "*/export_*.py"]

# Programs here run once, and optimising them costs more than it saves; `.ci/run` has a run with
# LLVM's optimisations.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jaxtyping  # noqa: E402

import tests._typechecker  # noqa: E402, F401

jaxtyping.install_import_hook("logitjax", "tests._typechecker.typechecker")

import hypothesis  # noqa: E402

hypothesis.settings.register_profile(
    "logitjax",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("logitjax")

from tests import _executables  # noqa: E402


def pytest_configure(config):
    # This file's own hooks would not see the doctests of the package.
    config.pluginmanager.register(_executables)

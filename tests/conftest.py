"""Set before JAX starts: 8 CPU devices, a shared compilation cache, shape checks at run time."""

import gc
import os
import pathlib

import jaxlib.version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# As `training.distributed.initialize` does.
os.environ.setdefault("PJRT_NPROC", "24")
os.environ.setdefault("MPLBACKEND", "Agg")
# A second thread of BLAS waits longer than these small matrices take. Numpy may be here already; it
# is not in the workers of `-n`, which inherit this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
# Small programs too: most of those here are, and two workers and their children share them.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Scripts that write goldens need torch and transformers; rigs are programs.
collect_ignore_glob = ["*/make_*.py", "*/export_*.py", "rigs/*"]

# Ten frames for every operation are a good part of what lowering costs.
os.environ.setdefault("JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS", "0")

# Programs here run once, and optimising them costs more than it saves. `.ci/nightly` runs
# them with what users have.
_flags = ["--xla_backend_optimization_level=0"]
if jaxlib.version.__version_info__ < (0, 11):
    # Emitters that do not go through MLIR compile in half the time; later versions have no others.
    _flags.append("--xla_cpu_use_fusion_emitters=false")
    # Large ones take a fifth less where code is not split for several threads.
    _flags.append("--xla_cpu_parallel_codegen_split_count=1")
os.environ.setdefault("XLA_FLAGS", " ".join(_flags))

from tests import _typechecker  # noqa: E402

_typechecker.install()

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "logitjax",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("logitjax")

from tests import _budget, _executables  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--strict-budget", action="store_true", help="too many programs fail a test")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path):
    """Doctests are the package's: of every function here the line was looked for, for nothing."""
    collectors = yield
    if ">>>" in file_path.read_text(errors="replace"):
        return collectors
    return [c for c in collectors if type(c) is pytest.Module]


def pytest_configure(config):
    # This file's own hooks would not see the doctests of the package.
    config.pluginmanager.register(_executables)
    config.pluginmanager.register(_budget.Budget())


def pytest_collection_finish(session):
    # Tracing makes many small objects; what was imported need not be looked through each time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 10)

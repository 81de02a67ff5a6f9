"""Say what this installation has: versions, devices, kernels, models, data and disk.

    logitjax doctor

What is missing is followed by the command that installs it. The status is 1 if something that every
job needs is broken. Put the output into reports of problems.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator

import jax
from etils import epath

import logitjax
from logitjax import kernels, models

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
# A module of each extra by the extra's name, and what it is for.
_EXTRAS = {
    "models": (("safetensors", "tokenizers", "gguf", "jinja2"), "checkpoints and tokenizers"),
    "vision": (("PIL",), "pictures"),
    "eval": (("rouge_score", "pyarrow"), "ROUGE and Parquet"),
    "serve": (("starlette", "uvicorn", "llguidance"), "logitjax serve"),
    "plots": (("matplotlib",), "pictures in reports"),
    "tensorboard": (("tensorboardX",), "--track=tensorboard"),
    "wandb": (("wandb",), "--track=wandb"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


def run(config: Config) -> None:
    """Prints a line for each thing that was looked at."""
    del config
    fine = True
    for name, value, ok in _lines():
        print(f"{'' if ok else '! '}{name}: {value}", flush=True)
        fine &= ok
    if not fine:
        sys.exit(1)


def _lines() -> Iterator[tuple[str, str, bool]]:
    yield "logitjax", f"{logitjax.__version__} in {epath.Path(logitjax.__file__).parent}", True
    yield "python", f"{platform.python_version()} on {platform.platform()}", True
    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    yield "packages", ", ".join(versions), True
    try:
        devices = jax.devices()
        # A program that runs says more than a driver that is there.
        works = float(jax.jit(lambda x: x @ x)(jax.numpy.ones((2, 2)))[0, 0]) == 2.0
        kinds = ", ".join(sorted({device.device_kind for device in devices}))
        yield "devices", f"{len(devices)} x {kinds} ({jax.default_backend()})", works
    except RuntimeError as error:
        yield "devices", " ".join(str(error).split())[:200], False
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield "machine", f"{os.cpu_count()} cores, {memory:.1f} GB of memory", True
    built = kernels.native.in_use()
    missing = "not built; XLA does their work (python -m logitjax.kernels builds them)"
    yield "kernels for CPUs", "built" if built else missing, True
    for extra, (modules, purpose) in _EXTRAS.items():
        lacking = [module for module in modules if importlib.util.find_spec(module) is None]
        install = f"without {', '.join(lacking)}: pip install 'logitjax[{extra}]'"
        yield f"extra {extra} ({purpose})", install if lacking else "installed", True
    try:
        shape = models.load_config("smollm2")
        yield "model smollm2", f"{shape.num_layers} layers, width {shape.hidden_size}", True
    except (ValueError, ImportError) as error:
        yield "model smollm2", str(error), True
    cache = epath.Path("~/.cache/huggingface/hub").expanduser()
    cached = sorted(path.name[8:].replace("--", "/") for path in cache.glob("models--*"))
    yield "models of the hub", ", ".join(cached) or f"none in {cache}", True
    for name in (".", "~"):
        path = epath.Path(name).expanduser().absolute()
        yield f"disk of {path}", f"{shutil.disk_usage(path).free / 1e9:.1f} GB free", True

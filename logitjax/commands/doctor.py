"""Report what this installation has: versions, devices, kernels, models and disk space.

    logitjax doctor   # no flags

Each missing part is followed by the command that installs it. The exit status is 1 if no device
works. Include the output in bug reports.
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
# Modules that each extra installs.
_EXTRAS = {
    "models": ("safetensors", "tokenizers", "gguf", "jinja2"),
    "vision": ("PIL",),
    "datasets": ("datasets", "pyarrow", "zstandard"),
    "eval": ("rouge_score", "pyarrow"),
    "serve": ("starlette", "uvicorn", "llguidance"),
    "plots": ("matplotlib",),
    "tensorboard": ("tensorboardX",),
    "wandb": ("wandb",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """No options."""


def run(config: Config) -> None:
    """Print a line for each part."""
    del config
    try:
        # A program that ran proves more than an installed driver.
        jax.block_until_ready(jax.jit(lambda x: x @ x)(jax.numpy.ones((2, 2))))
        kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
        works, devices = True, f"{jax.device_count()} x {kinds} ({jax.default_backend()})"
    except RuntimeError as error:
        works, devices = False, f"BROKEN: {' '.join(str(error).split())[:200]}"
    for name, value in [*_versions(), ("devices", devices), *_parts()]:
        print(f"{name}: {value}", flush=True)
    if not works:
        sys.exit(1)


def _versions() -> Iterator[tuple[str, str]]:
    yield "logitjax", f"{logitjax.__version__} in {epath.Path(logitjax.__file__).parent}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "packages", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)


def _parts() -> Iterator[tuple[str, str]]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    yield "machine", f"{os.cpu_count()} cores, {memory:.1f} GB of memory"
    built = kernels.native.in_use()
    yield "CPU kernels", "built" if built else "not built (optional: python -m logitjax.kernels)"
    for extra, modules in _EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        install = f"missing {', '.join(missing)}: pip install 'logitjax[{extra}]'"
        yield f"extra {extra}", install if missing else "installed"
    try:
        shape = models.load_config("smollm2")
        yield "model smollm2", f"installed, {shape.num_layers} layers of width {shape.hidden_size}"
    except (ValueError, ImportError) as error:
        yield "model smollm2", f"missing: {error}"
    cache = epath.Path("~/.cache/huggingface/hub").expanduser()
    cached = sorted(path.name[8:].replace("--", "/") for path in cache.glob("models--*"))
    yield "downloaded models", ", ".join(cached) or "none"
    free = shutil.disk_usage(".").free / 1e9
    yield "disk", f"{free:.1f} GB free in {epath.Path('.').absolute()}"

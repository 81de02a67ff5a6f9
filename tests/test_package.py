"""The surface of ``import logitjax``."""

import pathlib
import subprocess
import sys

import pytest

import logitjax


def test_every_package_is_an_attribute():
    root = pathlib.Path(logitjax.__file__).parent
    packages = {path.parent.name for path in root.glob("*/__init__.py")} | {
        path.stem for path in root.glob("*.py") if not path.stem.startswith("_")
    }
    assert packages == set(logitjax._PACKAGES)
    for name in packages:
        assert getattr(logitjax, name).__name__ == f"logitjax.{name}"


@pytest.mark.every_change
@pytest.mark.slow
def test_packages_need_no_extra_to_be_imported():
    # `serving` is one: all of it stands on starlette and pydantic.
    script = """
import importlib, sys
extras = "gguf huggingface_hub jinja2 safetensors tokenizers PIL rouge_score matplotlib"
for name in (*extras.split(), "starlette", "uvicorn", "pydantic", "tensorboardX"):
    sys.modules[name] = None
import logitjax
for name in logitjax._PACKAGES:
    try:
        importlib.import_module(f"logitjax.{name}")
    except ImportError as error:
        print(name, error)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        done.stdout == "serving package pydantic is not installed: pip install 'logitjax[serve]'\n"
    )


def test_importing_logitjax_alone_imports_nothing_heavy():
    command = [sys.executable, "-c", "import sys, logitjax; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "absl", "etils", "flax"} & set(done.stdout.split())

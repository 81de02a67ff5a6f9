"""logitjax: losses, heads, fusion, audits and edits that work on logits, in JAX.

Import the package you need (``from logitjax import losses``); nothing heavy is imported before.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_PACKAGES = (
    "commands",
    "data",
    "decoding",
    "distillation",
    "evaluation",
    "few_shot",
    "fusion",
    "heads",
    "integrations",
    "kernels",
    "leakage",
    "losses",
    "models",
    "ops",
    "processes",
    "registry",
    "serving",
    "storage",
    "testing",
    "training",
    "transport",
    "unlearning",
    "vision",
    "vq",
)
__all__ = ("__version__", *_PACKAGES)


# PEP 562: a package is imported when somebody asks for it.
def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"logitjax.{name}")
    raise AttributeError(f"module 'logitjax' has no attribute {name!r}")

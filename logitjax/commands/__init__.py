"""Commands that users run on their own models and data: `logitjax NAME --flag=...`.

Each module is a command: its docstring is the help, `Config` its flags, `run` the work, which is a
function of a room or a layer and ends in files. `logitjax --help` imports none of them.
"""

import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence

COMMANDS = {
    "demo": "Watch a model shrink and recover, in a minute or two, without data of your own.",
    "doctor": "Report versions, devices, kernels, models and disk space.",
    "generate": "Chat with a model, or with a large model steered by small ones.",
    "serve": "Serve one model, or several fused ones, over the OpenAI API.",
    "score": "Compute a model's perplexity on texts and its accuracy on multiple-choice questions.",
    "prepare": "Prepare data sets of tensorflow-datasets once, to read them without TensorFlow.",
    "cache-logits": "Cache teachers' logits on disk, to train without the teachers in memory.",
    "distill": "Make a model smaller, or train it to match other models.",
    "unlearn": "Make a model forget what you name, and measure what remains.",
    "extract-features": "Compute features of frozen image encoders once, to train heads on them.",
    "few-shot": "Train and compare classifiers on a few labelled pictures per class.",
    "classify": "Classify new pictures with a head from few-shot.",
    "zero-shot": "Classify pictures by the names of the classes, without labelled pictures.",
    "search": "Find the pictures that match a text or are most similar to a picture.",
    "convert-head": "Replace a model's output head with a vector-quantised approximation.",
    "gw": "Bound the Gromov-Wasserstein distance of two graphs, next to a general solver.",
    "audit": "Measure what your model's API reveals about its output head.",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command named by the first argument, with the flags that follow."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h", "help"):
        width = max(map(len, COMMANDS))
        print("usage: logitjax COMMAND [--flag=value ...]\n")
        for command, line in COMMANDS.items():
            print(f"  {command:{width}}  {line}")
        print("\n`logitjax COMMAND --help` explains a command and lists its flags.")
        return
    if name == "--version":
        print(importlib.import_module("logitjax").__version__)
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f", perhaps {near[0]}" if near else f" ({', '.join(COMMANDS)})"
        print(f"error: command: expected one that `logitjax --help` lists{hint}, got {name!r}",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    # No cleanup is needed yet, and some packages would turn this into another error.
    before = signal.signal(signal.SIGINT, _end)
    # A slow disk may take half a minute to load it, and silence looks like a hang.
    loaded = threading.Event()
    threading.Thread(target=_say, args=(name, loaded), daemon=True).start()
    try:
        # jax takes seconds to import, so `--help` and a wrong name are handled before that.
        command = importlib.import_module(f"logitjax.commands.{name.replace('-', '_')}")
        cli = importlib.import_module("logitjax.commands.cli")
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        loaded.set()
        signal.signal(signal.SIGINT, before)
    recipes = getattr(command, "RECIPES", None)
    cli.main(command.Config, recipes, command.run, program=f"logitjax {name}", arguments=rest)


def _say(name: str, loaded: threading.Event) -> None:
    if not loaded.wait(2.0):
        print(f"{name}: loading JAX", file=sys.stderr, flush=True)
    while not loaded.wait(7.0):
        print(f"{name}: still loading JAX", file=sys.stderr, flush=True)


def _end(*_: object) -> None:
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGINT)

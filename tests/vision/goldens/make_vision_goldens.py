"""Writes vision.npz and the torch checkpoints beside this file; needs torch.

    python tests/models/goldens/make_vision_goldens.py

The networks are written once more here with torch's own operations and the names that public
checkpoints use. Weights are not stored: ``weight(name, shape)`` gives the same ones to both sides.
"""

import argparse
import pathlib
import zlib

import numpy as np

HERE = pathlib.Path(__file__).parent


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight in torch's layout that depends on nothing but its name and shape."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith("running_var"):
        value = rng.uniform(0.5, 1.5, shape)
    elif name.endswith("weight") and len(shape) == 1:
        value = rng.uniform(0.5, 1.0, shape)
    elif name.endswith("weight"):
        value = rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))
    else:
        value = 0.1 * rng.normal(size=shape)
    return value.astype(np.float32)


def images(size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, size, size, 3)).astype(np.float32)


class Net:
    def __init__(self):
        import torch

        self.torch, self.f = torch, torch.nn.functional

    def w(self, name, *shape):
        return self.torch.from_numpy(weight(name, shape))

    def conv(self, x, name, features, kernel=3, stride=1, groups=1, bias=False):
        w = self.w(f"{name}.weight", features, x.shape[1] // groups, kernel, kernel)
        b = self.w(f"{name}.bias", features) if bias else None
        return self.f.conv2d(x, w, b, stride=stride, padding=(kernel - 1) // 2, groups=groups)

    def bn(self, x, name):
        names = ("running_mean", "running_var", "weight", "bias")
        return self.f.batch_norm(x, *(self.w(f"{name}.{n}", x.shape[1]) for n in names))

    def linear(self, x, name, classes):
        x = x.mean((2, 3))
        return self.f.linear(
            x, self.w(f"{name}.weight", classes, x.shape[1]), self.w(f"{name}.bias", classes)
        )

    def basic(self, x, name, features, stride):
        relu = self.f.relu
        out = relu(self.bn(self.conv(x, f"{name}.conv1", features, 3, stride), f"{name}.bn1"))
        out = self.bn(self.conv(out, f"{name}.conv2", features), f"{name}.bn2")
        if stride != 1 or x.shape[1] != features:
            x = self.conv(x, f"{name}.downsample.0", features, 1, stride)
            x = self.bn(x, f"{name}.downsample.1")
        return relu(out + x)

    def resnet20(self, x):
        x = self.f.relu(self.bn(self.conv(x, "conv1", 16), "bn1"))
        for stage, features in enumerate((16, 32, 64), 1):
            for block in range(3):
                stride = 2 if stage > 1 and block == 0 else 1
                x = self.basic(x, f"layer{stage}.{block}", features, stride)
        return self.linear(x, "fc", 100)

    def imagenet_resnet18(self, x):
        x = self.f.relu(self.bn(self.conv(x, "conv1", 64, 7, 2), "bn1"))
        x = self.f.max_pool2d(x, 3, 2, 1)
        for stage, features in enumerate((64, 128, 256, 512), 1):
            for block in range(2):
                stride = 2 if stage > 1 and block == 0 else 1
                x = self.basic(x, f"layer{stage}.{block}", features, stride)
        return self.linear(x, "fc", 100)


SIZES = {"resnet20": 32, "imagenet_resnet18": 64}


def main() -> None:
    import torch

    net, goldens = Net(), {}
    with torch.no_grad():
        for name, size in SIZES.items():
            x = torch.from_numpy(images(size)).permute(0, 3, 1, 2)
            goldens[name] = getattr(net, name)(x).numpy()
    np.savez_compressed(HERE / "vision.npz", **goldens)

    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    content = {
        "model": {
            "module.plain": base,
            "module.transposed": base.T,
            "module.slice": base[1:, ::2],
            "module.bfloat16": base.to(torch.bfloat16),
            "module.count": torch.tensor(7),
            "module.parameter": torch.nn.Parameter(base[0]),
        },
        "opt": argparse.Namespace(learning_rate=0.05),
        "best_acc": np.float64(72.5),
        "epoch": 240,
    }
    torch.save(content, HERE / "zip.pth")
    torch.save(content, HERE / "legacy.pth", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()

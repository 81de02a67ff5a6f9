"""The benchmarked encoders in torch: each line of the input names one, answered by its classes."""

import json
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional

# Kernel, stride of the first block, expansion, channels, blocks.
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class Same(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x):
        pads = []
        for length, size, step in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1]):
            total = max((-(-length // step) - 1) * step + size - length, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(x, pads) if any(pads) else x)


def normed(inside: int, outside: int, kernel: int, stride: int = 1, groups: int = 1) -> list:
    layer = Same(inside, outside, kernel, stride, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outside, eps=1e-3)]


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expand: int):
        super().__init__()
        wide, layers = inside * expand, []
        if expand > 1:
            layers += [*normed(inside, wide, 1), nn.ReLU6()]
        layers += [*normed(wide, wide, kernel, stride, wide), nn.ReLU6(), *normed(wide, outside, 1)]
        self.layers = nn.Sequential(*layers)
        self.residual = stride == 1 and inside == outside

    def forward(self, x):
        return x + self.layers(x) if self.residual else self.layers(x)


def efficientnet_lite0(path: str) -> nn.Module:
    layers, inside = [*normed(3, 32, 3, 2), nn.ReLU6()], 32
    for kernel, stride, expand, outside, count in STAGES:
        for block in range(count):
            layers.append(Block(inside, outside, kernel, 1 if block else stride, expand))
            inside = outside
    layers += [*normed(inside, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(1280, 1000))
    if path:
        # The same weights in the same order; only their names differ.
        given = list(torch.load(path, weights_only=True).values())
        names = list(model.state_dict())
        model.load_state_dict(dict(zip(names, given, strict=True)))
    return model


def alexnet() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(), nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def main(pixels: str, weights: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    images = torch.from_numpy(np.load(pixels)).permute(0, 3, 1, 2)  # as they lie: channels last
    models = {"efficientnet_lite0": efficientnet_lite0(weights), "alexnet": alexnet()}
    for model in models.values():
        model.eval().to(memory_format=torch.channels_last)
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            name, whole = json.loads(line)
            taken = images if whole else images[torch.arange(batch) % len(images)]
            out = models[name]((taken.float() - 127) / 128)
            print(json.dumps(out.argmax(1).tolist()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

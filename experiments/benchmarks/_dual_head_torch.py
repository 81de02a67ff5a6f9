"""KD steps of ResNet-20 (teacher ResNet-56) in torch; each line of the input runs one more step."""

import json
import sys

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Identity()
        if stride != 1 or inside != outside:
            project = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(outside))

    def forward(self, x):
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet(depth: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inside = 16
    for stage, outside in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            layers.append(Block(inside, outside, 2 if stage and not block else 1))
            inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 100))


def main(batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    student, teacher = resnet(20), resnet(56).eval()
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    optimizer = torch.optim.SGD(student.parameters(), **options)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(100, (batch,))
    with torch.no_grad():
        existing = teacher(x)
    print("ready", flush=True)
    for line in sys.stdin:
        (given,) = json.loads(line)
        with torch.no_grad():
            target = existing if given else teacher(x)
        logits = student(x)
        soft = functional.kl_div(
            (logits / 4).log_softmax(1), (target / 4).softmax(1), reduction="batchmean"
        )
        loss = functional.cross_entropy(logits, y) + 1.6 * soft
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(loss.item(), flush=True)


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))

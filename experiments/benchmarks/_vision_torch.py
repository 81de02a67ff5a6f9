"""The benchmarked encoders in torch: each line of the input names one, answered by its classes."""

import json
import sys

import numpy as np
import timm
import torch
import torchvision


def efficientnet_lite0(path: str) -> torch.nn.Module:
    model = timm.create_model("tf_efficientnet_lite0")
    if path:
        # The same weights in the same order; only their names differ.
        given = list(torch.load(path, weights_only=True).values())
        model.load_state_dict(dict(zip(model.state_dict(), given, strict=True)))
    return model


def main(pixels: str, weights: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    images = torch.from_numpy(np.load(pixels)).permute(0, 3, 1, 2)  # as they lie: channels last
    models = {
        "efficientnet_lite0": efficientnet_lite0(weights),
        "alexnet": torchvision.models.alexnet().features,
    }
    for model in models.values():
        model.eval().to(memory_format=torch.channels_last)
    print("ready", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            name, whole = json.loads(line)
            taken = images if whole else images[torch.arange(batch) % len(images)]
            out = models[name]((taken.float() - 127) / 128)
            print(json.dumps(out.flatten(1).argmax(1).tolist()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

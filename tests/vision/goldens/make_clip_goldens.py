"""Writes clip.npz beside this file: a random CLIP of transformers, on photographs and texts.

    python tests/vision/goldens/make_clip_goldens.py

Needs torch, transformers and Pillow. The folder is as `save_pretrained` writes it, tokenizer and
processor included, with the weights of `tower_weight`, which are not stored. Pictures go through
the processor of transformers that scales with Pillow.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

from make_tower_goldens import tower_weight  # noqa: E402

CLASSES = ("cat", "barn owl", "house")
PROMPT = "a photo of a {}."
# Height and width.
SIZES = ((48, 40), (40, 64), (32, 32), (90, 70))
FILES = ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def photographs() -> list[np.ndarray]:
    """Smooth pictures of different shapes, the same everywhere."""
    rng, result = np.random.default_rng(11), []
    for height, width in SIZES:
        coarse = rng.integers(0, 256, (5, 5, 3)).astype(np.float64)
        for axis, size in enumerate((height, width)):
            places = np.arange(size) * 4 / size
            low, shape = places.astype(int), [-1 if axis == i else 1 for i in range(3)]
            part = (places - low).reshape(shape)
            coarse = coarse.take(low, axis) * (1 - part) + coarse.take(low + 1, axis) * part
        result.append(np.round(coarse).astype(np.uint8))
    return result


def clip_weights(shapes: dict) -> dict[str, np.ndarray]:
    """Weights by the names of the file; the scale is small, so that no probability is 0 or 1."""
    made = {k: np.asarray(tower_weight(k, tuple(v)), np.float32) for k, v in shapes.items()}
    return {k: v.reshape(shapes[k]).copy() for k, v in made.items()}


def tokenizer(merges: str):
    """The tokenizer of transformers with these merges, in OpenAI's order of tokens."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = list(bytes_to_unicode().values())
    pairs = [tuple(line.split()) for line in merges.split("\n")[1:] if line.count(" ") == 1]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *map("".join, pairs)]
    vocab = {t: i for i, t in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=77)


def main() -> None:
    import safetensors.torch
    import torch
    import transformers as t
    from PIL import Image

    words = tokenizer(str(np.load(HERE / "encoders.npz")["bpe_merges"]))
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    vision = dict(sizes, num_attention_heads=4, image_size=32, patch_size=8)
    text = dict(sizes, num_attention_heads=2, vocab_size=len(words), max_position_embeddings=77)
    text |= {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = t.CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    colours = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = t.CLIPImageProcessorPil(**colours)
    with tempfile.TemporaryDirectory() as scratch:
        for part in (t.CLIPModel(config), words, processor):
            part.save_pretrained(scratch)
        folder = pathlib.Path(scratch)
        path = folder / "model.safetensors"
        saved = safetensors.torch.load_file(path)
        shapes = {k: list(v.shape) for k, v in saved.items() if v.is_floating_point()}
        made = {k: torch.from_numpy(v) for k, v in clip_weights(shapes).items()}
        safetensors.torch.save_file(saved | made, path, metadata={"format": "pt"})
        model = t.CLIPModel.from_pretrained(scratch).eval()
        files = {name: (folder / name).read_text() for name in FILES if (folder / name).exists()}
    pixels = processor([Image.fromarray(x) for x in photographs()], return_tensors="pt")
    prompts = [PROMPT.format(name) for name in CLASSES]
    ids = words(prompts, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(**pixels, **ids)
    np.savez_compressed(
        HERE / "clip.npz",
        shapes=np.array(json.dumps(shapes)),
        files=np.array(json.dumps(files)),
        pixels=pixels["pixel_values"].permute(0, 2, 3, 1).numpy(),
        tokens=ids["input_ids"].numpy().astype(np.int32),
        images=out.image_embeds.numpy(),
        texts=out.text_embeds.numpy(),
        probabilities=out.logits_per_image.softmax(1).numpy(),
    )


if __name__ == "__main__":
    main()

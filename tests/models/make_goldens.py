"""Write the logits of transformers' models that the suite compares with, and check our exports.

Needs torch and transformers, which the suite does not; run it where they are installed::

    python -m tests.models.make_goldens --jax-python .venv/bin/python

``--jax-python`` is an interpreter with logitjax: it exports every family, and the exports must
load in transformers with the same logits. Without it only the goldens are written.
"""

import argparse
import pathlib
import subprocess
import tempfile

import numpy as np
import torch
import transformers

from tests.models._configs import GOLDEN_POSITIONS, HF_CONFIGS, TOKENS, weight

GOLDENS = pathlib.Path(__file__).parent / "goldens.npz"


def reference(raw: dict) -> np.ndarray:
    """Logits of transformers' model with our weights."""
    raw = dict(raw)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    with torch.no_grad():
        for name, parameter in model.state_dict().items():
            if name not in tied:
                parameter.copy_(torch.from_numpy(stored(name, tuple(parameter.shape), config)))
    return logits(model)


def stored(name: str, shape: tuple[int, ...], config) -> np.ndarray:
    """The values of a parameter, from those of checkpoints, where each expert has its own."""
    mixtral = config.model_type == "mixtral"
    if mixtral:
        name = name.replace(".mlp.", ".block_sparse_moe.")
    before, _, kind = name.partition(".experts.")
    if not kind:
        return weight(name, shape)
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    parts = [down] if kind == "down_proj" else [gate, up]
    one = (shape[1] // len(parts), shape[2])
    names = [[f"{before}.experts.{e}.{part}.weight" for part in parts] for e in range(shape[0])]
    return np.stack([np.concatenate([weight(n, one) for n in expert]) for expert in names])


def logits(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits.float().numpy()


def check_exports(python: str, goldens: dict[str, np.ndarray]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([python, "-m", "tests.models.export_families", directory], check=True)
        for name, expected in goldens.items():
            model = transformers.AutoModelForCausalLM.from_pretrained(
                f"{directory}/{name}", attn_implementation="eager", dtype=torch.float32
            ).eval()
            error = np.abs(logits(model)[:, GOLDEN_POSITIONS] - expected).max()
            error /= np.abs(expected).max()
            print(f"export {name:14s} relative difference {error:.1e}")
            if error > 1e-6:
                raise SystemExit(f"{name}: the export differs")
        tokenizer_directory = pathlib.Path(directory) / "tokenizer"
        if tokenizer_directory.exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(tokenizer_directory))
            text = (tokenizer_directory / "text.txt").read_text()
            ours = np.load(tokenizer_directory / "ids.npy").tolist()
            if tokenizer(text, add_special_tokens=False)["input_ids"] != ours:
                raise SystemExit("tokenizer: the export encodes differently")
            messages = [{"role": "user", "content": "Hello"}]
            chat = tokenizer.apply_chat_template(messages, tokenize=False)
            if chat != (tokenizer_directory / "chat.txt").read_text():
                raise SystemExit("tokenizer: the chat template differs")
            print("export tokenizer      equal ids and chat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jax-python")
    arguments = parser.parse_args()
    goldens = {}
    for name, raw in HF_CONFIGS.items():
        goldens[name] = reference(raw)[:, GOLDEN_POSITIONS].astype(np.float32)
        print(f"golden {name:14s} largest logit {np.abs(goldens[name]).max():.2f}")
    np.savez_compressed(GOLDENS, **goldens)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes, transformers {transformers.__version__}")
    if arguments.jax_python:
        check_exports(arguments.jax_python, goldens)


if __name__ == "__main__":
    main()

"""Write what transformers' ``generate`` says on SmolLM2, which the suite compares with.

Needs torch and transformers, which the suite does not; run it where they are installed::

    python -m tests.decoding.goldens.make_greedy_goldens --jax-python .venv/bin/python

``--jax-python`` is an interpreter with logitjax: it writes the packaged SmolLM2 as a Hugging Face
directory, and the prompts. Float32, greedy, batches of one: what is written does not depend on how
rows are padded.
"""

import argparse
import pathlib
import subprocess
import tempfile

import numpy as np
import torch
import transformers

GOLDENS = pathlib.Path(__file__).parent / "greedy.npz"
NEW = 64

_EXPORT = """
import sys, numpy as np
from logitjax import models
from tests.decoding.goldens._prompts import prompts
model = models.load_model("smollm2", layout="listed")
tokenizer = models.load_tokenizer("smollm2")
models.save_pretrained(model, tokenizer, sys.argv[1])
rows = prompts(tokenizer)
np.savez(sys.argv[2], lengths=[len(r) for r in rows], tokens=np.concatenate(rows))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jax-python", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        given = f"{directory}/prompts.npz"
        subprocess.run([arguments.jax_python, "-c", _EXPORT, directory, given], check=True)
        packed = np.load(given)
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model.eval()
    model.generation_config.eos_token_id = None
    rows = np.split(packed["tokens"], np.cumsum(packed["lengths"])[:-1])
    tokens = np.zeros((len(rows), NEW), np.int32)
    gaps = np.zeros((len(rows), NEW), np.float32)
    for i, row in enumerate(rows):
        with torch.no_grad():
            # No end: every row has all its tokens.
            out = model.generate(
                torch.from_numpy(row.astype(np.int64))[None],
                max_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        tokens[i] = out.sequences[0, len(row) :].numpy()
        for n, logits in enumerate(out.logits):
            best = torch.topk(logits[0], 2).values
            gaps[i, n] = float(best[0] - best[1])
        print(f"row {i}: {len(row)} prompt tokens, smallest gap {gaps[i].min():.4f}", flush=True)
    np.savez_compressed(
        GOLDENS,
        prompts=packed["tokens"].astype(np.uint16),
        lengths=packed["lengths"].astype(np.int32),
        tokens=tokens.astype(np.uint16),
        gaps=gaps.astype(np.float16),
    )
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()

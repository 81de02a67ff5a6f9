"""Logits of a model less its assistant as transformers and PEFT have them.

Run as ``python _unlearn_torch.py BASE ASSISTANT TOKENS.npy OUT.npy``, tokens ``[rows, time]``.
"""

import json
import math
import pathlib
import sys

import numpy as np
import peft
import torch
import transformers


def main(base: str, assistant: str, tokens: str, out: str) -> None:
    record = json.loads((pathlib.Path(assistant) / "assistant.json").read_text())
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(base, dtype=torch.float32).eval()
    small = load(base, dtype=torch.float32, num_hidden_layers=record["layers"])
    small = peft.PeftModel.from_pretrained(small, assistant).eval()
    ids = torch.tensor(np.load(tokens), dtype=torch.long)
    with torch.no_grad():
        said = small(ids).logits
        if record["relative"]:
            with small.disable_adapter():
                said = said - small(ids).logits
        said = said.log_softmax(-1)
        logits = model(ids).logits - record["alpha"] * (said + math.log(said.shape[-1]))
        np.save(out, logits.log_softmax(-1).numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])

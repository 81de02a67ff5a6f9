"""Logits of a model less its assistant as transformers and PEFT compute them.

Run as ``python _unlearn_torch.py BASE ASSISTANT TOKENS.npy OUT.npz``, tokens ``[rows, time]``. OUT
has log-probabilities, computed in `float32` and in `float64`.
"""

import json
import math
import pathlib
import sys

import numpy as np
import peft
import torch
import transformers


def log_probs(base: str, assistant: str, ids: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    record = json.loads((pathlib.Path(assistant) / "assistant.json").read_text())
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(base, dtype=dtype).eval()
    small = load(base, dtype=dtype, num_hidden_layers=record["layers"])
    small = peft.PeftModel.from_pretrained(small, assistant, autocast_adapter_dtype=False)
    small = small.to(dtype).eval()
    with torch.no_grad():
        message = small(ids).logits
        if record["relative"]:
            with small.disable_adapter():
                message = message - small(ids).logits
        message = message.log_softmax(-1)
        logits = model(ids).logits - record["alpha"] * (message + math.log(message.shape[-1]))
        return logits.log_softmax(-1).numpy()


def main(base: str, assistant: str, tokens: str, out: str) -> None:
    ids = torch.tensor(np.load(tokens), dtype=torch.long)
    single, double = (
        log_probs(base, assistant, ids, dtype) for dtype in (torch.float32, torch.float64)
    )
    np.savez(out, float32=single, float64=double)


if __name__ == "__main__":
    main(*sys.argv[1:])

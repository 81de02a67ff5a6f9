"""transformers' ``generate`` in its own process, which takes turns with the benchmark.

Run as ``python _decoding_torch.py DIRECTORY NEW THREADS``. Each line of standard input is a batch
of prompts in JSON, answered by a line of tokens.
"""

import json
import sys

import torch
import transformers


def main(directory: str, new: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model = model.eval()
    # No end token, so that the requested number of tokens is generated.
    model.generation_config.eos_token_id = None
    print("ready", flush=True)
    for line in sys.stdin:
        (prompts,) = json.loads(line)
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, longest - len(prompt) :] = torch.tensor(prompt)
            mask[i, longest - len(prompt) :] = 1
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        print(json.dumps(out[:, longest:].tolist()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

"""Export every family, and the packaged tokenizer, for make_goldens.py to read back."""

import pathlib
import sys
import tempfile

import numpy as np

from logitjax.models import load_model, load_tokenizer, save_pretrained
from tests.models._checkpoints import write_checkpoint
from tests.models._configs import HF_CONFIGS


def main(directory: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for name in HF_CONFIGS:
            source = write_checkpoint(name, pathlib.Path(scratch) / name)
            save_pretrained(load_model(str(source)), None, directory / name, max_shard_bytes=20_000)
    try:
        tokenizer = load_tokenizer("smollm2")
    except ValueError:
        return
    source = write_checkpoint("smollm2", directory / "tokenizer")
    save_pretrained(load_model(str(source)), tokenizer, directory / "tokenizer")
    text = "Hello  world, 12345 <|im_start|>\n\tnaïve café – 你好 don't"
    (directory / "tokenizer" / "text.txt").write_text(text)
    np.save(directory / "tokenizer" / "ids.npy", tokenizer.encode(text))
    chat = tokenizer.render_chat([{"role": "user", "content": "Hello"}])
    (directory / "tokenizer" / "chat.txt").write_text(chat)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

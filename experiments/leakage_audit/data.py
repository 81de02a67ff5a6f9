"""The audited model's last-position logits, computed once and kept on disk."""

import dataclasses
from typing import Any

import numpy as np
from etils import epath
from flax import nnx

from experiments.leakage_audit.config import Config
from logitjax import data, decoding, leakage, models, storage


@dataclasses.dataclass(frozen=True)
class Rows:
    """Values that the audit knows and an API would not show.

    Attributes:
        prompts: `[n, length]` tokens.
        logits: `[n, vocab]` float32.
        head: `[vocab, hidden]`.
        order: Order of the prompts by their tokens.
    """

    prompts: np.ndarray
    logits: np.ndarray
    head: np.ndarray
    order: dict[bytes, int]

    @property
    def width(self) -> int:
        return self.head.shape[1]

    @property
    def vocab(self) -> int:
        return self.head.shape[0]

    def oracle(self, policy: leakage.LogitPolicy, seed: int) -> leakage.LogitOracle:
        """The model behind a policy; its answers come from the table, not from the network."""

        def apply(tokens: Any) -> np.ndarray:
            return self.logits[[self.order[row.tobytes()] for row in np.asarray(tokens, np.int32)]]

        return leakage.LogitOracle(apply, policy, seed=seed, batch_size=64, cache_size=64)


def load(config: Config, workdir: epath.Path) -> Rows:
    """Cuts prompts and runs the model; a second run reads the logits from disk."""
    model, tokenizer = models.load(config.model, layout="listed")
    head = model.head_of()
    if head.bias is not None:
        raise ValueError("model: expected a head without biases, whose rows span one more")
    rows = np.asarray(head.rows, np.float32)
    prompts = data.token_windows(
        data.load_examples(config.data),
        tokenizer.encode,
        count=config.prompts,
        length=config.prompt_length,
        start=tokenizer.start,
    )
    cache = storage.RowCache(
        workdir / "cache",
        storage.ArrayCodec({"logits": ("float32", (len(rows),))}),
        made_from={"model": config.model, "prompts": storage.digest(prompts)},
        kind="logits",
    )
    graphdef, state = nnx.split(model)
    last = decoding.next_token_program(graphdef)
    cache.fill(
        range(len(prompts)),
        lambda chosen: {"logits": last(state, prompts[chosen])},
        batch_size=config.batch_size,
        label=config.model,
    )
    logits = cache.read(range(len(prompts)))["logits"]
    order = {row.tobytes(): i for i, row in enumerate(prompts)}
    return Rows(prompts, logits, rows, order)

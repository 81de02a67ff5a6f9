"""The audited model's last-position logits, computed once and kept on disk."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from logitjax import data, leakage, models


@dataclasses.dataclass(frozen=True)
class Rows:
    """What the audit knows and an API would not show.

    Attributes:
      prompts: ``[n, length]`` tokens.
      logits: ``[n, vocab]`` float32.
      head: ``[vocab, hidden]``.
      order: of the prompts by their tokens.
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

    def oracle(
        self, policy: leakage.LogitPolicy, seed: int, budget: int | None = None
    ) -> leakage.LogitOracle:
        """The model behind a policy; its answers come from the table, not from the network."""

        def apply(tokens: Any) -> np.ndarray:
            return self.logits[[self.order[row.tobytes()] for row in np.asarray(tokens, np.int32)]]

        return leakage.LogitOracle(
            apply, policy, seed=seed, budget=budget, batch_size=64, cache_size=64
        )


def load(config: Any, workdir: epath.Path) -> Rows:
    """Cuts prompts, runs the model; a second run reads what the first left."""
    model, tokenizer = models.load(config.model, layout="listed")
    head = model.head_of()
    if head.bias is not None:
        raise ValueError("a head with biases is not audited: its rows span one dimension more")
    rows = np.asarray(head.rows, np.float32)
    prompts = _prompts(config, tokenizer)
    directory = workdir / "cache"
    path = directory / "logits.npz"
    if path.exists():
        with np.load(path) as held:
            if not np.array_equal(held["prompts"], prompts):
                raise ValueError(f"{path} holds the logits of other prompts; name a new --workdir")
            logits = held["logits"]
    else:
        logits = _logits(model, prompts, config.batch_size)
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "partial.npz").open("wb") as file:
            np.savez(file, prompts=prompts, logits=logits)
        (directory / "partial.npz").replace(path)
    order = {row.tobytes(): i for i, row in enumerate(prompts)}
    return Rows(prompts, logits, rows, order)


def _prompts(config: Any, tokenizer: Any) -> np.ndarray:
    """The beginnings of documents, then what follows them; no two prompts alike."""
    examples = data.load_examples(config.data)
    length, found = config.prompt_length, {}
    start, longest = 0, 1
    while start < longest:
        for i in range(len(examples)):
            tokens = tokenizer.encode(examples[i]["text"])
            longest = max(longest, len(tokens))
            window = np.asarray(tokens[start : start + length], np.int32)
            if len(window) == length:
                found.setdefault(window.tobytes(), window)
            if len(found) == config.prompts:
                return np.stack(list(found.values()))
        start += length
    raise ValueError(
        f"{config.data} has {len(found)} different prompts of {length} tokens, "
        f"fewer than prompts={config.prompts}"
    )


def last_logits(graphdef: Any) -> Any:
    """Compiled: ``(state, tokens [rows, length])`` to the logits of what comes next."""

    @jax.jit
    def last(state: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, state)
        hidden, _ = model.hidden_states(tokens)
        return model.logits(hidden[:, -1:])[:, 0].astype(jnp.float32)

    return last


def _logits(model: Any, prompts: np.ndarray, batch_size: int) -> np.ndarray:
    graphdef, state = nnx.split(model)
    last, parts = last_logits(graphdef), []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        short = batch_size - len(batch)
        batch = np.concatenate([batch, np.repeat(batch[-1:], short, 0)]) if short else batch
        parts.append(np.asarray(last(state, batch))[: batch_size - short])
        if start // batch_size % 10 == 0:
            logging.info("prompt %d of %d", start, len(prompts))
    return np.concatenate(parts)

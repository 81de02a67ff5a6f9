"""Capability of a student that learns from an API's answers, by the content of an answer.

    python -m experiments.leakage_audit.capability --workdir=runs/capability

A policy protects rows of logits, not the skill behind them, which leaves with the text. A decoder
of bytes learns from articles and answers prompts that it has not seen. Fresh students of its shape
learn from the answers: from the text alone, the five largest log-probabilities, or whole rows, each
stopped where it predicts other text best. `skill` is the share of the way, in nats a byte of
held-out text, from a student of the prompts alone to the teacher. arXiv:2605.10407 asks the same
question of fits. It takes some 30 CPU-minutes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from etils import epath
from flax import nnx

from experiments.shared.report import markdown_table, write_report
from logitjax import data
from logitjax.commands import cli
from logitjax.commands.cli import field
from logitjax.models import Decoder, DecoderConfig

BYTES = 256
# Contents of an answer, and a server's policies that give them. A key's nats are spent at log 256
# a byte.
SHOWN = {"text": "free or plain, no values", "top 5": "free or plain, top 5", "rows": "whole rows"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of one run of the experiment."""

    data: str = field("tfds:wiki_summaries", "Text that teacher and prompts are from.")
    queries: tuple[int, ...] = field((500, 4000), "Numbers of answers.")
    prompt: int = field(16, "Number of bytes of a prompt.")
    answer: int = field(48, "Number of bytes of an answer.")
    teacher_steps: int = field(1500, "Number of training steps of the teacher.")
    steps: int = field(800, "Number of training steps of each student.")
    looks: int = field(8, "Number of validations, at the best of which training stops.")
    key_nats: float = field(100_000.0, "Budget of a key where choices are metered.")


def _decoder(seed: int) -> tuple[Any, Any]:
    config = DecoderConfig(
        vocab_size=BYTES,
        hidden_size=64,
        intermediate_size=192,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        max_length=128,
    )
    return nnx.split(Decoder(config, rngs=nnx.Rngs(seed), layout="listed"))


@functools.partial(jax.jit, static_argnums=0)
def _log_p(graphdef: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """Log-probabilities of the byte after each of these, `[rows, time, bytes]`."""
    model = nnx.merge(graphdef, params)
    return jax.nn.log_softmax(model.logits(model.hidden_states(tokens)[0]))


def _loss(log_p: jax.Array, tokens: jax.Array, prompt: int, shown: str, taught: Any) -> jax.Array:
    """Nats a byte, of the prompts' own text and of the content of the answers."""
    local = -jnp.take_along_axis(log_p[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
    if shown in ("all", "text"):
        return local.mean()
    given, answers = local[:, : prompt - 1], log_p[:, prompt - 1 : -1]
    if shown == "prompts":
        return given.mean()
    if shown == "rows":
        missed = -(jnp.exp(taught) * answers).sum(-1)
    else:
        best, ids = jax.lax.top_k(taught, 5)
        ours = jnp.take_along_axis(answers, ids, axis=-1)
        rest, left = (jnp.maximum(1 - jnp.exp(x).sum(-1), 1e-6) for x in (best, ours))
        missed = -(jnp.exp(best) * ours).sum(-1) - rest * jnp.log(left)
    return jnp.concatenate([given, missed], axis=1).mean()


@functools.cache
def _step(graphdef: Any, prompt: int, shown: str, steps: int) -> tuple[Any, Any]:
    """An optimizer and its step, compiled once for any number of answers."""
    rate = optax.warmup_cosine_decay_schedule(0.0, 5e-3, steps // 10, steps)
    optimizer = optax.adamw(rate)

    @jax.jit
    def step(params: Any, state: Any, tokens: jax.Array, taught: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return _loss(_log_p(graphdef, params, tokens), tokens, prompt, shown, taught)

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return optimizer, step


def _nats(graphdef: Any, params: Any, rows: np.ndarray) -> float:
    return float(_loss(_log_p(graphdef, params, rows), jnp.asarray(rows), 1, "all", None))


def _fit(
    graphdef: Any, params: Any, rows: np.ndarray, taught: Any, other: np.ndarray, **how: Any
) -> Any:
    """Parameters, after steps of 32 rows, that predict other text best."""
    # A few answers are memorised long before many are learned.
    looks = how.pop("looks")
    optimizer, step = _step(graphdef, **how)
    state, rng = optimizer.init(params), np.random.default_rng(0)
    best, least = params, np.inf
    for number in range(1, how["steps"] + 1):
        some = rng.choice(len(rows), 32)
        params, state = step(params, state, rows[some], None if taught is None else taught[some])
        if number % max(1, how["steps"] // looks) == 0:
            loss = _nats(graphdef, params, other)
            best, least = (params, loss) if loss < least else (best, least)
    return best


def _answered(
    graphdef: Any, params: Any, prompts: np.ndarray, config: Config
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts with the answers drawn after them, and the row that drew each byte."""
    size = config.prompt + config.answer

    @jax.jit
    def write(key: jax.Array, tokens: jax.Array) -> jax.Array:
        def draw(at: jax.Array, tokens: jax.Array) -> jax.Array:
            row = _log_p(graphdef, params, tokens)[:, at - 1]
            drawn = jax.random.categorical(jax.random.fold_in(key, at), row)
            return tokens.at[:, at].set(drawn.astype(jnp.int32))

        return jax.lax.fori_loop(config.prompt, size, draw, tokens)

    rows, notes = [], []
    for i, some in enumerate(np.array_split(prompts, max(1, len(prompts) // 125))):
        rows.append(
            np.asarray(write(jax.random.key(i), np.pad(some, ((0, 0), (0, config.answer)))))
        )
        notes.append(np.asarray(_log_p(graphdef, params, rows[-1])[:, config.prompt - 1 : -1]))
    return np.concatenate(rows), np.concatenate(notes)


def run(config: Config, workdir: epath.Path) -> None:
    """Teacher, answers, students, and a table of each student's skill."""
    size = config.prompt + config.answer
    text = "\n".join(row["text"] for row in data.load_examples(config.data))
    words = np.frombuffer(text.encode()[:8_000_000], np.uint8).astype(np.int32)
    words = words[: len(words) // size * size].reshape(-1, size)
    words = np.random.default_rng(1).permutation(words)
    few = min(200, len(words) // 10)
    stored, other, asked, existing = np.split(words, [few, 2 * few, 2 * few + max(config.queries)])
    how: dict[str, Any] = {"prompt": config.prompt, "looks": config.looks}
    graphdef, params = _decoder(0)
    params = _fit(
        graphdef, params, existing, None, other, shown="all", steps=config.teacher_steps, **how
    )
    goal = _nats(graphdef, params, stored)
    logging.info("teacher: %.3f", goal)
    rows, notes = _answered(graphdef, params, asked[:, : config.prompt], config)
    table, records = [], []
    most = int(config.key_nats / (config.answer * np.log(BYTES)))
    for queries in config.queries:
        losses = {}
        for shown in ("prompts", *SHOWN):
            student, start = _decoder(1)
            how |= {"shown": shown, "steps": config.steps}
            start = _fit(student, start, rows[:queries], notes[:queries], other, **how)
            losses[shown] = _nats(student, start, stored)
            logging.info("%d queries, %s: %.3f of %.3f", queries, shown, losses[shown], goal)
        way = losses["prompts"] - goal
        for shown, policies in SHOWN.items():
            line = {"policy": policies, "an answer shows": shown, "queries": queries}
            line |= {
                "nats a byte": losses[shown],
                "skill": (losses["prompts"] - losses[shown]) / way,
            }
            table.append(line)
        records.append({"queries": queries, "teacher": goal} | losses)
    text = (
        f"# Capability\n\nTeacher: {goal:.4f} nats a byte. A key of {config.key_nats:,.0f} nats "
        f"pays for {most} answers of {config.answer} bytes.\n\n{markdown_table(table)}\n"
    )
    print(write_report(workdir, text, records=records, tables={"capability": table}, pictures={}))


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(data="text:LICENSE", queries=(40,), teacher_steps=20, steps=10),
    "demo": {},
}

if __name__ == "__main__":
    cli.main(Config, PRESETS, run)

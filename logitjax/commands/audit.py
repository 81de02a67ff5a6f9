"""Measure what your model's API reveals about its output head.

    logitjax audit --model=DIR --policy=full --policy=round_2 --policy=top_5_bias --out=OUT
    logitjax audit --model=DIR --url=http://127.0.0.1:8000 --corner=640 --out=OUT

With `--model` alone each `--policy` is applied to the model in this process: `full`, `round_D` (D
decimals), `noise_S` (S nats), `floor_F`, `top_K`, `top_K_bias` (a logit bias changes the reported
values), `draws` (the drawn token's own log-probability), `sampling` (the same, and a bias changes
the drawn token) or `argmax` (only the token, which a bias changes).

With `--url` a server on this machine is queried instead: `logitjax serve`, or any other with
OpenAI's completion API that reports token ids (`return_tokens_as_token_ids`), as vLLM does.
`--top_logprobs`, `--sampled`, `--bias`, `--decimals` and `--noise` describe the expected behaviour
of the server; servers other than ours need `--sampled`. The audit tests this first, prints each
test with its evidence, and recovers a row twice by different queries. If the server behaves
differently, nothing is certified and the exit status is 3. Only loopback addresses are queried,
because you audit what you run.

OUT/report.md has a line for each policy: hidden width, share of the head that leaks, cost in
queries, cost to honest users, verdict. OUT/recovered/POLICY.npz holds the recovered arrays: `basis`
(the head's columns up to an invertible matrix), `tokens` (of its rows), `singular_values`, and
`log_probs` if a row was recovered. Finished policies are not queried again. See docs/leakage.md.
"""

import dataclasses
import functools
import sys
from typing import Any, Literal

import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from logitjax import data, decoding, leakage, models, processes, storage
from logitjax.commands.cli import field, nested
from logitjax.commands.tables import markdown_table

# Exit status if a server does not behave as declared.
_UNLIKE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The model or server, its policies, and the prompts."""

    model: str | None = field(None, "Model to audit. The recovered head is compared with its own.")
    url: str | None = field(
        None, "Address of your server, to query it instead of policies in this process."
    )
    policy: tuple[str, ...] = field(
        ("full", "round_2", "noise_0.3", "top_5", "top_5_bias", "sampling", "argmax"),
        "Policy of the API to audit.",
    )
    api_key: str | None = field(None, "API key of the server.", secret=True)
    server: leakage.LogitPolicy = nested(
        leakage.LogitPolicy(top_k=5, bias="reported"),
        without=["returns"],
        rename={"top_k": "top_logprobs"},
    )
    budget: int | None = field(
        None, "Maximum number of queries to the server. Needing more is an error."
    )
    vocab_size: int = field(
        0, "Vocabulary size of the server's model, if --model is not given.", minimum=0
    )
    data: str | None = field(None, "Text to cut prompts from. By default random tokens.")
    prompts: int = field(
        0, "Number of prompts. 0 takes the width of the model plus a fifth.", minimum=0
    )
    prompt_length: int = field(24, "Number of tokens in a prompt.", minimum=1)
    batch_size: int = field(16, "Number of prompts in a forward pass.", minimum=1)
    corner: int = field(
        0,
        "Number of rows and columns of the corner that is recovered through a bias. 0 for none.",
        minimum=0,
    )
    seed: int = field(0, "Seed of noise and of random prompts.")
    dtype: Literal["float32", "bfloat16"] = field("float32", "Compute type of the model.")

    def __post_init__(self) -> None:
        for name in self.policy:
            leakage.LogitPolicy.parse(name)
        if self.model is None and self.url is None:
            raise ValueError("model: expected a model, a url or both, got neither")
        if self.model is None and not (self.vocab_size and self.prompts):
            raise ValueError("vocab_size, prompts: expected numbers, as no model provides them")
        if self.model is None and self.data:
            raise ValueError("data: expected a model whose tokenizer reads it, got none")


@dataclasses.dataclass(frozen=True)
class Truth:
    """Quantities of a model that an API would not show."""

    head: np.ndarray
    logits: np.ndarray


def run(config: Config, out: epath.Path) -> None:
    """Query every policy and write the results; with several processes, only the first does."""
    processes.run_on_first("audit", lambda: _run(config, out))
    records = [storage.read_json(path) for path in (out / "policies").glob("*.json")]
    if any(record["unlike"] for record in records):
        sys.exit(_UNLIKE)


def _run(config: Config, out: epath.Path) -> None:
    prompts, vocab, truth = _prepare(config)
    names = config.policy
    if config.url:
        # If a bias affects which token is drawn, the token alone answers comparisons.
        names = ("server", "draws") if config.server.bias == "sampling" else ("server",)
    # What is in the folder was asked of this head, with these prompts.
    made_from = {
        "prompts": storage.digest(prompts, length=12),
        "model": None if truth is None else storage.digest(truth.head, sample=256, length=12),
    }
    storage.Manifest(out, "audit").claim(made_from)
    records = []
    for name in names:
        ask = functools.partial(_audit, config, name, prompts, vocab, truth, out)
        records.append(storage.kept(out / "policies" / f"{name}.json", ask))
        logging.info("%s: %s", name, records[-1]["verdict"])
    text = _report(config, prompts, vocab, truth, records)
    storage.write_atomic(out / "report.md", text)
    print(text)


def _prepare(config: Config) -> tuple[np.ndarray, int, Truth | None]:
    """Prompts, the number of tokens, and the true values of the model."""
    rng = np.random.default_rng(config.seed)
    shape = (config.prompts, config.prompt_length)
    if config.model is None:
        return rng.integers(0, config.vocab_size, shape, np.int32), config.vocab_size, None
    model, tokenizer = models.load(
        config.model, dtype=config.dtype, param_dtype=config.dtype, layout="listed"
    )
    old = model.head_of()
    if old.bias is not None:
        raise ValueError("model: expected a head without biases, which add a dimension")
    head = np.asarray(old.rows, np.float32)
    vocab, width = head.shape
    # More rows than the width; otherwise the rank of the answers would be the number of rows.
    count = config.prompts or width + max(20, width // 5)
    if config.data:
        examples = data.load_examples(config.data)
        prompts = data.token_windows(
            examples,
            tokenizer.encode,
            count=count,
            length=config.prompt_length,
            start=tokenizer.start,
        )
    else:
        prompts = rng.integers(0, vocab, (count, config.prompt_length), np.int32)
    logits = _logits(model, prompts, config.batch_size)
    return prompts, vocab, Truth(head, logits)


def _logits(model: models.Decoder, prompts: np.ndarray, batch_size: int) -> np.ndarray:
    """Log-probabilities of the next token after each prompt, `[n, vocab]`."""
    graphdef, state = nnx.split(model)
    last, starts = decoding.next_token_program(graphdef), range(0, len(prompts), batch_size)
    return np.concatenate([np.asarray(last(state, prompts[i : i + batch_size])) for i in starts])


def _oracle(config: Config, name: str, prompts: np.ndarray, truth: Truth | None) -> Any:
    if config.url:
        policy = config.server
        if name == "draws":
            policy = leakage.LogitPolicy(returns="token", bias="sampling")
        return leakage.HttpOracle(config.url, policy, api_key=config.api_key, budget=config.budget)
    # `Config` requires a model if there is no url.
    assert truth is not None
    logits = truth.logits
    # All prompts were run at once: each policy then answers from a table.
    places = {row.tobytes(): i for i, row in enumerate(prompts)}

    def apply(tokens: Any) -> np.ndarray:
        return logits[[places[row.tobytes()] for row in np.asarray(tokens, np.int32)]]

    return leakage.LogitOracle(
        apply, leakage.LogitPolicy.parse(name), seed=config.seed, batch_size=64, cache_size=64
    )


def _audit(
    config: Config, name: str, prompts: np.ndarray, vocab: int, truth: Truth | None, out: epath.Path
) -> dict[str, Any]:
    storage.progress.mark(f"asking {name}", log=True)
    oracle = _oracle(config, name, prompts, truth)
    result = leakage.audit(
        oracle,
        prompts,
        vocab,
        head=None if truth is None else truth.head,
        logits=None if truth is None else truth.logits,
        corner=min(config.corner, len(prompts)),
    )
    _write_recovered(result, out / "recovered" / f"{name}.npz")
    tests = [] if result.protocol is None else result.protocol.findings
    return {
        "policy": name,
        "width": None if result.width is None else str(result.width),
        "leak": result.leak,
        "queries": result.queries,
        "values": result.values,
        "KL": (result.utility or {}).get("kl"),
        "verdict": result.verdict,
        "unlike": result.unlike,
        "tests": [dataclasses.asdict(test) for test in tests],
    }


def _write_recovered(audit: leakage.Audit, path: epath.Path) -> None:
    arrays: dict[str, Any] = {}
    if audit.subspace is not None:
        basis = np.asarray(audit.subspace.basis)
        arrays["basis"] = basis
        arrays["tokens"] = np.arange(len(basis)) if audit.tokens is None else audit.tokens
        arrays["singular_values"] = audit.subspace.singular_values
    if audit.row is not None:
        arrays |= {"log_probs": audit.row.log_probs, "known": audit.row.known}
    storage.write_atomic(path, lambda file: np.savez(file, **arrays))


def _report(
    config: Config,
    prompts: np.ndarray,
    vocab: int,
    truth: Truth | None,
    records: list[dict[str, Any]],
) -> str:
    width = "" if truth is None else f", hidden width {truth.head.shape[1]}"
    source = config.data or "random tokens"
    tests = [{"asked": r["policy"]} | test for r in records for test in r["tests"]]
    evidence = f"\n## Tests\n\n{markdown_table(tests)}\n" if tests else ""
    records = [{k: v for k, v in r.items() if k not in ("tests", "unlike")} for r in records]
    return (
        f"# Leakage audit\n\n`{config.url or config.model}`: vocabulary {vocab:,}{width}; "
        f"{len(prompts)} prompts of {prompts.shape[1]} tokens from {source}.\n\n"
        f"{markdown_table(records)}\n\n`width` is `seen` if noise may hide weaker directions. "
        "`leak` is the share of the head's subspace that leaked, beyond chance; for a corner, at "
        "its tokens. `KL` is the loss of honest users per answer, in nats.\n"
        f"{evidence}"
    )

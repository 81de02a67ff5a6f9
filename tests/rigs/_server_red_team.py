"""The red team before a server of one row, in one process: what each policy lets it read."""

import asyncio
import functools
import json
import re
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from scipy import stats

from experiments.shared import records, suite
from logitjax import models
from logitjax.decoding import Ensemble
from logitjax.leakage import Ledger, LogitPolicy
from logitjax.serving import ServerConfig, build_app
from tests.rigs import _red_team as team
from tests.rigs._red_team import Asker, Body, Reply, attackers
from tests.rigs._server_client import COMPLETIONS
from tests.serving.inside import call

# A request is a token or two long: more slots would be decoded empty.
QUERIES, _SLOTS = 1000, 2
# Of the table; the read ones and the narrowest are of all attackers of a policy.
_COLUMNS = "policy|model|attacker|queries|nats per 1,000|bound per 1,000|read|right|narrowest"
MODELS = ("tiny", "smollm2", ".cache/models/gemma-3-270m.gguf")
_TOKEN = LogitPolicy(returns="token")
_TOP = LogitPolicy(top_k=5)
# Name, what is reported, what else the server is told.
POLICIES: tuple[tuple[str, LogitPolicy, Mapping[str, Any]], ...] = (
    ("free, no values", _TOKEN, {}),
    ("free, top 5", _TOP, {}),
    ("free, noise 0.3", LogitPolicy(returns="token", noise=0.3), {}),
    ("free, bias of draws", LogitPolicy(returns="token", bias="sampling"), {}),
    ("free, the same, drawn told", LogitPolicy(top_k=0, sampled=True, bias="sampling"), {}),
    ("free, bias reported", LogitPolicy(top_k=5, bias="reported"), {}),
    ("plain, no values", _TOKEN, {"choices": "plain"}),
    ("plain, top 5", _TOP, {"choices": "plain"}),
    ("plain, schemas", _TOKEN, {"choices": "plain", "schemas": True}),
    ("metered, 200 nats", _TOKEN, {"choices": "metered", "context_nats": 200.0}),
)


def row_of(spec: str) -> tuple[np.ndarray, Any]:
    """Next-token logits of a model after a few words, and its tokenizer."""
    model, tokenizer = models.load(spec, layout="listed")
    tokens = [*tokenizer.start, *tokenizer.encode("The capital of the country is")]
    hidden, _ = model.hidden_states(jnp.array([tokens]))
    return np.asarray(model.logits(hidden[:, -1:])[0, 0], np.float32), tokenizer


def letters_of(tokenizer: Any) -> dict[str, int]:
    """Characters of one token each that no token joins, so that a schema forces each by itself."""
    vocab, chosen = tokenizer.backend.get_vocab(with_added_tokens=True), '"'
    for letter in string.digits + string.ascii_letters:
        joined = {a + b for c in chosen + letter for a, b in ((c, letter), (letter, c))}
        if letter in vocab and not joined & vocab.keys():
            chosen += letter
    return {letter: vocab[letter] for letter in chosen[1:16]}


def one_row(row: np.ndarray) -> Ensemble:
    """A model whose every context has this row: what is measured is what lies around it."""

    def apply(params: Any, tokens: Any, positions: Any, cache: Any) -> Any:
        return jnp.broadcast_to(params, (*tokens.shape, len(row))), cache

    return Ensemble((apply, jax.device_put(row), {"none": np.zeros((_SLOTS, 1), np.int8)}))


class Server:
    """An application in this process, asked from code that does not wait."""

    def __init__(self, app: Any, runner: asyncio.Runner):
        self._app, self._runner = app, runner

    def __call__(self, bodies: list[Body]) -> list[Reply | None]:
        async def every() -> list[Reply | None]:
            return await asyncio.gather(*map(self._one, bodies))

        return self._runner.run(every())

    async def _one(self, body: Body) -> Reply | None:
        for _ in range(4):
            status, answer = await call(self._app, COMPLETIONS, body)
            if status == 200:
                break
            if status not in (400, 429):
                raise RuntimeError(f"the server answered {status}: {answer}")
            error = answer["error"]
            nearest = re.search(r"the nearest accepted value is (\S+)", error["message"])
            if nearest is None:
                return None
            value = type(body[error["param"]])(float(nearest[1]))
            body = body | {error["param"]: value}
        else:
            return None
        shown = answer["choices"][0]["logprobs"]
        ids = [int(name.removeprefix("token_id:")) for name in shown["tokens"]]
        top = (shown["top_logprobs"] or [{}])[0] or {}
        told = {int(name.removeprefix("token_id:")): value for name, value in top.items()}
        if shown["token_logprobs"][0] is not None:
            told[ids[0]] = shown["token_logprobs"][0]
        return Reply(tuple(ids), body, told)


def _charged(
    server: Server, ledger: Ledger, policy: LogitPolicy, vocab: int, bodies: list[Body]
) -> list[Reply | None]:
    """Answers, and what they may tell at most; values that nothing moves are told once."""
    replies = server(bodies)
    again = policy.sampled or policy.bias == "reported"
    for reply in replies:
        if reply is not None:
            spelled = team.spelled(reply.body)
            ledger.charge("row", "values" + spelled * again, policy.value_nats(vocab))
            ledger.charge("row", spelled, len(reply.tokens) * np.log(vocab))
    return replies


def attacked(
    spec: str,
    row: np.ndarray,
    tokenizer: Any,
    model: Ensemble,
    case: Any,
    queries: int,
    folder: epath.Path,
) -> list[dict[str, Any]]:
    """A row of the table for each attacker of one policy; those in the folder are not run again."""
    name, policy, options = case
    config = ServerConfig(
        model="row", policy=policy, slots=_SLOTS, max_length=16, max_tokens=8, max_waiting=4096,
        prefill_chunk=2, prefill_rows=2, policy_seed=1, **options,
    )  # fmt: skip
    letters, vocab, rows = letters_of(tokenizer), len(row), []
    with asyncio.Runner() as runner:
        app = build_app(model, tokenizer, [tokenizer.eos_id or 0], config)
        # One token is asked for, or two: further steps of a chunk would be thrown away.
        app.state.service.scheduler.steps = 1
        context = app.router.lifespan_context(app)
        runner.run(context.__aenter__())
        _, described = runner.run(call(app, "/openapi.json", method="GET"))
        schema = described["components"]["schemas"]["Completion"]
        for attacker, attack in attackers(schema).items():
            file = folder / f"{Path(spec).stem}, {name}, {attacker}.json"
            if file.exists():
                rows.append(json.loads(file.read_text()))
                continue
            # Before a meter the second attacker would pay for what the first was told.
            app.state.service.accounts.ledger = Ledger(config.nats)
            ledger = Ledger()
            ask = functools.partial(_charged, Server(app, runner), ledger, policy, vocab)
            asker = Asker(ask, queries)
            body = {"prompt": [1], "max_tokens": 1, "return_tokens_as_token_ids": True}
            readings = attack(asker, body | {"logprobs": 0}, vocab=vocab, letters=letters)
            line = {"model": Path(spec).stem, "policy": name, "attacker": attacker}
            line |= {"queries": queries - asker.left, "bound": float(ledger["row"])}
            line |= readings.judge(row.astype(float), policy.noise)
            for what in ("nats", "bound"):
                line[f"{what} per 1,000"] = 1000 * line[what] / max(1, line["queries"])
            rows.append(records.kept(file, lambda line=line: line))
            logging.info("%s", line)
        runner.run(context.__aexit__(None, None, None))
    return rows


def red_team(options: suite.Options, spec: str) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    """The fastest attacker of each policy on a row of one model, and the bars over all of them."""
    # Who has no Gemma (`make gemma`) is spared it.
    if spec.endswith(".gguf") and not Path(spec).exists():
        return [], []
    row, tokenizer = row_of("tiny" if options.smoke else spec)
    model, queries = one_row(row), 200 if options.smoke else QUERIES
    folder = epath.Path(options.directory) / f"red_team-{options.scale}"
    attacks = [attacked(spec, row, tokenizer, model, case, queries, folder) for case in POLICIES]
    every = [line for lines in attacks for line in lines]
    plain = [line for line in every if not line["policy"].startswith("free")]
    shared = {line["policy"] for line in plain}
    fastest = [_fastest(lines) for lines in attacks]
    over = sum(line["nats"] > line["bound"] for line in every)
    narrow = min(line["narrowest"] for line in plain)
    name = Path(spec).stem
    bars = [
        suite.at_most(f"red team, {name}: of {len(every)} attackers above the bound", over, 0),
        suite.at_least(f"plain, {name}: narrowest interval of p < 1e-3, nats", narrow, 0.2),
    ]
    # Policies of one model share their draws: the worst of them, not all together.
    for what, kind, held_column in (
        ("", "intervals", "hold"),
        (" of p < 1e-3", "rare", "rare hold"),
    ):
        some = [(line[held_column], line[kind]) for line in fastest if line["policy"] in shared]
        worst = min(some, key=lambda pair: stats.binom.cdf(*pair, team.CONFIDENCE))
        chance = float(stats.binom.cdf(*worst, team.CONFIDENCE))
        title = f"plain, {name}: {worst[0]} of {worst[1]} intervals{what} hold, chance at 95 %"
        bars.append(suite.at_least(title, chance, 0.01))
    return [{name: line[name] for name in _COLUMNS.split("|")} for line in fastest], bars


def _fastest(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of the attacker that reads most a query; intervals are those of all attackers."""
    # Values are told in one answer, and are no rate.
    best = max(lines, key=lambda line: line["nats per 1,000"] * (line["queries"] >= 10))
    best |= {name: sum(line[name] for line in lines) for name in team.COUNTED}
    return best | {"narrowest": min(line["narrowest"] for line in lines)}

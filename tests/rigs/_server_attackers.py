"""The attackers of `logitjax.leakage` before a server, a policy at a time: what closes what.

Each believes that the server tells what it needs: a drawn token's own value (`drawn`, at
temperature 2; `forced`, by a bias of 100), values that move with a bias (`lifted`), or only which
token is drawn under a bias (`searched`). What comes back counts where it is right to 0.05 nats.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import suite
from experiments.shared.peers import serving
from logitjax import leakage
from logitjax.leakage import HttpOracle, LogitPolicy
from tests.rigs._server_client import small_decoder

VOCAB, TOP, _RIGHT = 1000, 5, 0.05
_PROMPT = (72, 101, 108, 108, 111)
# Name, flags, most values of a position that the policy means to tell, whether it takes a bias.
_POLICIES = (
    ("no bias", (), TOP, False),
    ("no bias, drawn told", ("--sampled",), VOCAB, False),
    ("bias of draws", ("--bias=sampling",), TOP, True),
    ("bias of draws, drawn told", ("--bias=sampling", "--sampled"), VOCAB, True),
    ("bias of draws, no values", ("--bias=sampling", "--returns=token"), 0, True),
    ("bias of draws, noise 0.3", ("--bias=sampling", "--noise=0.3"), TOP, True),
    ("bias reported", ("--bias=reported",), VOCAB, True),
)


def attackers(
    options: suite.Options, directory: pathlib.Path
) -> tuple[list[dict[str, Any]], list[suite.Bar]]:
    model = small_decoder(VOCAB)
    hidden, _ = model.hidden_states(jnp.array([_PROMPT]))
    truth = np.asarray(jax.nn.log_softmax(model.logits(hidden)[0, -1]), np.float64)
    rows, more, searched = [], 0, 0
    for name, flags, told, biased in _POLICIES[2:4] if options.smoke else _POLICIES:
        arguments = (f"--model={directory}", "--max_length=64", "--slots=16", "--max_waiting=64")
        with serving(*arguments, *flags) as (address, _):
            found = {
                attack: ask(address, truth, options.smoke, "--returns=token" not in flags)
                for attack, ask in _ATTACKS.items()
            }
        rows.append({"policy": name} | found)
        values = [row["right"] for attack, row in found.items() if attack != "searched"]
        more = max(more, max(values) - told)
        searched += bool(found["searched"]["right"]) and not biased
    shown = [
        {
            attack: cell if attack == "policy" else f"{cell['right']} of {cell['of']}"
            for attack, cell in row.items()
        }
        | {"queries": sum(cell["queries"] for cell in list(row.values())[1:])}
        for row in rows
    ]
    return shown, [
        suite.at_most("attackers: values beyond those that a policy tells", more, 0),
        suite.at_most("attackers: searches that end without a bias", searched, 0),
    ]


def _attack(
    address: str, policy: LogitPolicy, ask: Callable[[HttpOracle], np.ndarray], truth: np.ndarray
) -> dict[str, int]:
    """How many values one attack brings, and at what price; a server that refuses tells none."""
    oracle = HttpOracle(address, policy, workers=32)
    try:
        found = ask(oracle)
    except RuntimeError:
        found = np.full(len(truth), np.nan)
    oracle.close()
    right = int((np.abs(found - truth) < _RIGHT).sum())
    return {"right": right, "of": len(truth), "queries": oracle.queries}


def _drawn(address: str, truth: np.ndarray, smoke: bool, values: bool) -> dict[str, int]:
    policy = LogitPolicy(top_k=TOP if values else 0, sampled=True)
    queries = 100 if smoke else 3000
    return _attack(
        address,
        policy,
        lambda oracle: leakage.harvest_log_probs(oracle, _PROMPT, VOCAB, queries=queries).log_probs,
        truth,
    )


def _forced(address: str, truth: np.ndarray, smoke: bool, values: bool) -> dict[str, int]:
    policy = LogitPolicy(top_k=TOP if values else 0, sampled=True, bias="sampling")
    return _by_bias(address, policy, truth, np.arange(0, VOCAB, 20 if smoke else 1))


def _lifted(address: str, truth: np.ndarray, smoke: bool, values: bool) -> dict[str, int]:
    wanted = np.arange(0, VOCAB, 20 if smoke else 1)
    if not values:
        return {"right": 0, "of": len(wanted), "queries": 0}
    policy = LogitPolicy(top_k=TOP, bias="reported", decimals=7)
    return _by_bias(address, policy, truth, wanted)


def _by_bias(
    address: str, policy: LogitPolicy, truth: np.ndarray, wanted: np.ndarray
) -> dict[str, int]:
    """One token after another is lifted by a bias until its log-probability is told."""

    def recovered(oracle: HttpOracle) -> np.ndarray:
        found = leakage.recover_log_probs(oracle, _PROMPT, VOCAB, tokens=wanted)
        return found.log_probs[wanted]

    return _attack(address, policy, recovered, truth[wanted])


def _searched(address: str, truth: np.ndarray, smoke: bool, values: bool) -> dict[str, int]:
    policy = LogitPolicy(returns="token", bias="sampling")
    wanted = np.arange(0, VOCAB, 125 if smoke else 20)
    return _attack(
        address,
        policy,
        lambda oracle: (
            leakage.search_logits(oracle, _PROMPT, wanted, span=40.0, tolerance=_RIGHT).middle
        ),
        truth[wanted] - truth.max(),
    )


_ATTACKS = {"drawn": _drawn, "forced": _forced, "lifted": _lifted, "searched": _searched}

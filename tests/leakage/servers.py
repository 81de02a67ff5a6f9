"""Toy servers that are not what they are said to be, one a kind, for audits to find out."""

import numpy as np
from jax import numpy as jnp

from logitjax.leakage import LogitPolicy
from logitjax.leakage._oracle import Meter
from tests.leakage._models import log_softmax

_TOP5 = LogitPolicy(top_k=5, bias="reported")
_TOP1 = LogitPolicy(top_k=1, bias="reported")
_OWN = LogitPolicy(top_k=0, sampled=True, bias="sampling")
_DRAWS = LogitPolicy(top_k=0, sampled=True)
_TOKEN = LogitPolicy(returns="token", bias="sampling")

#: What a server is said to be. The first six are what they say.
KINDS = {
    "honest": _TOP5,
    "honest, one value": _TOP1,
    "honest, forced": _OWN,
    "honest, drawn": _DRAWS,
    "honest, token": _TOKEN,
    "two decimals, said": LogitPolicy(top_k=5, bias="reported", decimals=2),
    "two decimals": _TOP5,
    "two decimals, one value": _TOP1,
    "one decimal, forced": _OWN,
    "fresh noise": _TOP5,
    "fresh noise, forced": _OWN,
    "faint noise": _TOP5,
    "noise of the request": _TOP5,
    "noise on values": _TOP1,
    "noise, drawn": _DRAWS,
    "noise, token": _TOKEN,
    "bias of draws": _TOP5,
    "bias of draws, listed": LogitPolicy(top_k=5, sampled=True, bias="reported"),
    "bias reported": _OWN,
    "bias clipped": _TOP5,
    "half a bias": _TOP1,
    "two tokens biased": _TOP5,
    "some tokens exempt": _TOP5,
    "values at the temperature": _DRAWS,
    "floor": _TOP5,
    "two models": _TOP5,
    "rarely another model": _TOP5,
    "weights changed": _TOP5,
    "bfloat16 values": _TOP5,
    "bfloat16 logits": _TOP5,
    "probabilities of four decimals": _TOP5,
    "cut at 90 %": _TOP5,
    "fewer values": _TOP5,
    "noise that grows": _TOP5,
}
VOCAB = 60


class Server(Meter):
    """Answers as `kind` does, whatever its policy says; a prompt is the number of a row."""

    def __init__(self, kind: str, seed: int):
        super().__init__(None)
        self.kind, self.policy = kind, KINDS[kind]
        self.rng = np.random.default_rng(seed)
        self.rows = 3.0 * self.rng.standard_normal((2, 16, VOCAB))
        self.exempt = self.rng.random(VOCAB) < 0.2
        self.changes = int(self.rng.integers(5, 90))
        self.seed = seed

    @property
    def truth(self) -> np.ndarray:
        return log_softmax(self.rows[0, 0])

    def ask(self, prompts, *, temperature=0.0):
        none = np.zeros(0, int)
        return self._answers([(prompt, none, none) for prompt in prompts], temperature)

    def ask_biased(self, prompt, tokens, values):
        if self.policy.bias == "none":
            raise ValueError("bias_tokens: expected none")
        return self._answers(
            [(prompt, *both) for both in zip(np.asarray(tokens), np.asarray(values), strict=True)],
            0.0,
        )

    def _answers(self, queries, temperature):
        self.charge(len(queries))
        answers = [self._one(*query, temperature) for query in queries]
        if len({len(tokens) for tokens, _ in answers}) > 1:
            raise ValueError("url: expected 5 values in each answer, got fewer")
        values = np.array([values for _, values in answers], np.float32)
        tokens = np.array([tokens for tokens, _ in answers], np.int32)
        return self.counted([(values, tokens)])

    def _one(self, prompt, tokens, amounts, temperature):
        kind, policy, rng = self.kind, self.policy, self.rng
        self.asked = getattr(self, "asked", 0) + 1
        other = (
            (kind == "two models" and rng.random() < 0.5)
            or (kind == "rarely another model" and rng.random() < 0.05)
            or (kind == "weights changed" and self.asked > self.changes)
        )
        z = self.rows[int(other), int(np.asarray(prompt).ravel()[0]) % 16].copy()
        size = {"faint noise": 3e-4, "noise that grows": 1e-4 * self.asked}.get(kind)
        if kind.startswith(("fresh noise", "noise, ")):
            size = 0.1
        if kind == "noise of the request":
            rng = np.random.default_rng([self.seed, *tokens, *(1e4 * np.abs(amounts)).astype(int)])
            size = 0.1
        z += (size or 0.0) * rng.standard_normal(VOCAB)
        if kind == "bfloat16 logits":
            z = np.asarray(jnp.asarray(z, jnp.bfloat16), np.float64)
        moved = self._biased(z, tokens, amounts)
        hot = moved + temperature * self.rng.gumbel(size=VOCAB) if temperature else moved
        drawn = int(np.argmax(hot))
        if policy.returns == "token":
            return [drawn], []
        still = (policy.bias == "sampling" and kind != "bias reported") or "of draws" in kind
        y = self._reported(z if still else moved, temperature)
        tops = np.argsort(-y)[: policy.top_k]
        if kind == "fewer values" and self.asked % 50 == 0:
            tops = tops[:-1]
        listed = ([drawn] if policy.sampled else []) + tops.tolist()
        return listed, y[listed]

    def _biased(self, z, tokens, amounts):
        kind, moved = self.kind, z.copy()
        for index, (token, amount) in enumerate(zip(tokens, amounts, strict=True)):
            if kind == "bias clipped":
                amount = np.clip(amount, -10, 10)
            elif kind == "half a bias":
                amount = amount / 2
            elif (kind == "two tokens biased" and index > 1) or (
                kind == "some tokens exempt" and self.exempt[token]
            ):
                amount = 0.0
            moved[token] += amount
        return moved

    def _reported(self, z, temperature):
        kind = self.kind
        if kind == "values at the temperature" and temperature:
            z = z / temperature
        if kind == "cut at 90 %":
            p = np.sort(np.exp(log_softmax(z)))[::-1]
            least = p[np.searchsorted(np.cumsum(p), 0.9)]
            z = np.where(np.exp(log_softmax(z)) >= least, z, -30.0)
        y = log_softmax(z)
        if kind.startswith("two decimals"):
            y = y.round(2)
        elif kind.startswith("one decimal"):
            y = y.round(1)
        elif kind == "floor":
            y = np.maximum(y, -8.0)
        elif kind == "noise on values":
            y = y + 0.1 * self.rng.standard_normal(VOCAB)
        elif kind == "bfloat16 values":
            y = np.asarray(jnp.asarray(y, jnp.bfloat16), np.float64)
        elif kind.startswith("probabilities"):
            y = np.log(np.maximum(np.exp(y).round(4), 1e-30))
        return y


def is_false(server: Server, audit) -> bool:
    """Whether an audit certifies a row that is not the server's."""
    if audit.unlike or audit.row is None or not audit.row.known.any():
        return False
    truth, recovered = server.truth, audit.row.known
    if audit.row.method == "searched":
        truth = truth - truth.max()
        if recovered.all():
            truth = log_softmax(truth)
    return bool(np.abs(audit.row.log_probs - truth)[recovered].max() > audit.row.error_bound)

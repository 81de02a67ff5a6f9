"""How draws by seeds tell what a server mixes into its noise, and by which law it draws."""

import numpy as np
import pytest

from logitjax.leakage import LogitPolicy
from logitjax.leakage._protocol import Protocol, _choices
from tests.leakage._models import log_softmax

ROWS = 3 * np.random.default_rng(0).standard_normal((3, 60))
ROWS[2] = ROWS[0]


class Seeded:
    """Draws from rows by seeds; `mixed` names the fields that make other noise."""

    def __init__(self, *, mixed=(), inverse=False, before=False, company=False, prompts=False):
        self.__dict__ |= locals()
        self.policy, self.calls = LogitPolicy(top_k=60), 0

    def draws(self, prompt, fields):
        return np.array([self._one(list(prompt), one, len(fields) > 1) for one in fields])

    def _one(self, prompt, fields, crowd):
        if "presence_penalty" in fields:
            raise ValueError("url: the server answered 400")
        z = ROWS[prompt[0] % 3].copy()
        if fields.get("repetition_penalty"):
            z[prompt[0]] = min(z[prompt[0]] / 10, z[prompt[0]] * 10)
        heat, least = fields["temperature"], fields.get("min_p", 0.0)
        if not heat:
            return int(z.argmax())
        u = z if self.before else z / heat
        u = np.where(u >= u.max() + np.log(least or 1e-300), z / heat, -np.inf)
        key = [fields["seed"], *(int(1e9 * fields.get(name, 0)) for name in self.mixed)]
        key += [crowd] if self.company else []
        key += [prompt[0]] if self.prompts else []
        rng = np.random.default_rng(key)
        if self.inverse:
            return int(np.searchsorted(np.exp(log_softmax(u)).cumsum(), rng.random()))
        return int((u + rng.gumbel(size=60)).argmax())


def findings(**options):
    protocol, server = Protocol(policy=LogitPolicy(top_k=60)), Seeded(**options)
    protocol.first = dict(enumerate(log_softmax(ROWS[0])))
    _choices(protocol, server, [[0], [1]])
    assert not protocol.unlike
    return {one.test: one for one in protocol.findings}


def test_one_noise_for_all_requests_is_told_and_a_mixed_key_too():
    shared, mixed = findings(), findings(mixed=("min_p",), prompts=True, company=True)
    for effects in (shared, mixed):
        assert (effects["seed"].effect, effects["seed"].p < 0.01) == (1, True)
    assert (shared["key"].effect, shared["company"].effect) == (1, 0)
    assert mixed["key"].effect < 0.6
    assert mixed["company"].effect > 0
    assert shared["prompts"].p < 0.05 < mixed["prompts"].p


@pytest.mark.parametrize("inverse", [False, True])
def test_the_law_of_a_draw_is_told_by_where_it_moves(inverse):
    effects = findings(inverse=inverse)
    assert (effects["law"].p < 1e-3) == inverse


def test_the_order_of_rules_and_what_penalties_see_are_told():
    assert findings()["min_p"].effect > 0 == findings(before=True)["min_p"].effect
    seen = findings()["penalties"].seen
    assert seen.startswith("the likeliest token, ")

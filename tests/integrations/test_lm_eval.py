"""The model of lm-evaluation-harness made of a function, such as one inside a trainer.

It needs `pip install 'logitjax[lm_eval]'`. `python -m tests.rigs judges` compares whole tasks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.slow

from lm_eval.api.instance import Instance  # noqa: E402

from logitjax import models  # noqa: E402
from logitjax.integrations.lm_eval import LogitjaxLM  # noqa: E402


class Mean(linen.Module):
    """Logits are the mean of the rows read so far."""

    vocab: int

    @linen.compact
    def __call__(self, tokens):
        read = jnp.cumsum(linen.Embed(self.vocab, 8)(tokens), 1)
        return 5 * linen.Dense(self.vocab)(read / jnp.arange(1, tokens.shape[1] + 1)[:, None])


def asked(kind, *requests):
    return [Instance(kind, {}, arguments, 0) for arguments in requests]


def test_a_linen_module_answers_the_harness():
    _, tokenizer = models.load("tiny")
    model = Mean(tokenizer.vocab_size)
    params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32))
    end = tokenizer.eos_id or 0
    lm = LogitjaxLM(
        ((model.apply, params), tokenizer, (end,)), max_length=64, batch_size=2, add_bos=False
    )
    requests = [("the cat", " sat"), ("a", " b c"), ("one two three", " four")]
    for (context, continuation), (total, _) in zip(
        requests, lm.loglikelihood(asked("loglikelihood", *requests)), strict=True
    ):
        ids = np.array([tokenizer.encode(context + continuation)])
        log_p = jax.nn.log_softmax(model.apply(params, ids)[0, :-1])
        each = np.take_along_axis(np.asarray(log_p), ids[0, 1:, None], 1)[:, 0]
        count = len(tokenizer.encode(context))
        np.testing.assert_allclose(total, each[count - 1 :].sum(), rtol=1e-4)
    settings = {"until": ["\n"], "max_gen_toks": 3}
    (answer,) = lm.generate_until(asked("generate_until", ("the cat", settings)))
    text = tokenizer.encode("the cat")
    for _ in range(3):
        text.append(int(model.apply(params, np.array([text]))[0, -1].argmax()))
    assert tokenizer.decode(text).startswith("the cat" + answer)

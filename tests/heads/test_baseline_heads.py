import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from logitjax.heads import LinearHead, TiedHead
from logitjax.models import Decoder, DecoderConfig
from logitjax.vq import ProductCodes, ProductHead, VQHead
from tests._compiled import compiled
from tests._modules import with_weights


def log_normalizer(logits):
    return np.log(np.exp(np.asarray(logits, np.float64)).sum(-1))


def ranked(values, k):
    """Values and places of the `k` largest, the first of equal ones."""
    places = np.argsort(-np.asarray(values), axis=-1, kind="stable")[:, :k]
    return np.take_along_axis(np.asarray(values), places, -1), places


VOCAB, WIDTH, COUNT = 60, 8, 30


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    unigram = rng.permutation(1.0 / np.arange(1, VOCAB + 1)).astype(np.float32)
    hidden = rng.normal(size=(COUNT, WIDTH)).astype(np.float32)
    labels = rng.integers(0, VOCAB, COUNT).astype(np.int32)
    rows = rng.normal(size=(VOCAB, WIDTH)).astype(np.float32)
    return dict(unigram=unigram, hidden=hidden, labels=labels, rows=rows)


def test_costs_of_the_same_head_agree():
    full = nnx.eval_shape(lambda: LinearHead(WIDTH, VOCAB, use_bias=True, rngs=nnx.Rngs(0))).cost()
    assert full.parameters == VOCAB * (WIDTH + 1)
    tied = TiedHead().cost(np.zeros((VOCAB, WIDTH), np.float32))
    assert (tied.parameters, tied.read_bytes) == (0, VOCAB * WIDTH * 4)


# As modules.

DECODER = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=WIDTH,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
)


def decoder(head):
    model = with_weights(lambda: Decoder(DECODER, rngs=nnx.Rngs(0), layout="listed"))
    model.head = head
    return model


def _modules(case, name):
    unigram, rows = case["unigram"], case["rows"]

    def made(head, *arguments, **options):
        return nnx.jit(lambda: head(*arguments, unigram=unigram, rngs=nnx.Rngs(3), **options))()

    def product():
        fit = compiled(ProductCodes.fit)
        cov = np.eye(WIDTH, dtype=np.float32)
        return fit(rows, unigram, cov, groups=4, iterations=3)

    return {
        "full": lambda: made(LinearHead, WIDTH, VOCAB, use_bias=True),
        "tied": lambda: TiedHead(bias=np.log(unigram)),
        "product": lambda: ProductHead.from_fit(product()),
        "VQ": lambda: made(VQHead, WIDTH, VOCAB, 20),
    }[name]()


HEADS = ("full", "tied", "VQ")


@pytest.mark.parametrize("name", HEADS)
def test_heads_share_an_interface_inside_a_decoder(case, name):
    head = _modules(case, name)
    model = decoder(head)
    embedding = model.embedding[...]

    @jax.jit
    def look(hidden, labels):
        logits = model.logits(hidden)
        nll = head.nll(hidden, labels, embedding)
        token = head.sample(jax.random.key(0), hidden, embedding, temperature=0.5)
        return logits, nll, head.top_k(hidden, 4, embedding), token

    logits, nll, top, token = jax.device_get(look(case["hidden"], case["labels"]))
    assert logits.shape == (COUNT, VOCAB)
    assert logits.dtype == jnp.float32
    want = log_normalizer(logits) - np.take_along_axis(logits, case["labels"][:, None], 1)[:, 0]
    np.testing.assert_allclose(nll, want, rtol=1e-4, atol=1e-5)
    values, tokens = ranked(logits, 4)
    np.testing.assert_allclose(top.values, values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(top.indices, tokens)
    np.testing.assert_allclose(top.log_z, log_normalizer(logits), rtol=1e-4, atol=1e-5)
    assert token.shape == (COUNT,)
    assert ((token >= 0) & (token < VOCAB)).all()
    cost = head.cost(embedding)
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(head, nnx.Param)))
    assert cost.parameters == trained
    again = jax.jit(lambda hidden: model.head_of().logits(hidden))(case["hidden"])
    np.testing.assert_allclose(logits, again, rtol=1e-4, atol=1e-4)


@pytest.mark.every_change
@pytest.mark.slow
@pytest.mark.parametrize("name", ["VQ", "product"])
def test_a_decoder_decodes_and_trains_through_the_head_alone(case, name):
    model = decoder(_modules(case, name))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, tokens, cache):
        model = nnx.merge(graphdef, params, rest)
        hidden, cache = model.hidden_states(tokens, cache=cache)
        best = model.head.top_k(hidden[:, -1], 1, model.embedding[...]).indices
        return best, cache, model.logits(hidden[:, -1]).argmax(-1)

    tokens, cache = np.array([[1], [4]], np.int32), model.init_cache(2, 8)
    for _ in range(3):
        tokens, cache, want = step(params, tokens, cache)
        np.testing.assert_array_equal(np.asarray(tokens)[:, 0], want)

    def loss(params, tokens):
        model = nnx.merge(graphdef, params, rest)
        hidden, _ = model.hidden_states(tokens)
        return model.head.nll(hidden[:, :-1], tokens[:, 1:]).mean()

    @jax.jit
    def descend(params, text):
        value, grads = jax.value_and_grad(loss)(params, text)
        nudged = jax.tree.map(lambda p, g: p - 0.05 * g, params, grads)
        return value, loss(nudged, text)

    before, after = descend(params, case["labels"].reshape(3, 10))
    assert after < before


def test_modules_name_the_wrong_argument():
    rngs = nnx.Rngs(0)  # nothing is drawn
    with pytest.raises(ValueError, match="groups: expected a divisor of hidden_size=8"):
        ProductHead(8, 20, groups=3, rngs=rngs)
    with pytest.raises(ValueError, match="unigram: expected shape"):
        LinearHead(8, 20, use_bias=True, unigram=np.ones(19), rngs=rngs)
    with pytest.raises(ValueError, match="embedding: expected the rows of a TiedHead"):
        TiedHead()(np.ones((1, 8), np.float32))

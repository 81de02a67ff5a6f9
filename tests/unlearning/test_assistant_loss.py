"""The assistant learns what to forget and nothing else; the target under it stays as it is."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from logitjax import fusion, losses, ops, training, unlearning
from logitjax.models import Decoder, DecoderConfig
from logitjax.unlearning import Assistant
from logitjax.unlearning.methods._difference import Difference
from tests._compiled import compiled
from tests._modules import with_weights
from tests.unlearning.test_losses import undial, uniform_kl

CONFIG = DecoderConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=32,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=64,
)
FORGET = {
    "tokens": np.array([[1, 2, 3, 4, 5, 0], [1, 6, 7, 8, 0, 0]], np.int32),
    "mask": np.array([[0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 0, 0]], bool),
}
RETAIN = {
    "tokens": np.array([[1, 9, 10, 11, 12, 13], [1, 14, 15, 16, 0, 0]], np.int32),
    "mask": np.array([[0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0]], bool),
}
BATCH = {"forget": FORGET, "retain": RETAIN}


@functools.cache
def target(**options):
    """With larger weights than at initialisation, so that it has opinions."""
    config = dataclasses.replace(CONFIG, **options)
    return with_weights(lambda: Decoder(config, rngs=nnx.Rngs(0), layout="listed"), size=0.4)


def method(**options):
    """An assistant of two layers whose logits are all its own."""
    return Difference(**{"layers": 2, "relative": False} | options)


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@functools.cache
def trained():
    """An assistant after 80 steps, and what the target's buffers were before."""
    before = pointers(nnx.state(target()))
    assistant = Assistant.init(target(), 2, rank=4, key=jax.random.key(0))
    loss_fn, constants = method(retain_weight=2.0).make_loss(target())
    assert set(pointers(constants)) < set(before)
    tx = optax.adam(0.02)
    mesh = training.make_mesh("data:1", devices=jax.devices()[:1])
    state = training.TrainState.create(assistant.lora, tx, mesh=mesh)
    step = training.TrainStep(loss_fn, tx, mesh=mesh)
    for _ in range(80):
        state, output = step(state, BATCH, constants)
    assert step.traces == 1
    metrics = jax.device_get(output.metrics)
    return unlearning.Assistant(base=assistant.base, lora=state.params), before, metrics


def test_training_neither_copies_nor_donates_a_buffer_of_the_target():
    assistant, before, _ = trained()
    leaves = jax.tree.leaves(nnx.state(target()))
    assert not any(leaf.is_deleted() for leaf in leaves)
    assert pointers(leaves) == before
    assert set(pointers(nnx.state(assistant.base))) < set(before)


@pytest.mark.slow
@pytest.mark.every_change
def test_it_knows_what_to_forget_and_is_silent_on_what_to_keep():
    assistant, _, metrics = trained()
    assert metrics["forget"][0] < 0.5
    assert metrics["retain"][0] < 0.5
    # The difference takes from the target what the assistant knows, and nothing elsewhere.
    fuse = fusion.LogitDifference(alpha=1.0, filter="none")
    moved = {}
    for name, rows in BATCH.items():
        tokens = jnp.asarray(rows["tokens"])
        hidden, assistant_hidden = (
            target().hidden_states(tokens)[0],
            assistant.hidden_states(tokens)[0],
        )
        large = target().logits(hidden)
        fused, _ = fuse(large, assistant.logits(assistant_hidden)[None], None)
        labels, where = tokens[:, 1:], rows["mask"][:, 1:]
        gap = losses.cross_entropy(fused[:, :-1], labels) - losses.cross_entropy(
            large[:, :-1], labels
        )
        moved[name] = float(np.abs(gap)[where].mean())
    assert moved["forget"] > 2.0
    assert moved["retain"] < 0.25 * moved["forget"]


@pytest.mark.parametrize(("relative", "beta"), [(False, 5.0), (True, 5.0), (True, 0.0)])
def test_loss_is_that_of_logits(relative, beta):
    assistant = dataclasses.replace(trained()[0], relative=relative)
    weights = {"retain_weight": beta, "surplus_weight": 2.0}
    loss_fn, constants = method(relative=relative, **weights).make_loss(target())
    loss, count, parts = jax.jit(loss_fn)(assistant.lora, BATCH, None, constants)
    run = jax.jit(lambda tokens: assistant.logits(assistant.hidden_states(tokens)[0]))
    logits = {name: np.asarray(run(rows["tokens"])) for name, rows in BATCH.items()}
    nll = compiled(losses.cross_entropy)(logits["forget"][:, :-1], FORGET["tokens"][:, 1:])
    forget = np.asarray(nll)[FORGET["mask"][:, 1:]].mean()
    silent = np.asarray(compiled(uniform_kl)(logits["retain"]))
    retain = silent[:, :-1][RETAIN["mask"][:, 1:]].mean()
    assert float(count) == 1
    np.testing.assert_allclose(parts["forget"][0], forget, rtol=1e-4)
    np.testing.assert_allclose(parts["retain"][0], retain, rtol=1e-4)
    labels = RETAIN["tokens"][:, 1:, None]
    silence = jax.nn.log_softmax(np.float64(logits["retain"])) + np.log(logits["retain"].shape[-1])
    more = np.maximum(np.take_along_axis(np.asarray(silence)[:, :-1], labels, -1)[..., 0], 0)
    surplus = more[RETAIN["mask"][:, 1:]].mean() if relative else 0.0
    np.testing.assert_allclose(loss, forget + beta * retain + 2.0 * surplus, rtol=1e-4)


@pytest.mark.every_change
@pytest.mark.slow
def test_a_soft_capped_model_is_unlearned_by_its_capped_logits():
    model = target(logits_softcap=2.0, num_layers=2)
    assistant = Assistant.init(model, 1, rank=4, key=jax.random.key(0))
    # Not as they begin, where half of the adapters has no gradient.
    rng = np.random.default_rng(1)
    lora = jax.tree.map(
        lambda x: np.asarray(x) + np.float32(0.05 * rng.normal(size=x.shape)), assistant.lora
    )
    loss_fn, constants = method(layers=1, retain_weight=5.0).make_loss(model)

    def blocked(lora):
        return loss_fn(lora, BATCH, None, constants)[0]

    def dense(lora):
        def logits_of(rows):
            hidden, _ = assistant.base.hidden_states(jnp.asarray(rows["tokens"]), lora=lora)
            return assistant.base.logits(hidden)[:, :-1]

        nll = losses.cross_entropy(logits_of(FORGET), FORGET["tokens"][:, 1:])
        silent = ops.masked_mean(uniform_kl(logits_of(RETAIN)), RETAIN["mask"][:, 1:])
        return ops.masked_mean(nll, FORGET["mask"][:, 1:]) + 5.0 * silent

    got, want = (jax.jit(jax.value_and_grad(f))(lora) for f in (blocked, dense))
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-5)

    graphdef, params = nnx.split(model)
    tokens, labels = jnp.asarray(FORGET["tokens"]), jnp.asarray(FORGET["tokens"][:, 1:])

    def of_undial(params, linear):
        student, before = nnx.merge(graphdef, params), model
        here, hidden_before = (m.hidden_states(tokens)[0][:, :-1] for m in (student, before))
        if linear:
            heads = student.head_of(), before.head_of()
            method = unlearning.METHODS.parse("undial")
            return method.values(here, heads[0], 0.5 * hidden_before, heads[1], labels).sum()
        return undial(student.logits(here), before.logits(0.5 * hidden_before), labels).sum()

    run = jax.jit(jax.value_and_grad(of_undial), static_argnums=1)
    chex.assert_trees_all_close(run(params, True), run(params, False), rtol=1e-3, atol=1e-4)
    # The cap is felt: without it the loss is another.
    capped = jax.jit(lambda tokens: model.logits(model.hidden_states(tokens)[0]))(tokens)
    assert np.abs(capped).max() > 1.5


@pytest.mark.slow
def test_positions_that_do_not_count_need_not_meet_the_head():
    lora, count, gradients = trained()[0].lora, 11, []
    for most in (None, count, count + 3):
        loss_fn, constants = of_counts(most)
        gradients.append(jax.grad(lambda x, f=loss_fn, c=constants: f(x, BATCH, None, c)[0])(lora))
    for other in gradients[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients[0], other
        )
    loss_fn, constants = of_counts(count - 1)
    assert np.isnan(loss_fn(lora, BATCH, None, constants)[0])


def of_counts(most):
    """A loss whose steps have no more answers' tokens than that."""
    return method().make_loss(target(), counts=most and [{"forget": 0, "retain": most}])

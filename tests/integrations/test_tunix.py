"""tunix's own trainers with our losses, against their losses on logits.

It needs `pip install google-tunix==0.1.7 tensorboardX`, which CI installs weekly.
"""

import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tunix")
pytestmark = pytest.mark.slow

from flax import nnx  # noqa: E402
from tunix.distillation import distillation_trainer as trainers  # noqa: E402
from tunix.distillation.strategies import logit  # noqa: E402
from tunix.models.gemma import model as gemma  # noqa: E402
from tunix.models.gemma3 import model as gemma3  # noqa: E402
from tunix.models.llama3 import model as llama3  # noqa: E402
from tunix.models.qwen3 import model as qwen3  # noqa: E402
from tunix.rl import algo_core, common  # noqa: E402
from tunix.rl.grpo.grpo_learner import GRPOConfig  # noqa: E402
from tunix.sft import utils  # noqa: E402

from logitjax import losses  # noqa: E402
from logitjax.distillation import Objective, Teacher, terms  # noqa: E402
from logitjax.integrations import tunix  # noqa: E402
from logitjax.losses.sweep import _blocks  # noqa: E402
from tests.integrations._teachers import lacking  # noqa: E402

VOCAB, BATCH, LENGTH, STEPS = 1531, 4, 13, 10
LACKING = lacking(VOCAB)


def _gemma3(seed):
    config = gemma3.ModelConfig(
        num_layers=2,
        num_embed=VOCAB,
        embed_dim=32,
        hidden_dim=64,
        num_heads=2,
        head_dim=16,
        num_kv_heads=1,
        sliding_window_size=8,
        param_dtype=jnp.float32,
    )
    model = gemma3.Gemma3(config, rngs=nnx.Rngs(seed))
    # From nearly equal logits there is nothing to learn.
    embedding = model.embedder.input_embedding
    embedding[...] = 20.0 * embedding[...]
    return model


def _batches(padded=False):
    rng = np.random.default_rng(0)
    all_tokens = rng.integers(1, VOCAB, (STEPS, BATCH, LENGTH)).astype(np.int32)
    for tokens in all_tokens[:1].repeat(STEPS, 0) if padded else all_tokens:
        mask = np.ones((BATCH, LENGTH), bool)
        if padded:
            mask[:, -4:] = np.arange(BATCH)[:, None] > np.arange(4)
        yield trainers.TrainingInput(input_tokens=tokens, input_mask=mask)


def _trained(strategy, batches, teacher=True, inputs=None):
    """The student after ten steps, and the losses."""
    student, seen = _gemma3(0), []
    trainer = trainers.DistillationTrainer(
        student,
        _gemma3(1) if teacher else None,
        strategy,
        optax.adamw(1e-3),
        trainers.TrainingConfig(max_steps=STEPS, eval_every_n_steps=100),
    )
    if inputs is not None:
        trainer.with_gen_model_input_fn(inputs)
    loss = trainer.loss_fn

    def recorded(model, teacher_output, inputs):
        value, metrics = loss(model, teacher_output, inputs)
        jax.debug.callback(lambda x: seen.append(float(x)), value)
        return value, metrics

    trainer.loss_fn = recorded
    trainer.train(batches)
    jax.effects_barrier()
    assert len(seen) == STEPS
    return nnx.to_pure_dict(nnx.state(student)), seen


def _theirs(temperature, alpha, vocab=VOCAB):
    def forward(model, input_tokens, input_mask):
        positions = utils.build_positions_from_mask(input_mask)
        mask = utils.make_causal_attn_mask(input_mask)
        return model(input_tokens, positions, None, mask)[0][:, :-1]

    def labels(input_tokens, input_mask):
        return jax.nn.one_hot(input_tokens[:, 1:], vocab)

    return logit.LogitStrategy(forward, forward, labels, temperature=temperature, alpha=alpha)


def test_ten_steps_with_our_strategy_are_ten_steps_with_theirs():
    objective = Objective(terms=((terms.FullKL(temperature=2.0), 0.7), (terms.SFT(), 0.3)))
    ours, our_losses = _trained(tunix.ObjectiveStrategy(objective), list(_batches()))
    tunix_params, their_losses = _trained(_theirs(2.0, 0.7), list(_batches()))
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-5)
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ours, tunix_params)
    print("largest gap of a parameter:", max(jax.tree.leaves(gaps)))
    assert max(jax.tree.leaves(gaps)) < 1e-5


def test_the_block_of_the_page_trains():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "use_it_in_your_trainer.md").read_text()
    block = re.search(r"^```py\n(.*?ObjectiveStrategy.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert block
    names = {
        "DistillationTrainer": trainers.DistillationTrainer,
        "optax": optax,
        "student": _gemma3(0),
        "teacher": _gemma3(1),
        "config": trainers.TrainingConfig(max_steps=2, eval_every_n_steps=100),
        "batches": list(_batches())[:2],
    }
    table = names["student"].embedder.input_embedding
    before = np.asarray(table[...])
    exec(block[1], names)
    assert (np.asarray(table[...]) != before).any()


def test_a_divergence_with_the_mass_of_the_rest_trains_live_and_from_a_cache():
    """Of the same teacher and top k both are the same; positions of padding count for nothing."""
    strategy = tunix.ObjectiveStrategy(Objective(terms=((terms.KL(), 1.0),)))
    live, values = _trained(strategy, list(_batches(padded=True)))
    print("divergence:", values[0], values[-1])
    assert values[-1] < 0.9 * values[0]

    teacher = _gemma3(1)

    @nnx.jit
    def read(model, input_tokens, input_mask):
        positions = utils.build_positions_from_mask(input_mask)
        mask = utils.make_causal_attn_mask(input_mask)
        hidden = tunix.hidden_states(model, input_tokens, positions, mask)[:, :-1]
        return losses.linear_readout(hidden, tunix.head_of(model), top_k=64).statistics

    batches = [
        trainers.TrainingInput(
            input_tokens=b.input_tokens,
            input_mask=b.input_mask,
            teacher_output=Teacher(statistics=read(teacher, b.input_tokens, b.input_mask)),
        )
        for b in _batches(padded=True)
    ]
    strategy = tunix.ObjectiveStrategy(Objective(terms=((terms.KL(), 1.0),)))
    kept, same = _trained(strategy, batches, teacher=False, inputs=strategy.inputs)
    np.testing.assert_allclose(same, values, rtol=1e-5)
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), live, kept)
    assert max(jax.tree.leaves(gaps)) < 1e-5


@pytest.mark.parametrize(("term", "teacher"), LACKING.values(), ids=LACKING)
def test_a_loss_that_they_lack_trains(term, teacher):
    strategy = tunix.ObjectiveStrategy(Objective(terms=((term, 1.0),)))
    batches = [
        trainers.TrainingInput(
            input_tokens=b.input_tokens,
            input_mask=b.input_mask,
            teacher_output=teacher(b.input_tokens[:, :-1]),
        )
        for b in _batches(padded=True)
    ]
    _, seen = _trained(strategy, batches, teacher=False, inputs=strategy.inputs)
    print(f"{term}: {seen[0]:.3f} to {seen[-1]:.3f} in {len(seen)} steps")
    assert seen[-1] < 0.9 * seen[0]


def _models():
    size = dict(num_layers=2, embed_dim=32, hidden_dim=64, num_heads=2, head_dim=16, num_kv_heads=1)
    yield _gemma3(0)
    config = gemma.ModelConfig(
        num_embed=VOCAB,
        final_logit_softcap=5.0,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(gemma.AttentionType.GLOBAL,) * 2,
        **size,
    )
    yield gemma.Gemma(config, rngs=nnx.Rngs(0))
    shared = dict(vocab_size=VOCAB, rope_theta=10_000, norm_eps=1e-6, **size)
    for tied in (True, False):
        yield llama3.Llama3(llama3.ModelConfig(weight_tying=tied, **shared), rngs=nnx.Rngs(0))
        options = dict(use_tied_embedding=tied, dtype=jnp.float32, param_dtype=jnp.float32)
        yield qwen3.Qwen3(qwen3.ModelConfig(**options, **shared), rngs=nnx.Rngs(0))


def test_hidden_states_and_head_give_each_models_logits():
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, 7)).astype(np.int32)
    valid = np.ones(tokens.shape, bool)
    positions = utils.build_positions_from_mask(valid)
    mask = utils.make_causal_attn_mask(valid)
    for model in _models():
        want = np.asarray(model(tokens, positions, None, mask)[0], np.float32)
        head = tunix.head_of(model)
        got = head.logits(tunix.hidden_states(model, tokens, positions, mask))
        # Some multiply in bfloat16 and round the products.
        bar = 1e-5 if want.dtype == np.float32 else 0.02
        assert np.abs(got - want).max() < bar * np.abs(want).max(), type(model)
        assert not nnx.state(model, nnx.Intermediate)


def _example(model):
    """A step's input, completions of different lengths, and a reference that is not the policy."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, VOCAB, (BATCH, 5)).astype(np.int32)
    prompts[0, :2] = 0
    completions = rng.integers(2, VOCAB, (BATCH, LENGTH)).astype(np.int32)
    completions[1, 6:] = 0
    old, ref = (rng.normal(-6, 0.1, (BATCH, LENGTH)).astype(np.float32) for _ in range(2))
    return common.TrainExample(
        prompt_ids=prompts,
        prompt_mask=prompts != 0,
        completion_ids=completions,
        completion_mask=completions != 0,
        advantages=rng.normal(size=BATCH).astype(np.float32),
        ref_per_token_logps=ref,
        old_per_token_logps=old,
    )


def _grpo_step():
    model = _gemma3(0)
    config = GRPOConfig(beta=0.04, kl_loss_mode="low_var_kl")
    config.temperature = 0.7  # as the learner sets it
    graphdef, state = nnx.split(model)

    def step(state, example):
        def loss(state):
            model = nnx.merge(graphdef, state)
            return algo_core.grpo_loss_fn(model, example, config, pad_id=0, eos_id=1)

        return jax.value_and_grad(loss, has_aux=True)(state)

    program = jax.jit(step).lower(state, _example(model)).compile()
    return program(state, _example(model)), program.as_text()


def test_a_grpo_step_is_theirs_and_holds_no_logits(monkeypatch):
    # So few logits would fit into one block.
    monkeypatch.setattr(_blocks, "_CPU_BLOCK_ELEMENTS", 2**10)
    (expected, wanted_gradient), dense = _grpo_step()
    with tunix.blocked_log_probs():
        (got, gradient), blocked = _grpo_step()
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    for name, value in expected[1].items():
        np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    gaps = jax.tree.map(
        lambda a, b: np.abs(a - b).max() / np.abs(b).max(), gradient, wanted_gradient
    )
    print("largest gap of a gradient, of its largest entry:", max(jax.tree.leaves(gaps)))
    assert max(jax.tree.leaves(gaps)) < 1e-5

    def whole(text):
        # However they are laid out: [B, T, V], [B * T, V] and others.
        shapes = set(re.findall(r"\w\[([\d,]+)\]", text))
        return {s for s in shapes if math.prod(map(int, s.split(","))) >= BATCH * LENGTH * VOCAB}

    assert whole(dense)
    assert not whole(blocked)


@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.7])
def test_log_probabilities_of_completions_are_theirs(temperature):
    model = _gemma3(0)
    example = _example(model)
    run = [
        function(
            *nnx.split(model),
            example.prompt_ids,
            example.completion_ids,
            pad_id=0,
            eos_id=1,
            temperature=temperature,
        )
        for function in (common.compute_per_token_logps, tunix._compute_per_token_logps)
    ]
    gap = float(jnp.abs(run[0] - run[1]).max())
    print("largest gap of a log-probability:", gap)
    assert gap < 1e-5


def test_what_cannot_be_trained_here_is_refused():
    strategy = tunix.ObjectiveStrategy(Objective(terms=((terms.Dual(), 1.0),)))
    with pytest.raises(ValueError, match="objective: expected terms without arrays of their own"):
        strategy.pre_process_models(_gemma3(0), None)
    with pytest.raises(ValueError, match="model: expected one with output_hidden_states"):
        tunix.hidden_states(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), None, None, None)

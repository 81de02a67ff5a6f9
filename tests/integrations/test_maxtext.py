"""A tiny Llama in MaxText's own trainers, with our losses in place of theirs."""

import functools
import os

import jax
import numpy as np
import optax
import pytest
from flax import nnx

pytestmark = pytest.mark.slow
pytest.importorskip("maxtext")
pytest.importorskip("tunix")

import maxtext as maxtext_package  # noqa: E402
from flax.core.spmd import logical_axis_rules  # noqa: E402
from maxtext.configs import pyconfig  # noqa: E402
from maxtext.input_pipeline.input_pipeline_utils import ParseFeatures  # noqa: E402
from maxtext.trainers.post_train.distillation import distillation_utils, train_distill  # noqa: E402
from maxtext.trainers.pre_train import train  # noqa: E402
from maxtext.utils import maxtext_utils, model_creation_utils  # noqa: E402
from tunix.sft import checkpoint_manager, peft_trainer  # noqa: E402

from logitjax import distillation, losses, ops  # noqa: E402
from logitjax.distillation import terms  # noqa: E402
from logitjax.integrations import maxtext, maxtext_files  # noqa: E402
from tests.integrations._teachers import lacking  # noqa: E402

VOCAB, POSITIONS, STEPS = 128, 16, 10
LACKING = lacking(VOCAB)
BASE = next(iter(maxtext_package.__path__)) + "/configs/base.yml"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maxtext")

    def make(**options):
        defaults = dict(
            run_name="t",
            base_output_directory=os.fspath(folder),
            decoder_block="llama2",
            base_emb_dim=32,
            base_num_query_heads=2,
            base_num_kv_heads=2,
            head_dim=16,
            base_mlp_dim=64,
            base_num_decoder_layers=2,
            vocab_size=VOCAB,
            max_target_length=POSITIONS,
            per_device_batch_size=2,
            enable_checkpointing=False,
            dtype="float32",
            hardware="cpu",
            skip_jax_distributed_system=True,
            num_vocab_tiling=2,
        )
        return pyconfig.initialize(["x", BASE], **defaults | options)

    return make


def mesh_of(config):
    return maxtext_utils.get_mesh_from_config(config)


def batches(count=STEPS, **more):
    rng = np.random.default_rng(0)
    rows = 2 * jax.device_count()
    for _ in range(count):
        tokens = rng.integers(1, VOCAB, (rows, POSITIONS + 1)).astype(np.int32)
        segments = np.ones((rows, POSITIONS), np.int32)
        segments[0, -5:] = 0  # Padding.
        batch = dict(
            inputs=tokens[:, :-1],
            targets=tokens[:, 1:],
            inputs_position=np.arange(POSITIONS, dtype=np.int32)[None] * np.ones_like(segments),
            inputs_segmentation=segments,
            targets_segmentation=segments,
        )
        yield batch | {name: array(batch) for name, array in more.items()}


def trained(strategy, config, teacher_config=None, steps=STEPS, folder=None, **more):
    """Parameters after some steps of MaxText's trainer, and the losses on the way."""
    with jax.set_mesh(mesh_of(config)), logical_axis_rules(config.logical_axis_rules):
        mesh = mesh_of(config)
        student = model_creation_utils.from_pretrained(config, mesh=mesh)
        teacher = None
        if teacher_config is not None:
            teacher = model_creation_utils.from_pretrained(teacher_config, mesh=mesh)
        trainer = maxtext.distillation_trainer(
            student,
            teacher,
            strategy,
            optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
            peft_trainer.TrainingConfig(
                max_steps=steps,
                eval_every_n_steps=99,
                data_sharding_axis=("data",),
                gradient_accumulation_steps=config.gradient_accumulation_steps,
            ),
            student_config=config,
            teacher_config=teacher_config,
            checkpoint_directory=folder,
        )
        seen = []
        log = trainer._post_process_train_step
        trainer._post_process_train_step = lambda aux: (
            seen.append(float(aux["distill/total_loss"][0])),
            log(aux),
        )
        trainer.train(distillation_utils.MaxTextToTunixIterator(batches(steps, **more)))
    return nnx.state(student, nnx.Param).to_pure_dict(), seen


def stock(config, teacher_config, **options):
    return distillation_utils.CombinedDistillationStrategy(
        train_distill.create_forward_fn(config),
        train_distill.create_forward_fn(teacher_config),
        vocab_size=VOCAB,
        **options,
    )


def largest_difference(first, second):
    gaps = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - np.asarray(b)).max(), first, second)
    return max(jax.tree.leaves(gaps))


def objective(*pairs):
    return maxtext.ObjectiveStrategy(distillation.Objective(terms=pairs))


EXPERTS = dict(decoder_block="mixtral", num_experts=4, num_experts_per_tok=2)
EXPERTS |= dict(
    base_moe_mlp_dim=64, megablox=False, sparse_matmul=False, load_balance_loss_weight=0.1
)
SETTINGS = {
    "fsdp": {},
    "fsdp and tensor": dict(ici_tensor_parallelism=2),
    "experts": EXPERTS,
    "accumulated": dict(gradient_accumulation_steps=2),
    "explicit": dict(shard_mode="explicit"),
}


@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_ten_steps_with_our_strategy_are_ten_steps_with_theirs(make, options):
    make = functools.partial(make, **options)
    plain, plain_teacher = make(num_vocab_tiling=1), make(num_vocab_tiling=1, init_weights_seed=7)
    maxtext_params, their_losses = trained(
        stock(plain, plain_teacher, temperature=2.0, alpha=0.3), plain, plain_teacher
    )
    strategy = objective((terms.FullKL(temperature=2.0), 0.3), (terms.SFT(), 0.7))
    ours, our_losses = trained(strategy, make(), make(init_weights_seed=7))
    np.testing.assert_allclose(our_losses, their_losses, rtol=1e-5)
    gap = largest_difference(ours, maxtext_params)
    print(f"largest difference of a parameter after {STEPS} steps: {gap:.2e}")
    assert gap < 1e-5
    if not options:
        start, _ = trained(strategy, make(), make(init_weights_seed=7), steps=0)
        assert largest_difference(ours, start) > 5e-3


def top_logits(batch, k=8):
    """A teacher's logits of a batch; a function of the tokens."""
    rng = np.random.default_rng(int(batch["inputs"].sum()))
    return ops.TopK.of(rng.normal(size=(*batch["inputs"].shape, VOCAB)).astype(np.float32) * 3, k)


def test_stored_top_logits_train_as_in_their_offline_mode(make, tmp_path):
    more = {
        "top_k_logits": lambda batch: np.asarray(top_logits(batch).values),
        "top_k_indices": lambda batch: np.asarray(top_logits(batch).indices),
    }
    plain = make(num_vocab_tiling=1)
    maxtext_params, _ = trained(stock(plain, plain, temperature=2.0, alpha=0.5), plain, **more)
    strategy = objective((terms.KL(temperature=2.0), 0.5), (terms.SFT(), 0.5))
    ours, _ = trained(strategy, make(), **more)
    gap = largest_difference(ours, maxtext_params)
    print(f"offline, largest difference of a parameter after {STEPS} steps: {gap:.2e}")
    assert gap < 1e-5


@pytest.mark.parametrize(("term", "teacher"), LACKING.values(), ids=LACKING)
def test_a_loss_that_they_lack_trains(make, term, teacher):
    strategy = objective((term, 1.0))
    _, seen = trained(strategy, make(), steps=30, top_k_logits=lambda b: teacher(b["inputs"]))
    print(f"{term}: {seen[0]:.3f} to {seen[-1]:.3f} in {len(seen)} steps")
    assert np.mean(seen[-5:]) < 0.9 * np.mean(seen[:5])


def test_this_tunix_lacks_what_maxtexts_checkpoint_manager_reads():
    """Once a release has it, the adapter needs no manager of its own."""
    assert not hasattr(checkpoint_manager.CheckpointManager(None), "_checkpointer")


def test_a_run_that_was_stopped_ends_where_one_that_was_not_does(make, tmp_path):
    strategy = objective((terms.SFT(), 1.0))
    whole, _ = trained(strategy, make(), steps=4)
    trained(strategy, make(), steps=2, folder=tmp_path)
    resumed, seen = trained(strategy, make(), steps=4, folder=tmp_path)
    assert len(seen) == 2
    assert largest_difference(resumed, whole) == 0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_pre_training_loss_and_its_gradients_are_the_dense_ones(make, tied, monkeypatch):
    monkeypatch.setattr(train, "vocab_tiling_nnx_loss", maxtext.tiling_loss)
    options = dict(logits_via_embedding=tied, z_loss_multiplier=1e-3)
    if tied:
        options |= dict(final_logits_soft_cap=5.0, normalize_embedding_logits=True)

    def value_and_grad(config):
        mesh = mesh_of(config)
        with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
            model = model_creation_utils.from_pretrained(config, mesh=mesh)
            graphdef, params, rest = nnx.split(model, nnx.Param, ...)
            (batch,) = batches(1)

            @jax.jit
            def loss(params):
                model = nnx.merge(graphdef, params, rest, copy=True)
                value, aux = train.loss_fn(model, config, dict(batch), None, None)
                return value, aux["z_loss"]

            (value, z_loss), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return value, z_loss, gradient.to_pure_dict()

    ours, dense = (
        value_and_grad(make(**options)),
        value_and_grad(make(**options | {"num_vocab_tiling": 1})),
    )
    gap = largest_difference(ours, dense)
    print("pre-training, largest difference of loss and gradients:", gap)
    assert gap < (1e-3 if tied else 2e-6)
    assert float(ours[1]) > 0


def test_a_model_without_vocabulary_tiling_is_refused(make):
    config = make(num_vocab_tiling=1)
    with pytest.raises(ValueError, match="num_vocab_tiling: expected at least 2"):
        trained(objective((terms.SFT(), 1.0)), config, steps=1)
    with pytest.raises(ValueError, match="objective: expected terms without arrays to train"):
        objective((terms.Dual(), 1.0))


def test_the_evaluation_loss_is_the_mean_cross_entropy_of_what_counts():
    rng = np.random.default_rng(0)
    hidden, kernel = np.float32(rng.normal(size=(1, 4, 3))), np.float32(rng.normal(size=(3, 5)))
    strategy = objective((terms.SFT(), 1.0))
    labels = strategy.create_labels(np.array([[0, 1, 2, 3]]), np.array([[1, 1, 1, 0]]))
    output = maxtext.Output((hidden, losses.Head(kernel, vocab_axis=1)))
    loss, metrics = strategy.compute_eval_loss(output, labels)
    log_q = jax.nn.log_softmax(hidden @ kernel)
    # The first is the padding token, the last is no target.
    np.testing.assert_allclose(loss, -(log_q[0, 1, 1] + log_q[0, 2, 2]) / 2, rtol=1e-5)
    assert metrics["eval/hard_loss"][1] == 2


def test_maxtext_parses_what_we_store(tmp_path):
    (batch,) = batches(1)
    top = jax.tree.map(np.asarray, top_logits(batch))
    record = maxtext_files._record(
        {
            "inputs": batch["inputs"][0],
            "top_k_logits": top.values[0],
            "top_k_indices": top.indices[0],
        }
    )
    parsed = ParseFeatures(["inputs", "top_k_logits", "top_k_indices"], False).map(record)
    np.testing.assert_array_equal(parsed["top_k_logits"], top.values[0])
    np.testing.assert_array_equal(parsed["top_k_indices"], top.indices[0])
    np.testing.assert_array_equal(parsed["inputs"], batch["inputs"][0])

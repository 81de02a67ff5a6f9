# %% [markdown]
# # A student in MaxText's distillation trainer
#
# Two tiny Llamas of MaxText, its mesh, trainer and batches; the loss is an objective of ours. With
# `num_vocab_tiling` MaxText shows hidden states and forms no logits, and neither do we. It needs
# `pip install 'logitjax[maxtext]'` and Python 3.12. Offline, a minute on a CPU.

# %%
import tempfile

import jax
import maxtext
import numpy as np
import optax
from flax.core.spmd import logical_axis_rules
from maxtext.configs import pyconfig
from maxtext.trainers.post_train.distillation.distillation_utils import MaxTextToTunixIterator
from maxtext.utils import maxtext_utils, model_creation_utils
from tunix.sft.peft_trainer import TrainingConfig

from logitjax.distillation import Objective, terms
from logitjax.integrations.maxtext import ObjectiveStrategy, distillation_trainer

shape = dict(base_emb_dim=32, base_num_query_heads=2, base_num_kv_heads=2, head_dim=16)
shape |= dict(base_mlp_dim=64, base_num_decoder_layers=2, decoder_block="llama2", vocab_size=128)
run = dict(
    max_target_length=16, per_device_batch_size=4, hardware="cpu", enable_checkpointing=False
)
run |= dict(
    base_output_directory=tempfile.mkdtemp(), skip_jax_distributed_system=True, run_name="t"
)


def configuration(**options):
    base = next(iter(maxtext.__path__)) + "/configs/base.yml"
    return pyconfig.initialize(["", base], **shape, **run, **options, num_vocab_tiling=2)


def batches(steps):
    rng, ones = np.random.default_rng(0), np.ones((4 * jax.device_count(), 16), np.int32)
    for _ in range(steps):
        tokens = rng.integers(1, 128, (len(ones), 17)).astype(np.int32)
        columns = dict(inputs=tokens[:, :-1], targets=tokens[:, 1:], inputs_segmentation=ones)
        yield columns | dict(inputs_position=np.arange(16) * ones, targets_segmentation=ones)


# %%
configs = dict(student_config=configuration(), teacher_config=configuration(init_weights_seed=7))
config = configs["student_config"]
mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
    models = [model_creation_utils.from_pretrained(c, mesh=mesh) for c in configs.values()]
    strategy = ObjectiveStrategy(Objective(terms=((terms.FullKL(), 0.9), (terms.SFT(), 0.1))))
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=3e-3)
    options = TrainingConfig(max_steps=40, eval_every_n_steps=99, data_sharding_axis=("data",))
    trainer = distillation_trainer(*models, strategy, optimizer, options, **configs)
    trainer.train(MaxTextToTunixIterator(batches(40)))
seen = trainer.metrics_logger.get_metric_history("", "distill/full_kl", "train")
print(f"worked: KL(teacher || student) {seen[0]:.3f} to {seen[-1]:.3f} in {len(seen)} steps")

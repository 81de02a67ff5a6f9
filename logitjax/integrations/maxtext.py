"""Our losses inside MaxText: its distillation trainer and its pre-training step.

With `num_vocab_tiling` of 2 or more, MaxText's decoder forms no logits and returns its last hidden
states, from which our losses are computed. See docs/maxtext.md. It needs `pip install
'logitjax[maxtext]'` and Python 3.12, and was run with maxtext 0.2.5 and tunix 0.1.7.

That pair does not run unmodified: `MaxTextCheckpointManager` reads `_checkpointer`, which tunix has
on its main branch and in no release up to 0.1.7, and training ends with an AttributeError.
`distillation_trainer` gives its trainer tunix's own manager instead: student and optimizer are
saved and restored, and batches already seen are skipped, where MaxText restores its iterator.
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax import losses, storage
from logitjax.distillation import Objective, Teacher, Term

storage.require("maxtext", extra="maxtext")

from maxtext.trainers.post_train.distillation import distillation_utils, train_distill  # noqa: E402
from maxtext.utils import maxtext_utils  # noqa: E402
from tunix.sft import checkpoint_manager  # noqa: E402

Output = distillation_utils.DistillationForwardOutput


def _states_and_head(model: Any, hidden: Any, *, dropout: bool = False) -> tuple[Any, losses.Head]:
    """Apply a MaxText model's final norm to `hidden`; also return the model's head."""
    config, decoder = model.config, model.decoder
    hidden = decoder.dropout(decoder.decoder_norm(hidden), deterministic=not dropout)
    # Cast here, not block by block (`Head.compute_dtype`): over a mesh that splits the model the
    # head is gathered in its stored type, so this halves the bytes.
    if not config.logits_via_embedding:
        dtype = jnp.float32 if config.logits_dot_in_fp32 else config.dtype
        kernel = decoder.logits_dense.kernel[...].astype(dtype)
        return hidden.astype(dtype), losses.Head(kernel, vocab_axis=1)
    # MaxText rounds a tied table to bfloat16, whatever types its configuration names.
    table = model.token_embedder.embedding[...].astype(jnp.bfloat16)
    if config.normalize_embedding_logits:
        hidden = hidden / math.sqrt(hidden.shape[-1])
    return hidden, losses.Head(table, vocab_axis=0, soft_cap=config.final_logits_soft_cap or None)


def _forward(
    model: Any, input_tokens: Any, positions: Any, decoder_segment_ids: Any = None, **other: Any
) -> Output | None:
    """A forward function of MaxText's trainer, whose `logits` are hidden states and the head."""
    if model is None:
        # No teacher: the objective says whether it needs one.
        return None
    targets = {name: array for name, array in other.items() if name.startswith("decoder_target")}
    dropout = model.config.enable_dropout
    logits = model(input_tokens, positions, decoder_segment_ids, enable_dropout=dropout, **targets)
    if logits is not None:
        tiles = model.config.num_vocab_tiling
        raise ValueError(f"num_vocab_tiling: expected at least 2, for hidden states, got {tiles}")
    sown = nnx.pop(model, nnx.Intermediate).to_pure_dict()
    # A teacher's head too: inside the jitted step, returning it copies nothing.
    pair = _states_and_head(model, sown["decoder"]["hidden_states"][0], dropout=dropout)
    balance = maxtext_utils.collect_intermediates_by_suffix(sown, "moe_lb_loss")
    return Output(pair, moe_lb_loss=jnp.mean(jnp.concatenate(balance)) if balance else None)


class ObjectiveStrategy(distillation_utils.DistillationStrategy):
    """A `distillation.Objective` as a strategy of MaxText's distillation trainer.

    The teacher is the trainer's model; or the batch's `top_k_logits` and `top_k_indices`, as
    MaxText stores them; or, as `top_k_logits`, a `distillation.Teacher` or a list of several, made
    of a `TeacherCache` for instance. Loss and metrics are means over the targets that count.

    Args:
        objective: Loss to minimise.
        pad_id: Targets to ignore, as in MaxText's own strategy, in addition to those whose segment
            is 0; None for the segments alone.

    Raises:
        ValueError: A term with arrays of its own, which this trainer does not train.
    """

    def __init__(self, objective: Objective, *, pad_id: int | None = 0):
        for term, _ in objective.terms:
            if type(term).init is not Term.init:
                raise ValueError(f"objective: expected terms without arrays to train, got {term}")
        super().__init__(_forward, _forward, vocab_size=0, pad_id=pad_id)  # type: ignore[arg-type]
        self.objective = objective

    def create_labels(self, targets: Any, targets_segmentation: Any = None, **_: Any) -> Any:
        """The targets, and where they count."""
        where = jnp.ones(targets.shape, bool) if self.pad_id is None else targets != self.pad_id
        if targets_segmentation is not None:
            where &= targets_segmentation != 0
        return targets, where

    def compute_loss(
        self, student_output: Any, teacher_output: Any, labels: Any, step: Any = None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The objective's mean, and a pair of sum and count for each term."""
        (hidden, head), (targets, where) = student_output.logits, labels
        total, count, metrics = self.objective.value(
            hidden, head, {"labels": targets}, _teachers(teacher_output), where=where
        )
        loss = total / jnp.maximum(count, 1)
        if student_output.moe_lb_loss is not None:
            loss = loss + student_output.moe_lb_loss
        pairs = {f"distill/{name}": pair for name, pair in metrics.items()}
        return loss, pairs | {distillation_utils.METRIC_TOTAL_LOSS: (loss, jnp.float32(1))}

    def compute_eval_loss(self, student_output: Any, labels: Any) -> tuple[Any, dict[str, Any]]:
        """The mean cross-entropy of the targets."""
        (hidden, head), (targets, where) = student_output.logits, labels
        weights = where.astype(jnp.float32)
        total = losses.linear_cross_entropy(hidden, head, targets, weights=weights)
        return total / jnp.maximum(where.sum(), 1), {"eval/hard_loss": (total, where.sum())}


def _teachers(output: Any) -> list[Teacher]:
    if not isinstance(output, Output):
        return [output] if isinstance(output, Teacher) else list(output or ())
    if output.top_k_indices is not None:
        top = losses.GraphStatistics(values=output.logits, indices=output.top_k_indices)
        return [Teacher(statistics=top)]
    hidden, head = output.logits
    return [Teacher(hidden=hidden, head=head)]


def distillation_trainer(
    student: Any,
    teacher: Any,
    strategy: distillation_utils.DistillationStrategy,
    optimizer: Any,
    training_config: Any,
    *,
    student_config: Any,
    teacher_config: Any = None,
    checkpoint_directory: str | os.PathLike[str] | None = None,
) -> train_distill.MaxTextDistillationTrainer:
    """MaxText's distillation trainer, ready for `train(MaxTextToTunixIterator(batches))`.

    Args:
        teacher: A MaxText model of the same vocabulary; None if batches contain its output.
        strategy: An `ObjectiveStrategy`, or one of MaxText's.
        optimizer: From `optax.inject_hyperparams`, as MaxText requires.
        training_config: tunix's `TrainingConfig`.
        student_config, teacher_config: MaxText's; the latter is None without a teacher.
        checkpoint_directory: Folder where student and optimizer are saved and restored; pass the
            batches from the first one. None saves nothing.
    """
    bundle = train_distill.ModelBundle(teacher, student)
    configs = (training_config, student_config, teacher_config)
    trainer = train_distill.MaxTextDistillationTrainer(
        bundle, strategy, optimizer, *configs, is_offline=teacher is None
    )
    folder = None if checkpoint_directory is None else os.path.abspath(checkpoint_directory)
    trainer.checkpoint_manager = _StudentCheckpoints(folder, training_config.checkpointing_options)
    step, _ = trainer.checkpoint_manager.maybe_restore(bundle, trainer.optimizer)
    trainer._train_steps = step
    trainer._iter_steps = step * (training_config.gradient_accumulation_steps or 1)
    bundle.training_step.set_value(jnp.int32(step))
    trainer._has_aux = True
    return trainer.with_gen_model_input_fn(_inputs)


class _StudentCheckpoints(checkpoint_manager.CheckpointManager):
    """tunix's manager for a bundle of teacher and student, of which only the student is saved."""

    def save(self, step: int, model: Any, *args: Any, **options: Any) -> bool:
        return super().save(step, getattr(model, "student_model", model), *args, **options)

    def maybe_restore(self, model: Any, *args: Any, **options: Any) -> tuple[int, dict[str, Any]]:
        return super().maybe_restore(getattr(model, "student_model", model), *args, **options)


def _inputs(batch: distillation_utils.MaxTextTrainingInput) -> dict[str, Any]:
    """Read the step's inputs from a batch, as MaxText's `custom_gen_model_input_fn` has it."""
    names = ("input_tokens", "positions", "decoder_segment_ids", "targets", "targets_segmentation")
    inputs = {name: getattr(batch, name) for name in names} | {"attention_mask": batch.input_mask}
    teacher = batch.top_k_logits
    if batch.top_k_indices is not None:
        teacher = Output(teacher, top_k_indices=batch.top_k_indices)
    return inputs if teacher is None else inputs | {"teacher_output": teacher}


def tiling_loss(
    model: Any, hidden_states: jax.Array, data: Mapping[str, Any], config: Any, is_train: bool
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of pre-training, in place of `vocab_tiling_nnx_loss`.

    MaxText tiles tokens, with whole rows of logits and one-hot targets; this visits the vocabulary
    in blocks. Set `maxtext.trainers.pre_train.train.vocab_tiling_nnx_loss` to it. Arguments
    and results are the same: sums where the segment is not 0, of the loss and of its z-loss part.
    """
    pair = _states_and_head(model, hidden_states, dropout=is_train and config.enable_dropout)
    labels, where = data["targets"], data["targets_segmentation"] != 0
    # The normaliser is not requested.
    if not config.z_loss_multiplier:
        total = losses.linear_cross_entropy(*pair, labels, weights=where.astype(jnp.float32))
        return total, jnp.zeros_like(total)
    read = losses.linear_readout(*pair, labels=labels)
    z_loss = jnp.where(where, config.z_loss_multiplier * jnp.square(read.log_z), 0.0)
    return (jnp.where(where, read.cross_entropy, 0.0) + z_loss).sum(), z_loss.sum()

"""Our objectives and log-probabilities inside tunix's trainers, which then hold no logits.

    strategy = tunix.ObjectiveStrategy(Objective(terms=((FullKL(), 0.5), (SFT(), 0.5))))
    DistillationTrainer(student, teacher, strategy, optimizer, config).train(batches)

    with tunix.blocked_log_probs():  # GRPO, DAPO, GSPO and PPO of tunix
        learner.train(batches)

It needs `pip install 'logitjax[tunix]'`; tested with google-tunix 0.1.7, whose models return their
hidden states beside unused logits, which the compiler removes.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from logitjax import losses, storage
from logitjax.distillation import Objective, Teacher
from logitjax.distillation.terms import SFT
from logitjax.losses import Head

storage.require("tunix", extra="tunix")

from tunix.distillation.strategies import base_strategy  # noqa: E402
from tunix.models.llama3 import model as llama3  # noqa: E402
from tunix.rl import algo_core, common  # noqa: E402
from tunix.sft import utils  # noqa: E402


def hidden_states(
    model: Any, tokens: Any, positions: Any, attention_mask: Any, **more: Any
) -> jax.Array:
    """Read the hidden states of a model of `tunix.models`, `[B, T, D]`, after its final norm.

    The arguments are those of the model's call, without a cache.

    Raises:
        ValueError: This version of the model returns only logits.
    """
    options = inspect.signature(type(model).__call__).parameters
    call = functools.partial(model, tokens, positions, None, attention_mask, **more)
    if "skip_lm_head" in options:
        return call(skip_lm_head=True)[0]
    if "output_hidden_states" in options:
        call(output_hidden_states=True)
        # Or the model stores it.
        sown: Any = nnx.pop(model, nnx.Intermediate)
        return sown["all_hidden_states"].get_value()[0]
    if isinstance(model, llama3.Llama3):
        states = model.embedder.encode(tokens)
        for layer in model.layers:
            _, states = layer(states, positions, None, attention_mask)
        return model.final_norm(states)
    raise ValueError(
        "model: expected one with output_hidden_states or skip_lm_head, got "
        f"{type(model).__name__} of this version of tunix"
    )


def head_of(model: Any) -> Head:
    """A tunix model's head, tied or not, with its soft cap; ValueError if it has adapters."""
    config = getattr(model, "config", None)
    cap = getattr(config, "final_logit_softcap", None)
    options = {
        "soft_cap": getattr(model, "final_logits_softcap", cap),
        "compute_dtype": getattr(config, "dtype", None),
    }
    if not hasattr(model, "lm_head"):
        return Head(model.embedder.input_embedding[...], vocab_axis=0, **options)
    if utils.is_lora_enabled(model.lm_head):
        raise ValueError("model: expected a head without adapters, got LoRA on lm_head")
    return Head(model.lm_head.w[...], vocab_axis=1, **options)


class TeacherHead(nnx.Variable):
    """The kernel of a teacher's head, stored with the student's parameters but not trained."""


class ObjectiveStrategy(base_strategy.BaseStrategy):
    """A strategy for tunix's `DistillationTrainer` that minimises an objective.

    The teacher is the trainer's, and reads the same tokens. Its hidden states travel with the
    batch. Its head is an attribute of the student until the trainer is closed: in the batch it
    would be copied every step, and closed over it would be a constant in the program's text.

    Alternatively the batch contains a cache's output: then the trainer's teacher is None,
    `trainer.with_gen_model_input_fn(strategy.inputs)` is called, and `teacher_output` of a batch is
    a `Teacher`, or several, with arrays `[B, T - 1, ...]` at the positions that predict a token.
    Evaluation is the cross-entropy of the text.

    Args:
        objective: Loss to minimise. Its terms have no arrays of their own to train.
        pad_id: Id of padding. Then `input_mask` marks the tokens to learn, and positions and
            attention follow from the ids. If None, it marks the existing tokens; all are learned.
    """

    def __init__(self, objective: Objective, *, pad_id: int | None = None):
        super().__init__(self._student, self._hidden, self._targets)
        self._objective, self._pad_id = objective, pad_id
        self._teacher_head: Head | None = None

    def inputs(self, batch: Any) -> dict[str, Any]:
        """The model's inputs from a batch that contains a cache's output."""
        inputs = {"input_tokens": batch.input_tokens, "input_mask": batch.input_mask}
        return inputs | {"cached": batch.teacher_output}

    def pre_process_models(self, student_model: Any, teacher_model: Any) -> tuple[Any, Any]:
        head = head_of(student_model)
        if self._objective.init(jax.random.key(0), head):
            raise ValueError("objective: expected terms without arrays of their own, got some")
        if teacher_model is not None:
            self._teacher_head = head_of(teacher_model)
            student_model.teacher_head = TeacherHead(self._teacher_head.kernel)
        return student_model, teacher_model

    def post_process_models(self, student_model: Any, teacher_model: Any) -> tuple[Any, Any]:
        # A trainer closes itself after training, and may be closed again.
        if hasattr(student_model, "teacher_head"):
            del student_model.teacher_head
        return student_model, teacher_model

    def get_teacher_outputs(self, teacher_model: Any, inputs: Mapping[str, Any]) -> Any:
        if self._objective.taught is None:
            return []
        if teacher_model is None:
            cached = inputs.get("cached")
            return list(cached) if isinstance(cached, Sequence) else [cached]
        return [Teacher(hidden=super().get_teacher_outputs(teacher_model, dict(inputs)))]

    def compute_loss(self, student_output: Any, teacher_output: Any, labels: Any) -> Any:
        return self._mean(self._objective, student_output, teacher_output, labels)

    def compute_eval_loss(self, student_output: Any, labels: Any) -> Any:
        return self._mean(Objective(terms=((SFT(), 1.0),)), student_output, [], labels)

    def _mean(self, objective: Objective, student: Any, teachers: Any, labels: Any) -> Any:
        (hidden, head, teacher_head), (targets, where) = student, labels
        if teacher_head is not None:
            teachers = [dataclasses.replace(teacher, head=teacher_head) for teacher in teachers]
        total, count, metrics = objective.value(
            hidden, head, {"labels": targets}, teachers, where=where
        )
        means = {name: part / jnp.maximum(n, 1) for name, (part, n) in metrics.items()}
        return total / jnp.maximum(count, 1), means

    def _student(self, model: Any, input_tokens: Any, input_mask: Any, **_: Any) -> Any:
        teacher_head = None
        if self._teacher_head is not None and hasattr(model, "teacher_head"):
            teacher_head = dataclasses.replace(self._teacher_head, kernel=model.teacher_head[...])
        return self._hidden(model, input_tokens, input_mask), head_of(model), teacher_head

    def _hidden(self, model: Any, input_tokens: Any, input_mask: Any, **_: Any) -> jax.Array:
        present = input_mask.astype(bool) if self._pad_id is None else input_tokens != self._pad_id
        positions = utils.build_positions_from_mask(present)
        mask = utils.make_causal_attn_mask(present)
        # The last has no label.
        return hidden_states(model, input_tokens, positions, mask)[:, :-1]

    def _targets(self, input_tokens: Any, input_mask: Any, **_: Any) -> tuple[Any, Any]:
        return input_tokens[:, 1:], input_mask[:, 1:].astype(bool)


@functools.partial(
    jax.jit, static_argnames=("pad_id", "eos_id", "stop_gradient", "return_logits", "temperature")
)
def _compute_per_token_logps(
    graphdef: Any,
    state: Any,
    prompt_tokens: jax.Array,
    completion_tokens: jax.Array,
    pad_id: int,
    eos_id: int,
    images: jax.Array | None = None,
    stop_gradient: bool = True,
    return_logits: bool = False,
    segment_ids: jax.Array | None = None,
    segment_positions: jax.Array | None = None,
    temperature: float = 1.0,
) -> Any:
    """The result of tunix's function of this name; `return_logits` gives entropies, `[B, T]`."""
    model: Any = nnx.merge(graphdef, state)
    tokens, positions, mask, segments = common.process_ids(
        prompt_tokens, completion_tokens, pad_id, eos_id, segment_ids, segment_positions
    )
    more = {"segment_ids": segments if segment_ids is None else segment_ids, "images": images}
    options = inspect.signature(type(model).__call__).parameters
    more = {name: x for name, x in more.items() if name in options and x is not None}
    packed = segment_ids is not None
    count = (tokens if packed else completion_tokens).shape[1] - packed
    results = losses.linear_log_probs(
        hidden_states(model, tokens, positions, mask, **more)[:, -count - 1 : -1],
        head_of(model),
        tokens[:, -count:],
        temperature=temperature or 1.0,
        entropy=return_logits,
    )
    # Packed rows begin with a token that nothing predicts.
    results = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (int(packed), 0))), results)
    if stop_gradient:
        results = jax.lax.stop_gradient(results)
    return tuple(results) if return_logits else results.values


@contextlib.contextmanager
def blocked_log_probs() -> Iterator[None]:
    """Let tunix's losses, references and roll-outs use log-probabilities without logits.

    tunix 0.1.7 has no option for it: within the context, `compute_per_token_logps` of
    `tunix.rl.common` is ours, and the entropy of "logits" is what ours returns in their place.
    Programs traced earlier keep the original.
    """
    before = common.compute_per_token_logps, algo_core.compute_entropy_from_logits
    common.compute_per_token_logps = _compute_per_token_logps
    algo_core.compute_entropy_from_logits = lambda entropies: entropies
    try:
        yield
    finally:
        common.compute_per_token_logps, algo_core.compute_entropy_from_logits = before

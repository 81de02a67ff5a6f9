"""Which files of the library are mutated, and which tests should notice; faults written by hand."""

import dataclasses
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Area:
    """Files that are mutated together: how often, and what tests each of them has.

    Paths are without ``logitjax/`` and ``.py``, tests without ``tests/`` and ``.py``.
    """

    mutants: int
    files: Mapping[str, Sequence[str]]


_LINEAR = ("losses/test_linear_losses", "losses/test_sparse_teacher")
_DECODER = ("models/test_cache", "models/test_decoder")
_BOUNDS = ("transport/test_bounds", "transport/test_reference")
_DYNAMIC = ("fusion/test_dynamic", "fusion/test_several_experts")

AREAS: Mapping[str, Area] = {
    "losses": Area(
        mutants=22,
        files={
            "losses/_cross_entropy": ("losses/test_cross_entropy",),
            "losses/_divergences": ("losses/test_divergences",),
            "losses/_graph_statistics": ("distillation/test_graph_on_logits",),
            "losses/_linear_divergences": ("losses/test_linear_losses",),
            "losses/_linear_readout": ("losses/test_linear_losses",),
            "losses/_sparse_teacher": ("losses/test_sparse_teacher",),
            "losses/_tail_sample": ("losses/test_sparse_teacher",),
            "unlearning/_losses": ("unlearning/test_losses",),
            "unlearning/_linear_losses": ("unlearning/test_losses",),
            "unlearning/_targets": ("unlearning/test_losses",),
        },
    ),
    "sweep": Area(
        mutants=14,
        files={
            # Without `_blocks`, whose numbers decide how fast it is and nothing else.
            "losses/sweep/_engine": _LINEAR,
            "losses/sweep/_head": _LINEAR,
            "losses/sweep/_kl": _LINEAR,
            "losses/sweep/_readout": _LINEAR,
            "losses/sweep/_run": _LINEAR,
            "losses/sweep/_statistic": _LINEAR,
            "losses/sweep/_weighted": _LINEAR,
        },
    ),
    "distillation": Area(
        mutants=20,
        files={
            "distillation/_align_gradients": ("distillation/test_align_gradients",),
            "distillation/_alignment": ("distillation/test_alignment",),
            "distillation/_binary_kl": ("distillation/test_dual_head",),
            "distillation/_dual_head": ("distillation/test_dual_head",),
            "distillation/_graph_fusion": ("distillation/test_graph_fusion",),
            "distillation/_graph_on_logits": ("distillation/test_graph_on_logits",),
            "distillation/_knowledge_distillation": ("distillation/test_knowledge_distillation",),
            "distillation/_linear_graph_fusion": ("distillation/test_graph_fusion",),
            "distillation/_loss_function": ("distillation/test_objective",),
            "distillation/_objective": ("distillation/test_objective",),
            "distillation/_prune": ("distillation/test_prune",),
            "distillation/_student": ("distillation/test_objective",),
            "distillation/_teacher_terms": ("distillation/test_objective",),
            "distillation/_universal_logit_distance": (
                "distillation/test_universal_logit_distance",
            ),
        },
    ),
    "attention": Area(
        mutants=16,
        files={
            "models/_attention": _DECODER,
            "models/_cache": _DECODER,
            "models/_rope": ("models/test_rope", "models/test_decoder"),
        },
    ),
    "packing": Area(
        mutants=14,
        files={
            "data/_documents": ("data/test_packing",),
            "data/_order": ("data/test_order",),
            "data/_pack": ("data/test_packing",),
            "data/_packed": ("data/test_packing",),
        },
    ),
    "step": Area(
        mutants=10,
        files={
            "training/_metrics": ("training/test_step", "training/test_loop"),
            "training/_step": ("training/test_step",),
        },
    ),
    "decoding": Area(
        mutants=18,
        files={
            "decoding/_draft_control": ("decoding/test_draft_control",),
            "decoding/_sampling": ("decoding/test_sampling", "decoding/test_engine"),
            "decoding/_speculate": ("decoding/test_speculate",),
            "decoding/_step": ("decoding/test_engine", "decoding/test_generate"),
        },
    ),
    "fusion": Area(
        mutants=14,
        files={
            "fusion/_dynamic": _DYNAMIC,
            "fusion/_inputs": (*_DYNAMIC, "fusion/test_static"),
            "fusion/_joint": ("fusion/test_several_experts",),
            "fusion/_logit_difference": ("fusion/test_static",),
            "fusion/_minimum": ("fusion/test_minimum",),
            "fusion/_path": _DYNAMIC,
            "fusion/_solve": _DYNAMIC,
            "fusion/_static": ("fusion/test_static",),
            "fusion/_token_map": ("fusion/test_token_map",),
        },
    ),
    "leakage": Area(
        mutants=16,
        files={
            "leakage/_alignment": ("leakage/test_geometry", "leakage/test_subspace"),
            "leakage/_completion": ("leakage/test_subspace",),
            "leakage/_corner": ("leakage/test_subspace",),
            "leakage/_geometry": ("leakage/test_geometry",),
            "leakage/_gram": ("leakage/test_subspace",),
            "leakage/_harvest": ("leakage/test_attackers",),
            "leakage/_known_basis": ("leakage/test_recover_row",),
            "leakage/_policy": ("leakage/test_oracle",),
            "leakage/_recover_row": ("leakage/test_recover_row",),
            "leakage/_residual": ("leakage/test_width",),
            "leakage/_search": ("leakage/test_attackers",),
            "leakage/_sketch": ("leakage/test_subspace",),
            "leakage/_spectrum": ("leakage/test_subspace", "leakage/test_width"),
            "leakage/_subspace": ("leakage/test_subspace",),
            "leakage/_unbias": ("leakage/test_recover_row",),
            "leakage/_width": ("leakage/test_width",),
        },
    ),
    "transport": Area(
        mutants=16,
        files={
            "transport/_bounds": _BOUNDS,
            "transport/_certificate": _BOUNDS,
            "transport/_coupling": ("transport/test_coupling",),
            "transport/_features": ("transport/test_features",),
            "transport/_matching_bounds": _BOUNDS,
            "transport/_plans": ("transport/test_coupling",),
            "transport/_rounding": ("transport/test_coupling",),
            "transport/_refine": ("transport/test_bounds",),
            "transport/_sorted": (*_BOUNDS, "distillation/test_graph_on_logits"),
        },
    ),
    "metrics": Area(
        mutants=14,
        files={
            "evaluation/_nll": ("unlearning/test_tofu",),
            "evaluation/_rouge": ("unlearning/test_metrics",),
            "unlearning/_forget_quality": ("unlearning/test_metrics",),
            "unlearning/_memorisation": ("unlearning/test_metrics",),
            "unlearning/_tofu_metrics": ("unlearning/test_metrics", "unlearning/test_tofu"),
            "unlearning/_truth_ratio": ("unlearning/test_metrics",),
        },
    ),
    "vq": Area(
        mutants=12,
        files={
            "vq/_assignment": ("vq/test_assignment",),
            "vq/_decode": ("vq/test_decode",),
            "vq/_kmeans": ("vq/test_assignment",),
            "vq/_loss": ("vq/test_loss",),
        },
    ),
    "loaders": Area(
        mutants=16,
        files={
            "models/_gguf": ("models/test_gguf",),
            "models/_load": ("models/test_loading",),
            "models/_weight_map": ("models/test_families", "models/test_loading"),
            "storage/_safetensors": ("models/test_loading",),
            "storage/_torch_checkpoint": ("storage/test_torch_checkpoint",),
        },
    ),
}

# Faults that tests once let pass, written by hand: they run whatever is drawn.
NAMED: Sequence[tuple[str, str, str, str]] = (
    (
        "the edge of a sliding window in a packed mask",
        "models/_attention",
        "index[:, None] - index[None, :] < window",
        "index[:, None] - index[None, :] <= window",
    ),
    (
        "the gradient of an unlearning reference",
        "unlearning/_losses",
        "return nll - jax.lax.stop_gradient(reference)",
        "return nll - reference",
    ),
    (
        "the microbatch in the step's key",
        "training/_step",
        "jax.random.fold_in(key, index)",
        "key",
    ),
    (
        "infinity where a student gives nothing to a token of the teacher's",
        "losses/_divergences",
        "jnp.where(p > 0, jnp.inf, 0.0)",
        "0.0",
    ),
    (
        "the same, of a teacher's top tokens",
        "losses/_sparse_teacher",
        "jnp.where(mass > 0, jnp.inf, 0.0)",
        "0.0",
    ),
    (
        "the same, in the sweep",
        "losses/sweep/_kl",
        "jnp.where(escaped > 0, jnp.inf, finite)",
        "finite",
    ),
    (
        "empty places in the student's rest, of MinED",
        "distillation/_teacher_terms",
        "jnp.where(there, student.values, -jnp.inf)",
        "student.values",
    ),
    (
        "prompts that were repeated, in the width of exact rows",
        "leakage/_width",
        "if seen.distinct(0.0) <= k:",
        "if False:",
    ),
    (
        "the first position of a packed row",
        "data/_documents",
        "mask[:1] = False",
        "mask[:0] = False",
    ),
    (
        "the first position of a packed conversation",
        "data/_pack",
        "mask[:1] = False",
        "mask[:0] = False",
    ),
)

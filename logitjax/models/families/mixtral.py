"""Mixtral: Mistral with experts."""

import dataclasses

from logitjax.models._family import gguf_experts
from logitjax.models.families.mistral import MISTRAL

_EXPERT = "model.layers.*.block_sparse_moe.experts.#."

MIXTRAL = dataclasses.replace(
    MISTRAL,
    name="mixtral",
    architecture="MixtralForCausalLM",
    keys=MISTRAL.keys | dict(
        rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
        num_local_experts=8, num_experts_per_tok=2,
    ),
    fields=MISTRAL.fields | {
        "num_local_experts": "num_experts", "num_experts_per_tok": "experts_per_token"
    },
    weights=MISTRAL.weights | {
        "mlp.router": "model.layers.*.block_sparse_moe.gate",
        "mlp.experts.gate": _EXPERT + "w1",
        "mlp.experts.up": _EXPERT + "w3",
        "mlp.experts.down": _EXPERT + "w2",
    },
    # Noise of the router in training.
    ignored=MISTRAL.ignored | {"router_jitter_noise"},
    gguf="llama+experts",
    gguf_read=gguf_experts,
    pre_tokenizers={},
)  # fmt: skip

"""Low-rank adapters as a pytree next to the model, for stacked and listed layers."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from logitjax.models._config import DecoderConfig
from logitjax.models._stacking import convert, twin
from logitjax.ops import Array, Codes

# Imported here because it imports the adapters.
if TYPE_CHECKING:
    from logitjax.models._decoder import Decoder

_TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters `x @ down @ up * scale`; `layers` follows the model's segments and layout."""

    layers: tuple
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})

    @classmethod
    def init(
        cls,
        config: DecoderConfig,
        rank: int,
        *,
        key: Array,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        layout: str = "stacked",
    ) -> "Lora":
        """Adapters for `hidden_states(lora=)` that initially change nothing: random `a`, zero `b`.

        Args:
            alpha: the update is scaled by `alpha / rank`; by default `rank`.
            targets: linear maps to adapt, of `query key value output gate up down`; by default all.
            layout: `'stacked'` or `'listed'`, as in the model.

        Raises:
            ValueError: for an unknown target.

        >>> from logitjax.models import load_config
        >>> init = jax.jit(lambda key: Lora.init(load_config("tiny"), 2, key=key))
        >>> init(jax.random.key(0)).layers[0][0]["query"]["a"].shape
        (2, 32, 2)

        References:
            Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
        """
        sizes = _sizes(config)
        targets = _TARGETS if targets is None else targets
        unknown = sorted(set(targets) - set(_TARGETS))
        if unknown:
            raise ValueError(f"targets: expected some of {_TARGETS}, got {unknown}")
        stacked = layout == "stacked"

        def layer(key: Array, lead: tuple[int, ...]) -> dict:
            out = {}
            for i, name in enumerate(n for n in _TARGETS if n in targets and n in sizes):
                inner, outer = sizes[name]
                a = jax.random.normal(jax.random.fold_in(key, i), (*lead, inner, rank), jnp.float32)
                out[name] = {
                    # `x @ a` has the size of x.
                    "a": (a * inner**-0.5).astype(dtype),
                    "b": jnp.zeros((*lead, rank, outer), dtype),
                }
            return out

        layers, count = [], 0
        for spec in config.segments:
            entries = len(spec.pattern) if stacked else spec.num_layers
            lead = (spec.repeats,) if stacked else ()
            layers.append(
                tuple(layer(jax.random.fold_in(key, count + j), lead) for j in range(entries))
            )
            count += spec.num_layers
        scale = 1.0 if alpha is None else alpha / rank
        return cls(layers=tuple(layers), scale=scale)

    def with_layout(self, config: DecoderConfig, layout: str) -> "Lora":
        """The same adapters for a model of the other layout."""
        layers = (tuple(convert(m, spec, layout)) for m, spec in zip(self.layers, config.segments))
        return dataclasses.replace(self, layers=tuple(layers))

    def save(self, config: DecoderConfig, directory: epath.PathLike, *, base: str = "") -> None:
        """Write adapters in PEFT's format, so that `PeftModel.from_pretrained` loads them on the
        base.

        PEFT's `lora_A` and `lora_B` are our `a` and `b`, each transposed. The layers are listed in
        `layers_to_transform`, so adapters of a model's first layers load on those layers and on the
        whole model.

        Args:
            config: Configuration of the adapted model, or of its first layers.
            directory: Folder, created if it does not exist.
            base: Name or directory of the base model, which PEFT records.

        Raises:
            ValueError: The family's checkpoints fuse several of our maps in one tensor.
        """
        # Imported here because it imports this class.
        from logitjax.models._peft import save_peft

        save_peft(self, config, directory, base)

    @classmethod
    def load(
        cls, directory: epath.PathLike, config: DecoderConfig, *, layout: str = "listed"
    ) -> "Lora":
        """Read adapters from a directory that `save` or PEFT wrote, one for each map in it.

        Args:
            directory: Folder with `adapter_config.json` and `adapter_model.safetensors`.
            layout: `'listed'` or `'stacked'`, as in the model.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: Adapters of another kind, or for a model of other sizes.
        """
        # Imported here because it imports this class.
        from logitjax.models._peft import load_peft

        lora = load_peft(directory, config)
        return lora if layout == "listed" else lora.with_layout(config, layout)

    def merged_into(self, model: "Decoder") -> "Decoder":
        """The model with the adapters, of its layout, in its kernels: `kernel + a @ b * scale`.

        The adapted kernels are new arrays; all others are shared with the given model.

        >>> import numpy as np
        >>> from logitjax.models import load_model
        >>> model = load_model("tiny")
        >>> lora = jax.jit(lambda key: Lora.init(model.config, 2, key=key))(jax.random.key(0))
        >>> merged = nnx.jit(lambda lora, model: lora.merged_into(model))(lora, model)
        >>> logits = nnx.jit(lambda model, tokens: model(tokens))
        >>> tokens = np.array([[1, 2]])
        >>> np.array_equal(logits(merged, tokens), logits(model, tokens))
        True
        """
        out = twin(model)
        for segment, members in zip(out.segments, self.layers, strict=True):
            for layer, member in zip(segment.layers, members, strict=True):
                for name, adapter in member.items():
                    owner = layer.mlp if hasattr(layer.mlp, name) else layer.attention
                    linear = getattr(owner, name)
                    stored = linear.kernel[...]
                    update = adapter["a"].astype(jnp.float32) @ adapter["b"].astype(jnp.float32)
                    update = update * self.scale
                    if isinstance(stored, Codes):
                        linear.kernel = nnx.Param(stored.again(stored.dense() + update))
                    else:
                        linear.kernel[...] = (stored + update).astype(stored.dtype)
        return out


def _sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    hidden, wide = config.hidden_size, config.intermediate_size
    inner = config.num_heads * config.head_dim
    narrow = config.num_kv_heads * config.head_dim
    sizes = {"query": (hidden, inner), "output": (inner, hidden)}
    sizes |= dict.fromkeys(("key", "value"), (hidden, narrow))
    if config.num_experts:
        return sizes
    sizes |= dict.fromkeys(("gate", "up") if config.gated_mlp else ("up",), (hidden, wide))
    return sizes | {"down": (wide, hidden)}


def scaled_layers(lora: Lora) -> tuple:
    """The adapters with the scale folded into `a`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * lora.scale if path[-1].key == "a" else leaf, lora.layers
    )


def linear_map(inner: int, outer: int, **options: Any) -> nnx.Linear:
    """A map that `project` may adapt, as these families' models start."""
    return nnx.Linear(inner, outer, kernel_init=nnx.initializers.normal(0.02), **options)


def project(linear: Any, x: jax.Array, lora: Any, name: str, rows: jax.Array | None) -> jax.Array:
    """`linear(x)` plus its adapter, on the batch rows where `rows` is true (None: all)."""
    y = linear(x)
    if lora is None or name not in lora:
        return y
    a, b = (lora[name][n].astype(y.dtype) for n in ("a", "b"))
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    # By the layer's own product, which on a CPU may be faster.
    update = linear.dot_general(linear.dot_general(x, a, contract), b, contract)
    if rows is not None:
        update = jnp.where(rows.reshape(-1, *(1,) * (update.ndim - 1)), update, 0)
    return y + update

"""A decoder-only transformer in flax.nnx: embedding, segments of layers, norm, injected head."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Float, Int

from logitjax import ops
from logitjax.heads import LinearHead, TiedHead
from logitjax.losses import Head
from logitjax.models._attention import Attention, Implementation, Norm, make_context
from logitjax.models._cache import Cache, kind_name
from logitjax.models._config import DecoderConfig, SegmentSpec
from logitjax.models._experts import MoE
from logitjax.models._lora import Lora, linear_map, project, scaled_layers
from logitjax.ops import Array

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
_POLICIES = {
    # Least memory: everything is computed again.
    "full": jax.checkpoint_policies.nothing_saveable,
    # All except attention's.
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class MLP(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        kinds: Any = {"dtype": dtype, "param_dtype": param_dtype, "use_bias": config.mlp_bias}
        linear = functools.partial(linear_map, rngs=rngs, **kinds)
        self.activation = config.activation
        self.gated = config.gated_mlp
        if config.gated_mlp:
            self.gate = linear(config.hidden_size, config.intermediate_size)
        self.up = linear(config.hidden_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array, lora: Any, rows: jax.Array | None) -> jax.Array:
        activation = _ACTIVATIONS[self.activation]
        up = project(self.up, x, lora, "up", rows)
        if self.gated:
            inner = activation(project(self.gate, x, lora, "gate", rows)) * up
        else:
            inner = activation(up)
        return project(self.down, inner, lora, "down", rows)


class Block(nnx.Module):
    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        def norm() -> Norm:
            return Norm(config, config.hidden_size, param_dtype=param_dtype)

        self.pre_norms, self.post_norms = config.pre_norms, config.post_norms
        self.residual_scale = config.residual_scale
        if config.pre_norms:
            self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        kinds: Any = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype}
        if config.num_experts:
            self.mlp = MoE(config, _ACTIVATIONS[config.activation], **kinds)
        else:
            self.mlp = MLP(config, **kinds)
        if config.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()

    def __call__(self, x: jax.Array, context: Any, cache: Any, lora: Any) -> tuple[jax.Array, Any]:
        normed = self.attention_norm(x) if self.pre_norms else x
        update, cache = self.attention(normed, context, cache, lora)
        x = self._add(x, self.attention_post_norm(update) if self.post_norms else update)
        update = self.mlp(self.mlp_norm(x) if self.pre_norms else x, lora, context.lora_rows)
        return self._add(x, self.mlp_post_norm(update) if self.post_norms else update), cache

    def _add(self, x: jax.Array, update: jax.Array) -> jax.Array:
        scale = self.residual_scale
        return x + (update if scale == 1.0 else update * jnp.asarray(scale, update.dtype))


def _over_batch(x: jax.Array) -> jax.Array:
    """Keep activations split over batch and time if a mesh is known, as in a `TrainStep`."""
    # Otherwise the compiler may split them like the embedding and sum each matmul over devices.
    names = ops.sharding.MeshAxes.current()
    rows = ops.mesh.auto_axes(names.rows, x.shape[0])
    time = ops.mesh.auto_axes(names.sequence, x.shape[1])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rows, time)) if rows or time else x


def _look_up(table: Any, ids: Array, mode: str | None = None) -> jax.Array:
    """Rows of a table, in a form that compiles where `shard_map` has taken part of the mesh."""
    if isinstance(table, ops.Codes):
        return table.rows(jnp.asarray(ids))
    # XLA crashes at a gather from a split table there, so each device looks up all ids.
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {name for name, kind in kinds if kind == AxisType.Auto}
    take = functools.partial(jnp.take, axis=0, mode=mode)
    if not free or AxisType.Manual not in mesh.axis_types:
        return take(table, ids)
    axes = ops.mesh.auto_axes(("fsdp",), table.shape[1])
    return jax.shard_map(
        take,
        in_specs=(PartitionSpec(None, axes), PartitionSpec()),
        out_specs=PartitionSpec(None, None, axes),
        axis_names=free,
    )(table, ids)


class Segment(nnx.Module):
    """Layers that repeat one pattern; `layers` has one stacked block per pattern entry, or all."""

    def __init__(
        self,
        config: DecoderConfig,
        spec: SegmentSpec,
        *,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
        layout: str,
    ):
        def block(key: jax.Array) -> Block:
            return Block(config, rngs=nnx.Rngs(key), dtype=dtype, param_dtype=param_dtype)

        self.spec = spec
        if layout == "listed":
            blocks = [block(rngs.params()) for _ in range(spec.num_layers)]
        else:
            # Initialised under one vmap: one layer at a time would be one program each.
            graphdef = nnx.graphdef(nnx.eval_shape(lambda: block(jax.random.key(0))))
            blocks = []
            for _ in spec.pattern:
                keys = jax.random.split(rngs.params(), spec.repeats)
                blocks.append(nnx.merge(graphdef, jax.vmap(lambda k: nnx.state(block(k)))(keys)))
        self.layers = nnx.List(blocks)

    def __call__(
        self, x: jax.Array, contexts: dict, caches: Any, loras: Any, *, layout: str, remat: str,
        entering: list | None,
    ) -> tuple[jax.Array, tuple | None]:  # fmt: skip
        """`caches`: one (keys, values) pair per member of `layers`, or None."""
        pattern = self.spec.pattern
        count = len(self.layers)
        split = [nnx.split(layer) for layer in self.layers]
        graphdefs = [s[0] for s in split]
        states = tuple(s[1] for s in split)
        caches_in = (None,) * count if caches is None else caches
        loras_in = (None,) * count if loras is None else loras

        def layer(j: int) -> Callable:
            # Listed layers repeat the pattern.
            context = contexts[pattern[j % len(pattern)]]

            def run(state: Any, x: jax.Array, cache: Any, lora: Any) -> tuple[jax.Array, Any]:
                return nnx.merge(graphdefs[j], state)(x, context, cache, lora)

            return run if remat == "none" else jax.checkpoint(run, policy=_POLICIES[remat])

        def run_all(x: jax.Array, inputs: tuple) -> tuple[jax.Array, tuple]:
            out = []
            for j, (state, cache, lora) in enumerate(zip(*inputs, strict=True)):
                if entering is not None:
                    entering.append(x)
                x, cache = layer(j)(state, x, cache, lora)
                x = _over_batch(x)
                out.append(cache)
            return x, tuple(out)

        inputs = (states, caches_in, loras_in)
        x, out = run_all(x, inputs) if layout == "listed" else jax.lax.scan(run_all, x, inputs)
        return x, None if caches is None else out


class Decoder(nnx.Module):
    """A decoder whose hidden states and logits are separate calls.

    Parameters (and caches) of the layers are stacked per segment and scanned (`'stacked'`, for
    training) or listed and unrolled (`'listed'`, for decoding); `with_layout` converts.

    Args:
        dtype: compute dtype. Norms, softmax and logits are always float32.
        remat: what the backward pass keeps of a layer: `'none'` recomputes nothing, `'dots'` keeps
            matmul results, `'full'` only keeps the layer's input.
        head: a module `head(hidden, embedding) -> logits` with `as_linear(embedding)`; by default a
            `TiedHead` or `LinearHead` by `config.tie_embeddings`.
        attention: `implementation` of `jax.nn.dot_product_attention`, or `'blocked'`, which forms
            scores a block at a time. By default blocked from 4,096 tokens on, without a cache.

    >>> config = DecoderConfig(vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=2,
    ...                        num_heads=2, num_kv_heads=1, head_dim=4)
    >>> model = nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(0)))()
    >>> logits = nnx.jit(lambda model, tokens: model.logits(model.hidden_states(tokens)[0]))
    >>> logits(model, jnp.array([[1, 2, 3]])).shape
    (1, 3, 11)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        layout: str = "stacked",
        remat: str = "none",
        head: Any = None,
        attention: Implementation = None,
    ):
        if layout not in ("stacked", "listed"):
            raise ValueError(f"layout: expected 'stacked' or 'listed', got {layout!r}")
        if remat not in ("none", "dots", "full"):
            raise ValueError(f"remat: expected 'none', 'dots' or 'full', got {remat!r}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        self.layout: str = layout
        self.remat: str = remat
        self.attention: Implementation = attention
        # GPT-2's initialisation.
        normal = nnx.initializers.normal(0.02)
        self.embedding = nnx.Param(
            normal(rngs.params(), (config.vocab_size, config.hidden_size), param_dtype)
        )
        if config.position == "learned":
            self.position_embedding = nnx.Param(
                normal(rngs.params(), (config.max_length, config.hidden_size), param_dtype)
            )
        kinds: Any = {"rngs": rngs, "dtype": self.dtype, "param_dtype": self.param_dtype}
        self.segments = nnx.List(
            [Segment(config, spec, layout=layout, **kinds) for spec in config.segments]
        )
        # The divisor of the logits divides the hidden states, so every head and loss sees it.
        self.final_norm = Norm(
            config, config.hidden_size, param_dtype=param_dtype, divisor=config.logits_divisor
        )
        if head is None and config.tie_embeddings:
            head = TiedHead(dtype=self.dtype)
        elif head is None:
            head = LinearHead(config.hidden_size, config.vocab_size, **kinds)
        self.head = head

    def embed(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "batch time"]
    ) -> Float[jax.Array, "batch time hidden"]:
        """Input embeddings, scaled as the family requires, plus learned positions, if any."""
        x = _look_up(self.embedding[...], tokens).astype(self.dtype)
        # Gemma's factor: the square root of the width.
        if self.config.embedding_scale != 1.0:
            x = x * jnp.asarray(self.config.embedding_scale, self.dtype)
        if self.config.position == "learned":
            table = self.position_embedding[...]
            # Padding is at -1; the embedding it reads here is masked.
            x += _look_up(table, jnp.maximum(positions, 0), mode="clip").astype(self.dtype)
        return _over_batch(x)

    def hidden_states(
        self,
        tokens: Int[Array, "batch time"],
        *,
        positions: Int[Array, "batch time"] | None = None,
        segment_ids: Int[Array, "batch time"] | None = None,
        cache: Cache | None = None,
        lora: Lora | None = None,
        lora_rows: Array | None = None,
        entering: list[jax.Array] | None = None,
    ) -> tuple[Float[jax.Array, "batch time hidden"], Cache | None]:
        """Normed hidden states in the compute dtype, and the cache after these tokens, if any.

        Args:
            positions: position of each token, -1 for padding, which is never attended to. By
                default counted from 0 (within each segment) or from `cache.length`.
            segment_ids: packed documents; tokens attend only within equal ids. Not with a cache.
            cache: cache from `init_cache`, in the model's layout.
            lora: adapters in the model's layout.
            lora_rows: bool `[batch]`, the rows that use the adapters; by default all.
            entering: gets the input of each layer and the last one's output, of a listed model.

        Raises:
            ValueError: for `segment_ids` together with a cache, more new tokens than slots, or
                `entering` with stacked layers.
        """
        if entering is not None and self.layout != "listed":
            raise ValueError("model: expected listed layers, use with_layout(model, 'listed')")
        if cache is not None and segment_ids is not None:
            raise ValueError("segment_ids: packed documents cannot be used with a cache")
        padded = positions is not None
        if positions is None:
            positions = _default_positions(jnp.asarray(tokens), segment_ids, cache)
        contexts, stored = self._contexts(
            positions, segment_ids=segment_ids, padded=padded, cache=cache, lora_rows=lora_rows
        )
        x = self.embed(tokens, positions)
        adapters = None if lora is None else scaled_layers(lora)
        keys, values = [], []
        for i, segment in enumerate(self.segments):
            pairs = None if cache is None else tuple(zip(cache.keys[i], cache.values[i]))
            x, pairs = segment(
                x,
                contexts,
                pairs,
                None if adapters is None else adapters[i],
                layout=self.layout,
                remat=self.remat,
                entering=entering,
            )
            if pairs is not None:
                keys.append(tuple(k for k, _ in pairs))
                values.append(tuple(v for _, v in pairs))
        if cache is not None:
            # Padding is at -1.
            length = jnp.maximum(cache.length, positions.max(axis=1) + 1)
            cache = Cache(keys=tuple(keys), values=tuple(values), positions=stored, length=length)
        if entering is not None:
            entering.append(x)
        return self.final_norm(x), cache

    def run_layers(
        self,
        x: Float[Array, "batch time hidden"],
        positions: Int[Array, "batch time"],
        layers: range,
        cache: Cache,
        *,
        lora: Lora | None = None,
        lora_rows: Array | None = None,
    ) -> tuple[Float[jax.Array, "batch time hidden"], Cache]:
        """Activations after some layers, and the new cache, for steps that regroup rows in between.

        After all layers, `final_norm(x)` gives the hidden states of `hidden_states`.

        Args:
            x: activations before these layers; those of `embed` before the first.
            positions: position of each token, -1 for padding.
            layers: indices of the layers, of a listed model; ValueError for a stacked one.
            cache: keys and values of these layers only, as one segment; positions of all windows.
            lora: adapters of these layers, listed.
            lora_rows: bool `[batch]`, the rows that use the adapters; by default all.
        """
        if self.layout != "listed":
            raise ValueError("model: expected listed layers, use with_layout(model, 'listed')")
        x = jnp.asarray(x)
        contexts, stored = self._contexts(positions, padded=True, cache=cache, lora_rows=lora_rows)
        members = [layer for segment in self.segments for layer in segment.layers]
        adapters: list[Any] = [None] * len(layers)
        if lora is not None:
            adapters = [member for segment in scaled_layers(lora) for member in segment]
        keys, values = [], []
        before = zip(cache.keys[0], cache.values[0], strict=True)
        for i, adapter, pair in zip(layers, adapters, before, strict=True):
            x, (key, value) = members[i](x, contexts[self.config.layer_kinds[i]], pair, adapter)
            keys.append(key)
            values.append(value)
        length = jnp.maximum(cache.length, positions.max(axis=1) + 1)
        return x, Cache(
            keys=(tuple(keys),), values=(tuple(values),), positions=stored, length=length
        )

    def _contexts(
        self,
        positions: Array,
        *,
        segment_ids: Array | None = None,
        padded: bool,
        cache: Cache | None,
        lora_rows: Array | None,
    ) -> tuple[dict, dict]:
        """Values shared by layers of each kind, and for each window the cache's new positions."""
        contexts, stored = {}, {}
        for kind in dict.fromkeys(self.config.layer_kinds):
            contexts[kind], stored[kind_name(kind[0])] = make_context(
                self.config,
                kind,
                jnp.asarray(positions),
                segment_ids=segment_ids,
                padded=padded,
                cache=cache,
                implementation=self.attention,
                lora_rows=lora_rows,
            )
        return contexts, stored

    def logits(self, hidden: Float[Array, "*batch hidden"]) -> Float[jax.Array, "*batch vocab"]:
        """float32 logits of hidden states, soft-capped if the family requires it."""
        logits = self.head(hidden, self.embedding[...])
        cap = self.config.logits_softcap
        return logits if cap is None else ops.soft_cap(logits, cap)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        *,
        positions: Int[Array, "batch time"] | None = None,
        segment_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[jax.Array, "batch time vocab"]:
        """Logits of whole sequences."""
        hidden, _ = self.hidden_states(tokens, positions=positions, segment_ids=segment_ids)
        return self.logits(hidden)

    def head_of(self) -> Head:
        """The output head with the model's soft cap, for losses that start from hidden states.

        Raises:
            ValueError: apart from that cap, the logits are not linear in the hidden states.

        >>> from logitjax.models import load_model
        >>> load_model("tiny").head_of().rows.shape
        (257, 32)
        """
        head = self.head.as_linear(self.embedding[...])
        return dataclasses.replace(head, soft_cap=self.config.logits_softcap)

    def with_head(self, head: nnx.Module) -> "Decoder":
        """The same decoder with shared parameters, another head, and no soft cap of its own."""
        graphdef, state = nnx.split(self)
        new = nnx.merge(graphdef, state)
        new.head = head
        # A cap belongs to the head that the model was trained with.
        if new.config.logits_softcap is not None:
            new.config = dataclasses.replace(new.config, logits_softcap=None)
        return new

    def init_cache(self, batch: int, max_length: int) -> Cache:
        """An empty cache in this model's layout and compute dtype."""
        return Cache.init(self.config, batch, max_length, self.dtype, layout=self.layout)


def _default_positions(tokens: Array, segment_ids: Array | None, cache: Cache | None) -> jax.Array:
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if cache is not None:
        return index + cache.length[:, None]
    if segment_ids is None:
        return index
    ids = jnp.asarray(segment_ids)
    starts = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)

"""Checks of a family of decoders: exports load unchanged, and steps equal whole sequences."""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from logitjax import models
from logitjax.storage import require
from logitjax.testing._properties import attempt, equal, fail, selected

# Fields of which a GGUF file says less than a config.json, or in another form.
_UNSAID = ("windows", "query_scale", "rope_scaling", "rope_local_theta", "segment_boundaries")
# Files first, because their failures make logits meaningless; then by cost.
_PROPERTIES = ("export", "head_dim", "steps", "segments", "gguf")
# Padding before two texts that share a row.
_PADDING = 3


def check_family(
    family: models.Family,
    config: Mapping[str, Any] | os.PathLike,
    *,
    tokens: Any = None,
    skip: Collection[str] = (),
    seed: int = 0,
) -> np.ndarray:
    """Check that models of a family are exported and loaded unchanged, and compute consistently.

    Properties, by the names that `skip` takes:

    - `export`: An exported model loads with the same configuration and the same parameters.
    - `head_dim`: A head width that does not follow from the sizes is exported as `free_head_dim`
      says.
    - `steps`: Steps through a cache give the logits of the whole sequence.
    - `segments`: Texts that share a row, with padding, give the same logits as alone.
    - `gguf`: A GGUF file of the model loads with the same parameters and, as far as metadata go,
      the same configuration; its names are those of the `gguf` package for the architecture.

    One program is compiled. With longrope rotations depend on the length so far, so `steps` and
    `segments` only hold within the original length and are skipped for more tokens.

    Args:
        family: The family, which `models.register_family` registers.
        config: A config.json of a small model, which gets random weights; or the directory of a
            checkpoint, for example from another program.
        tokens: `[2, time]`, at least 12 each; random by default.
        skip: Properties to skip.
        seed: Seed of weights and tokens.

    Returns:
        Logits `[2, time, vocab]`, for comparison with another program.

    Raises:
        AssertionError: The first property that does not hold, in one line.

    >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    ...              num_attention_heads=2)
    >>> check_family(models.register_family("llama"), sizes).shape
    (2, 16, 64)
    """
    properties, rng = selected(_PROPERTIES, skip), np.random.default_rng(seed)
    models.register_family(family)
    if isinstance(config, Mapping):
        entries = {"model_type": family.name, **config}
        model = random_decoder(attempt("config", models.config_from_hf, entries), rng)
    else:
        graphdef, state = nnx.split(attempt("config", models.load_model, os.fspath(config)))
        # On the host, where slices need no programs.
        model = nnx.merge(graphdef, jax.device_get(nnx.to_pure_dict(state)))
    if tokens is None:
        tokens = rng.integers(model.config.vocab_size, size=(2, 16), dtype=np.int32)
    with tempfile.TemporaryDirectory() as folder:
        directory = epath.Path(folder)
        if "export" in properties:
            attempt("export", models.save_pretrained, model, None, directory)
            again = attempt("export", models.load_model, folder)
            _same_config("export", again, model)
            _same_params("export", again, model, atol=0.0)
        if "head_dim" in properties:
            _check_head_dim(model, directory)
        if "gguf" in properties and family.gguf is not None:
            write_gguf(model, directory / "model.gguf")
            again = attempt("gguf", models.load_model, str(directory / "model.gguf"))
            _same_config("gguf", again, model, _UNSAID)
            # 1 + w - 1 in float32 is not exactly w.
            _same_params("gguf", again, model, atol=1e-6)
            _check_names(family, model)
    logits, stepped, packed = map(np.asarray, _forward(*nnx.split(model), tokens))
    scaling, atol = model.config.rope_scaling, 1e-5 * float(np.abs(logits).max())
    if (
        scaling is None
        or scaling.kind != "longrope"
        or tokens.shape[1] < scaling.original_max_length
    ):
        if "steps" in properties:
            equal("steps", "logits", stepped, logits, rtol=0.0, atol=atol)
        if "segments" in properties:
            half = tokens.shape[1] // 2
            alone = logits[:, :half].reshape(packed.shape)
            equal("segments", "logits", packed, alone, rtol=0.0, atol=atol)
    return logits


def random_decoder(config: models.DecoderConfig, rng: np.random.Generator) -> models.Decoder:
    """Make a decoder whose weights all differ, norms and biases too, without a program."""
    make = lambda: models.Decoder(config, rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(make))

    def draw(path: Any, leaf: Any) -> np.ndarray:
        # Small, so that softmaxes remain far from one-hot.
        values = rng.normal(size=leaf.shape) * 0.12
        scale = "scale" in jax.tree_util.keystr(path)
        return (values + (1.0 - config.norm_offset) * scale).astype(leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(state)))


@functools.partial(jax.jit, static_argnums=0)
def _forward(graphdef: Any, state: Any, tokens: Any) -> tuple[Any, Any, Any]:
    """Logits of whole sequences, of the same sequences in steps, and of their halves in one row."""
    model = nnx.merge(graphdef, state)
    count, half = tokens.shape[1], tokens.shape[1] // 2
    # A prompt in two pieces, then single steps; some slots remain empty.
    cache, pieces = model.init_cache(2, count + 12), []
    for piece in (tokens[:, : half - 2], tokens[:, half - 2 : half]):
        hidden, cache = model.hidden_states(piece, cache=cache)
        pieces.append(hidden)

    def step(cache: Any, token: Any) -> tuple[Any, Any]:
        hidden, cache = model.hidden_states(token[:, None], cache=cache)
        return cache, hidden[:, 0]

    _, rest = jax.lax.scan(step, cache, tokens[:, half:].T)
    stepped = model.logits(jnp.concatenate([*pieces, rest.swapaxes(0, 1)], axis=1))
    row = jnp.concatenate([jnp.zeros(_PADDING, jnp.int32), tokens[:, :half].reshape(-1)])
    ids = np.repeat([0, 1, 2], [_PADDING, half, half])
    positions = np.concatenate([np.full(_PADDING, -1), np.arange(half), np.arange(half)])
    packed = model(row[None], positions=positions[None], segment_ids=ids[None])
    return model(tokens), stepped, packed[0, _PADDING:]


def _same_config(
    name: str, model: models.Decoder, expected: models.Decoder, unsaid: Collection[str] = ()
) -> None:
    for field in dataclasses.fields(expected.config):
        value, other = (getattr(m.config, field.name) for m in (model, expected))
        if isinstance(other, float) and isinstance(value, float) and unsaid:
            # Metadata hold float32 only.
            value, other = np.float32(value), np.float32(other)
        if field.name not in unsaid and value != other:
            fail(name, field.name, f"expected {other!r}, got {value!r}")


def _same_params(
    name: str, model: models.Decoder, expected: models.Decoder, *, atol: float
) -> None:
    # By layer, because segments depend on windows, of which a file may say less.
    for (layer, arrays), (_, other) in zip(_modules(model), _modules(expected), strict=True):
        for module, leaves in other.items():
            for leaf, values in leaves.items():
                subject = f"{module}.{leaf}" + ("" if layer is None else f" of layer {layer}")
                got = arrays.get(module, {}).get(leaf, np.zeros(()))
                equal(name, subject, got, values, rtol=0.0, atol=atol)


def _check_head_dim(model: models.Decoder, directory: epath.Path) -> None:
    config = dataclasses.replace(model.config, head_dim=model.config.head_dim + 2)
    other = random_decoder(config, np.random.default_rng(0))
    free = model.config.traits.free_head_dim
    try:
        models.save_pretrained(other, None, directory / "head_dim")
    except ValueError as error:
        if free:
            fail("head_dim", "free_head_dim", f"expected an export, got {error}")
    else:
        if not free:
            fail("head_dim", "free_head_dim", "expected False to be a ValueError, got an export")


def _modules(model: models.Decoder) -> Iterator[tuple[int | None, dict[str, dict[str, Any]]]]:
    """Yield arrays by module and leaf, first those outside layers, then those of each layer."""
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    trees = [{k: v for k, v in params.items() if k != "segments"}]
    for spec, segment in zip(model.config.segments, params["segments"].values(), strict=True):
        layers, period = segment["layers"], len(spec.pattern)
        trees += [
            jax.tree.map(lambda x, row=n // period: x[row], layers[n % period])
            for n in range(spec.num_layers)
        ]
    for i, tree in enumerate(trees):
        modules: dict[str, dict[str, Any]] = {}
        for path, leaf in jax.tree.leaves_with_path(tree):
            *names, last = (str(key.key) for key in path)
            modules.setdefault(".".join(names or [last]), {})[last] = leaf
        yield (i - 1 if i else None), modules


def write_gguf(model: models.Decoder, path: os.PathLike) -> None:
    """Write a GGUF file with the metadata and tensors of llama.cpp's converter."""
    config, family = model.config, model.config.traits
    architecture = str(family.gguf).partition("+")[0]
    writer = require("gguf", extra="models").GGUFWriter(os.fspath(path), architecture)
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.rope_dim)
    layer_norm = config.norm == "layer"
    (writer.add_layer_norm_eps if layer_norm else writer.add_layer_norm_rms_eps)(config.norm_eps)
    windows = [window for window in config.layer_windows if window is not None]
    for add, value in (
        (writer.add_attn_logit_softcapping, config.attention_softcap),
        (writer.add_final_logit_softcapping, config.logits_softcap),
        (writer.add_sliding_window, next(iter(windows), None)),
        (writer.add_attention_scale, config.query_scale),
        (writer.add_embedding_scale, config.embedding_scale),
        (writer.add_residual_scale, config.residual_scale),
        (writer.add_logit_scale, config.logits_divisor),
        (writer.add_expert_count, config.num_experts or None),
        (writer.add_expert_used_count, config.experts_per_token or None),
        (writer.add_expert_feed_forward_length, config.expert_size or None),
        (writer.add_bos_token_id, config.bos_id),
        (writer.add_eos_token_id, next(iter(config.eos_ids), None)),
        (writer.add_pad_token_id, config.pad_id),
    ):
        if value is not None:
            add(value)
    for i, modules in _modules(model):
        tensors: dict[str, list[np.ndarray]] = {}
        for module, name in family.gguf_weights.items():
            for leaf, values in modules.get(module, {}).items():
                kind = "bias" if leaf == "bias" else "weight"
                stored = _stored(config, module, leaf, values)
                tensors.setdefault(f"{name}.{kind}".replace("*", str(i)), []).append(stored)
        for name, parts in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(np.concatenate(parts)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stored(config: models.DecoderConfig, module: str, leaf: str, values: np.ndarray) -> np.ndarray:
    """Convert an array to the form that llama.cpp's converter stores."""
    values = values.swapaxes(-1, -2) if leaf == "kernel" else values
    if leaf == "scale":
        # Gemma's files hold 1 + w.
        values = values + np.float32(config.norm_offset)
    heads = {"attention.query": config.num_heads, "attention.key": config.num_kv_heads}
    if config.traits.gguf_interleaved and module in heads:
        # llama.cpp rotates pairs of neighbours, Hugging Face pairs across halves.
        rows = values.reshape(heads[module], -1, *values.shape[1:]).copy()
        turned = rows[:, : config.rope_dim]
        halves = turned.reshape(len(rows), 2, -1, *values.shape[1:])
        turned[:] = halves.swapaxes(1, 2).reshape(turned.shape)
        values = rows.reshape(values.shape)
    return values


def _check_names(family: models.Family, model: models.Decoder) -> None:
    """Compare names with the `gguf` package, if it has the architecture."""
    gguf = require("gguf", extra="models")
    architecture = str(family.gguf).partition("+")[0]
    kinds = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture]
    for kind in kinds:
        existing = gguf.get_tensor_name_map(kind, 1)
        for _, modules in list(_modules(model))[:2]:
            for module in modules:
                name, present = family.weights[module], family.gguf_weights[module]
                expected = existing.get_name(name.replace("*", "0"))
                if expected is not None and expected != present.replace("*", "0"):
                    fail("gguf", f"gguf_weights[{module!r}]", f"expected {expected}, got {present}")

"""Temporaries of a distillation step inside tunix and MaxText, compiled for absent v5p chips.

KL to a teacher and cross-entropy, value and gradient, with our strategy and with the trainer's own
(tunix's ``LogitStrategy``, MaxText's ``CombinedDistillationStrategy``). The model has Gemma 3 1B's
shape: 26 layers of 1,152, a tied vocabulary of 262,144, rematerialised layer by layer on both
sides; a batch has 8 rows of 2,048 tokens. Nothing runs. It needs the trainers (docs/maxtext.md says
how they install) and the compiler of the extra ``plan``; what is missing is named and left out.

``--only=tunix`` and ``--only=maxtext`` compile inside one of them; ``maxtext_split`` is its batch
over four chips, two rows each, where each chip holds the whole model, and ``maxtext_fsdp`` with the
model split over them. The smoke scale compiles a toy for the CPU.
"""

import contextlib
import dataclasses
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.plan import chips
from experiments.shared import suite
from logitjax.distillation import Objective, Teacher, terms

TEMPERATURE, ALPHA, ROWS = 2.0, 0.5, 8
OBJECTIVE = Objective(
    terms=((terms.FullKL(temperature=TEMPERATURE), ALPHA), (terms.SFT(), 1 - ALPHA))
)
# The trainer, its chips, and the axis of its mesh that they are split over.
PARTS = {
    "tunix": ("tunix", "v5p:1x1x1", "data"),
    "maxtext": ("maxtext", "v5p:1x1x1", "data"),
    "maxtext_split": ("maxtext", "v5p:2x2x1", "data"),
    "maxtext_fsdp": ("maxtext", "v5p:2x2x1", "fsdp"),
}
# MaxText's name for a slice of four chips.
_SLICES = {4: dict(compile_topology="v5p-8", compile_topology_num_slices=1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes that are compiled; Gemma 3 1B's own numbers."""

    layers: int = 26
    width: int = 1152
    hidden: int = 6912
    heads: int = 4
    head_dim: int = 256
    vocab: int = 262_144
    length: int = 2048


SMOKE = Size(layers=1, width=64, hidden=128, heads=2, head_dim=32, vocab=32_768, length=128)
Compile = Callable[..., Any]


def _tunix(size: Size, devices: Any, axis: str) -> Iterator[Any]:
    from tunix.distillation.strategies import logit
    from tunix.models.gemma3 import model as gemma3
    from tunix.sft import utils

    from logitjax.integrations import tunix

    config = dataclasses.replace(
        gemma3.ModelConfig.gemma3_1b_it(),
        num_layers=size.layers,
        num_embed=size.vocab,
        embed_dim=size.width,
        hidden_dim=size.hidden,
        num_heads=size.heads,
        head_dim=size.head_dim,
        remat_config=gemma3.RematConfig.BLOCK,
    )
    mesh = Mesh(devices, (axis,), axis_types=(AxisType.Auto,))

    def array(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))

    graphdef, state = nnx.split(nnx.eval_shape(lambda: gemma3.Gemma3(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda x: array(x.shape, x.dtype), state)
    inputs = {
        "input_tokens": array((ROWS, size.length), jnp.int32),
        "input_mask": array((ROWS, size.length), jnp.bool_),
    }

    def forward(model: Any, input_tokens: Any, input_mask: Any) -> Any:
        positions = utils.build_positions_from_mask(input_mask)
        return model(input_tokens, positions, None, utils.make_causal_attn_mask(input_mask))[0][
            :, :-1
        ]

    def labels(input_tokens: Any, input_mask: Any) -> Any:
        return jax.nn.one_hot(input_tokens[:, 1:], size.vocab)

    def ours(state: Any, inputs: Any, hidden: Any, teacher_head: Any) -> Any:
        strategy = tunix.ObjectiveStrategy(OBJECTIVE)

        def loss(state: Any) -> Any:
            model = nnx.merge(graphdef, state)
            strategy._teacher_head = tunix.head_of(model)
            model.teacher_head = tunix.TeacherHead(teacher_head)
            return strategy.get_train_loss(model, [Teacher(hidden=hidden)], inputs)[0]

        return jax.value_and_grad(loss)(state)

    def dense_step(state: Any, inputs: Any, logits: Any) -> Any:
        strategy = logit.LogitStrategy(forward, forward, labels, TEMPERATURE, ALPHA)

        def loss(state: Any) -> Any:
            return strategy.get_train_loss(nnx.merge(graphdef, state), logits, inputs)[0]

        return jax.value_and_grad(loss)(state)

    # The teacher runs before the step, and its output is an argument.
    hidden, logits = (
        array((ROWS, size.length - 1, n), jnp.bfloat16) for n in (size.width, size.vocab)
    )
    platform = (devices.flat[0].platform,)
    with jax.set_mesh(mesh):
        table = array((size.vocab, size.width), jnp.bfloat16)
        for step, more in ((ours, (hidden, table)), (dense_step, (logits,))):
            yield (
                jax.jit(step)
                .trace(state, inputs, *more)
                .lower(lowering_platforms=platform)
                .compile()
            )


def _maxtext(size: Size, devices: Any, axis: str) -> Iterator[Any]:
    import maxtext
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.post_train.distillation import distillation_utils, train_distill
    from maxtext.utils import model_creation_utils

    from logitjax.integrations.maxtext import ObjectiveStrategy

    options = dict(
        run_name="t",
        base_output_directory=tempfile.mkdtemp(),
        decoder_block="llama2",
        base_emb_dim=size.width,
        base_num_query_heads=size.heads,
        base_num_kv_heads=1,
        head_dim=size.head_dim,
        base_mlp_dim=size.hidden,
        mlp_activations=["gelu", "linear"],
        base_num_decoder_layers=size.layers,
        vocab_size=size.vocab,
        logits_via_embedding=True,
        normalize_embedding_logits=False,
        max_target_length=size.length,
        per_device_batch_size=ROWS // len(devices),
        dtype="bfloat16",
        remat_policy="full",
        attention="dot_product",
        enable_checkpointing=False,
        hardware="cpu",
        skip_jax_distributed_system=True,
    ) | _SLICES.get(len(devices), {})

    def compiled(settings: Any, strategy: Any) -> Any:
        sides = [len(devices) if name == axis else 1 for name in settings.mesh_axes]
        mesh = Mesh(devices.reshape(sides), settings.mesh_axes)
        rows = NamedSharding(mesh, P(axis))
        names = ("input_tokens", "positions", "decoder_segment_ids", "targets")
        batch = {
            name: jax.ShapeDtypeStruct((ROWS, size.length), jnp.int32, sharding=rows)
            for name in (*names, "targets_segmentation")
        }
        with jax.set_mesh(mesh), logical_axis_rules(settings.logical_axis_rules):
            _, model = model_creation_utils.create_nnx_abstract_model(settings, mesh=mesh)
            graphdef, params, rest = nnx.split(model, nnx.Param, ...)

            def read(forward: Any, params: Any, rest: Any, batch: Any) -> Any:
                given = {name: batch[name] for name in names[:3]}
                given |= dict(decoder_target_tokens=batch["targets"], attention_mask=None)
                mask = batch["targets_segmentation"]
                model = nnx.merge(graphdef, params, rest, copy=True)
                return forward(model=model, decoder_target_mask=mask, cache=None, **given)

            def step(params: Any, rest: Any, teacher: Any, batch: Any) -> Any:
                message = read(strategy.teacher_forward_fn, teacher, rest, batch)
                message = jax.lax.stop_gradient(message)

                def loss(params: Any) -> Any:
                    answer = read(strategy.student_forward_fn, params, rest, batch)
                    segments = batch["targets_segmentation"]
                    labels = strategy.create_labels(batch["targets"], targets_segmentation=segments)
                    return strategy.compute_loss(answer, message, labels, step=None)

                return jax.value_and_grad(loss, has_aux=True)(params)

            return jax.jit(step).lower(params, rest, params, batch).compile()

    def configuration(tiles: int) -> Any:
        base = os.path.join(next(iter(maxtext.__path__)), "configs", "base.yml")
        return pyconfig.initialize(["", base], **options, num_vocab_tiling=tiles)

    yield compiled(configuration(2), ObjectiveStrategy(OBJECTIVE))
    config = configuration(1)
    forward = train_distill.create_forward_fn(config)
    stock = distillation_utils.CombinedDistillationStrategy(
        forward, forward, vocab_size=size.vocab, temperature=TEMPERATURE, alpha=ALPHA
    )
    yield compiled(config, stock)


_COMPILED = {"tunix": _tunix, "maxtext": _maxtext}


def run(options: suite.Options) -> suite.Result:
    size = SMOKE if options.smoke else Size()
    rows, bars = [], []
    for part in options.parts(tuple(PARTS)):
        trainer, topology, axis = PARTS[part]
        missing = [name for name in {trainer, "tunix"} if not importlib.util.find_spec(name)]
        if not options.smoke and not importlib.util.find_spec("libtpu"):
            missing.append("libtpu")
        if missing:
            logging.warning("%s: left out, for %s is not installed", part, ", ".join(missing))
            continue
        chip = chips.parse_chip("cpu:1" if options.smoke else topology)
        chips.prepare(chip, "data:1")
        devices = np.array(chips.devices_of(chip))[: 1 if options.smoke else None]
        if options.smoke and part not in _COMPILED:
            continue
        gib = []
        with contextlib.closing(_COMPILED[trainer](size, devices, axis)) as steps:  # pyright: ignore
            for program in steps:
                gib.append(program.memory_analysis().temp_size_in_bytes / 2**30)
                logging.info("%s: %.2f GiB", part, gib[-1])
        row = {"trainer": trainer, "chips": f"{len(devices)} x {chip.name}", "split over": axis}
        row |= {"layers": size.layers, "rows a chip": ROWS // len(devices)}
        row |= {"ours, GiB": gib[0], "theirs, GiB": gib[1], "ours / theirs": gib[0] / gib[1]}
        rows.append(row)
        if part in _COMPILED and not options.smoke:
            bars.append(suite.at_most(f"{part}: temporaries / theirs", gib[0] / gib[1], 0.4))
    return suite.Result(rows=rows, bars=bars)

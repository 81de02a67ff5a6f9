"""Answers of one package to the cases of `conformance`, in an interpreter that has it.

    python tests/rigs/_conformance_peers.py PEER FOLDER

reads `FOLDER/NUMBER.npz` and `.json`, and writes `FOLDER/PEER-NUMBER.npz`: `values`, of every token
or their sum, and the gradients of their weighted sum by both arguments. Nothing of this library is
imported but by `ours`, for an interpreter may have the peer alone.
"""

import contextlib
import functools
import importlib.metadata
import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any


class NotOffered(Exception):
    """A package has no such option."""


def _only(case: Any, *options: str) -> None:
    """Raise `NotOffered` where a case asks for what is none of these options."""
    asked = {
        "soft_cap": case.soft_cap is not None,
        "temperature": case.temperature != 1.0,
        "teacher": case.teacher,
        "masked": case.masked,
        # What is summed over tokens takes no cotangents of theirs.
        "any": case.weights == "any",
        "mixed": case.hidden_type != case.head_type,
        "devices": case.devices > 1,
    }
    if any(asked_for and name not in options for name, asked_for in asked.items()):
        raise NotOffered


def _logits(case: Any, hidden: Any, kernel: Any) -> Any:
    import jax.numpy as jnp

    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    return jnp.where(case.where, logits, -jnp.inf) if case.masked else logits


def _ours(case: Any, hidden: Any, kernel: Any) -> Any:
    from logitjax import losses

    head = losses.Head(kernel, vocab_axis=1, soft_cap=case.soft_cap)
    where = case.where if case.masked else None
    options = dict(temperature=case.temperature, vocab_where=where)
    if case.teacher:
        teacher = losses.Head(case.teacher_head, vocab_axis=1)
        pair = (case.teacher_hidden, teacher)
        values = losses.linear_kl_divergence(hidden, head, *pair, **options)
        return values / case.temperature**2  # Ours is times that.
    return losses.linear_cross_entropy(hidden, head, case.labels, **options)


def _ours_dense(case: Any, hidden: Any, kernel: Any) -> Any:
    import jax.numpy as jnp

    from logitjax import losses

    def logits(hidden: Any, kernel: Any, cap: Any) -> Any:
        logits_of_head = losses.Head(kernel, vocab_axis=1, soft_cap=cap).logits(hidden)
        return jnp.where(case.where, logits_of_head, -jnp.inf) / case.temperature

    student = logits(hidden, kernel, case.soft_cap)
    if case.teacher:
        teacher = logits(case.teacher_hidden, case.teacher_head, None)
        return losses.kl_divergence(student, teacher)
    return losses.cross_entropy(student, case.labels)


def _optax(case: Any, hidden: Any, kernel: Any) -> Any:
    import jax
    import optax

    _only(case, "any", "masked", "teacher", "mixed", "devices")
    logits = _logits(case, hidden, kernel)
    if case.teacher:
        teacher = jax.nn.log_softmax(_logits(case, case.teacher_hidden, case.teacher_head))
        return optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(logits), teacher)
    return optax.softmax_cross_entropy_with_integer_labels(logits, case.labels)


def _tokamax(case: Any, hidden: Any, kernel: Any, implementation: str = "xla") -> Any:
    import tokamax

    _only(case, "any", "mixed", "devices")
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, case.labels, kernel, reduction="none", implementation=implementation
    )


def _tokamax_mosaic(case: Any, hidden: Any, kernel: Any) -> Any:
    """The two kernels for TPUs, interpreted; each is an operation of its own."""
    from tokamax._src.ops.linear_softmax_cross_entropy_loss import pallas_mosaic_tpu as mosaic

    _only(case, "any", "mixed")
    forward = mosaic.PallasMosaicTpuLinearSoftmaxCrossEntropyLoss(bypass_device_check=True)
    backward = mosaic.PallasMosaicTpuLinearSoftmaxCrossEntropyLossVjp(bypass_device_check=True)
    object.__setattr__(forward, "vjp", backward)  # Its own would ask for a TPU.
    return forward(hidden, case.labels, kernel, reduction="none")


def _maxtext(case: Any, hidden: Any, kernel: Any) -> Any:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from maxtext.utils.vocabulary_tiling import vocab_tiling_nnx_loss

    _only(case, "masked", "mixed", "devices")
    if len(case.labels) % 2:
        raise NotOffered  # The tiles divide the number of tokens.
    options = dict(num_vocab_tiling=2, vocab_size=kernel.shape[1], z_loss_multiplier=0.0)
    options |= dict(enable_dropout=False, shard_mode="auto", debug_sharding=False)
    config = types.SimpleNamespace(**options, vocab_tiling_ag_once=False)

    class Model(nnx.Module):
        mesh = jax.sharding.Mesh(jax.devices()[: case.devices], ("tensor",))

        def __init__(self, kernel: Any):
            self.logits_dense = nnx.Param(kernel)

        def logits_from_hidden_states_for_vocab_tiling(self, hidden: Any, *_: Any) -> Any:
            return _logits(case, hidden, self.logits_dense[...])

    segments = jnp.asarray(case.factors != 0, jnp.int32)
    data = {"targets": case.labels[None], "targets_segmentation": segments[None]}
    return vocab_tiling_nnx_loss(Model(kernel), hidden[None], data, config, True)[0]


def _tunix(case: Any, hidden: Any, kernel: Any) -> Any:
    """Its `LogitStrategy`: what counts for nothing has no label."""
    import jax
    import jax.numpy as jnp
    from tunix.distillation.strategies.logit import LogitStrategy

    _only(case, "masked", "teacher", "mixed", "devices", *("temperature",) * case.teacher)
    labels = jax.nn.one_hot(case.labels, kernel.shape[1])
    labels = jnp.where(case.factors[:, None] != 0, labels, 0.0)
    strategy = LogitStrategy(
        *(lambda *_: None,) * 3, temperature=case.temperature, alpha=float(case.teacher)
    )
    student = _logits(case, hidden, kernel)
    teacher = jax.lax.stop_gradient(student)
    if case.teacher:
        teacher = _logits(case, case.teacher_hidden, case.teacher_head)
    mean = strategy.compute_loss(student, teacher, labels)[0]
    # Theirs is times the temperature squared.
    return mean * len(case.labels) / (case.temperature**2 if case.teacher else 1)


def _levanter(case: Any, hidden: Any, kernel: Any, implementation: str = "xla") -> Any:
    from levanter.kernels.pallas import fused_cross_entropy_loss as fused

    _only(case, "any", "soft_cap", "mixed", "devices")
    return fused.fused_cross_entropy_loss_and_logsumexp_penalty(
        hidden,
        case.labels,
        kernel,
        reduction=None,
        logsumexp_weight=None,
        logit_soft_cap=case.soft_cap,
        implementation=implementation,
    )


def _trl(case: Any, hidden: Any, kernel: Any) -> Any:
    import torch
    from trl.kernels import ChunkedLogProbFunction

    _only(case, "any", "soft_cap", "temperature", "masked", "mixed")
    bias = None
    if case.masked:
        bias = torch.where(torch.tensor(case.where), 0.0, -torch.inf)
    labels = torch.tensor(case.labels).long()
    options = (case.temperature, 512, case.soft_cap, 1.0, ())
    return -ChunkedLogProbFunction.apply(hidden, kernel.T, bias, labels, *options)[0]


def _liger(case: Any, hidden: Any, kernel: Any) -> Any:
    """Its chunks in torch; the fused cross-entropy is a kernel for GPUs."""
    import torch
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    _only(case, *("teacher", "temperature", "masked") * case.teacher)
    counts = case.factors != 0
    labels = torch.tensor(case.labels).long().masked_fill(~torch.tensor(counts), -100)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=1.0 - case.teacher,
        weight_soft_loss=float(case.teacher),
        beta=0.0,
        temperature=case.temperature,
        compiled=False,
    )
    bias = torch.where(torch.tensor(case.where), 0.0, -torch.inf) if case.masked else None
    mean = loss(hidden, kernel.T, case.teacher_hidden, case.teacher_head.T, labels, bias, bias)
    return mean * int(counts.sum())


# Of each peer the package that it is from, and its losses.
PEERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "ours": ("logitjax", _ours),
    "ours_dense": ("logitjax", _ours_dense),
    "optax": ("optax", _optax),
    "tokamax_xla": ("tokamax", _tokamax),
    "tokamax_chunked": ("tokamax", functools.partial(_tokamax, implementation="chunked_xla")),
    "tokamax_mosaic": ("tokamax", _tokamax_mosaic),
    "maxtext": ("maxtext", _maxtext),
    "tunix": ("google-tunix", _tunix),
    "levanter": ("marin-levanter", _levanter),
    "levanter_fast": (
        "marin-levanter",
        functools.partial(_levanter, implementation="xla_fast_bwd"),
    ),
    "trl": ("trl", _trl),
    "liger": ("liger-kernel", _liger),
}


def _jax_answer(peer: str, case: Any) -> tuple[Any, Any, Any]:
    import jax
    import jax.numpy as jnp

    hidden = jnp.asarray(case.hidden, case.hidden_type)
    kernel = jnp.asarray(case.kernel, case.head_type)
    given: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        if peer == "tokamax_mosaic":
            from jax.experimental.pallas import tpu as pltpu
            from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
            from tokamax._src import config

            device = AbstractDevice("TPU v5", 2, platform="tpu")
            stack.enter_context(config.cross_compile(True))
            stack.enter_context(
                use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))
            )
            stack.enter_context(pltpu.force_tpu_interpret_mode())
            given["device_assignment"] = tuple(jax.devices()[:1])
        elif case.devices > 1:
            sides = jax.make_mesh((case.devices,), ("tensor",), (jax.sharding.AxisType.Auto,))
            stack.enter_context(jax.set_mesh(sides))
            kernel = jax.device_put(kernel, jax.P(None, "tensor"))

        def weighted(hidden: Any, kernel: Any) -> tuple[Any, Any]:
            values = PEERS[peer][1](case, hidden, kernel)
            weights = case.factors
            total = jnp.where(weights == 0, 0.0, values * weights).sum() if values.ndim else values
            return total, values

        step = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True))
        traced = step.trace(hidden, kernel)
        program = traced.lower(lowering_platforms=("cpu",)).compile(**given)
        (_, values), gradients = program(hidden, kernel)
    return values, *gradients


def _torch_answer(peer: str, case: Any) -> tuple[Any, Any, Any]:
    import torch

    def array(x: Any, name: str) -> Any:
        return torch.tensor(x).to(getattr(torch, name))

    case.teacher_hidden = array(case.teacher_hidden, case.hidden_type)
    case.teacher_head = array(case.teacher_head, case.head_type)
    hidden = array(case.hidden, case.hidden_type).requires_grad_()
    kernel = array(case.kernel, case.head_type).requires_grad_()
    values = PEERS[peer][1](case, hidden, kernel)
    (values * torch.tensor(case.factors)).sum().backward() if values.ndim else values.backward()
    return tuple(x.detach().float().numpy() for x in (values, hidden.grad, kernel.grad))


def _version(peer: str) -> str:
    if not peer.startswith("ours"):
        return importlib.metadata.version(PEERS[peer][0])
    import logitjax

    return logitjax.__version__


def main(peer: str, folder: Path) -> None:
    import numpy as np

    torch = peer in ("trl", "liger")
    version = _version(peer)
    for path in sorted(folder.glob("*.json")):
        case = types.SimpleNamespace(
            **json.loads(path.read_text()), **np.load(path.with_suffix(".npz"))
        )
        answers: dict[str, Any] = {"version": version}
        try:
            outputs = (_torch_answer if torch else _jax_answer)(peer, case)
            names = ("values", "hidden", "kernel")
            answers |= {n: np.asarray(x, np.float64) for n, x in zip(names, outputs, strict=True)}
        except NotOffered:
            pass
        except Exception as error:  # What a package raises is an answer too.
            answers["raised"] = str(error)[-500:]
        np.savez(folder / f"{peer}-{path.stem}.npz", **answers)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Three threads a device, or programs over all of them wait for each other.
    os.environ |= {"JAX_NUM_CPU_DEVICES": "8", "PJRT_NPROC": "24"}
    main(sys.argv[1], Path(sys.argv[2]))

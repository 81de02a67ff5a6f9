"""The arms of the dual-head experiment: which head gets which loss."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.dual_head.config import Config
from logitjax import distillation, heads, losses, vision

Auxiliary = Literal["linear", "mlp"]


class MLP(nnx.Module):
    """Features of flattened inputs: linear layers with ReLU, the last one included."""

    classifier_name = "fc"

    def __init__(self, in_features: int, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        sizes = (in_features, *widths)
        self.layers = nnx.List(
            [heads.torch_linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )
        self.num_features = widths[-1]

    def __call__(self, inputs: Any, *, train: bool = False) -> jax.Array:
        del train
        inputs = inputs.reshape(len(inputs), -1)
        for layer in self.layers:
            inputs = nnx.relu(layer(inputs))
        return inputs


def create_network(
    name: str, num_classes: int, shape: tuple[int, ...], auxiliary: Auxiliary | None, *, key: Any
) -> vision.ImageClassifier:
    """An MLP, `mlp-512-128`, or a network that `ImageClassifier.create` knows.

    The arms of a seed share a trunk.
    """
    head: Any = heads.torch_linear
    if auxiliary is not None:
        head = functools.partial(distillation.DualHead, auxiliary=auxiliary)
    rngs = nnx.Rngs(key)
    if name.startswith("mlp-"):
        widths = tuple(int(part) for part in name.split("-")[1:])
        backbone = MLP(math.prod(shape), widths, rngs=rngs)
        return vision.ImageClassifier(backbone, head(backbone.num_features, num_classes, rngs=rngs))
    return vision.ImageClassifier.create(
        name, num_classes, channels=shape[-1], head=head, rngs=rngs
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the student.

    Attributes:
        logit_loss: `(student, teacher, labels) -> [batch]`, weighted by alpha; or None.
        auxiliary: The second head, which then gets the logit loss.
        aligned: Project the logit loss's gradient in the trunk.
        only: The logit loss is the whole loss: no cross-entropy, and no alpha.
        task: `(student, teacher, labels) -> [batch]` in place of the cross-entropy.
        warms: Alpha grows to its value over the first `config.warmup_epochs`.
    """

    name: str
    logit_loss: Callable[..., Any] | None = None
    auxiliary: Auxiliary | None = None
    aligned: bool = False
    only: bool = False
    task: Callable[..., Any] | None = None
    warms: bool = False

    @property
    def has_alpha(self) -> bool:
        return self.logit_loss is not None and not self.only


def arms(config: Config) -> dict[str, Arm]:
    """Every arm by its name."""

    def logit_loss(student: Any, teacher: Any, labels: Any) -> Any:
        del labels
        return distillation.binary_kl_norm(student, teacher, temperature=2.0)

    def kd(student: Any, teacher: Any, labels: Any, *, temperature: float) -> Any:
        del labels
        return distillation.knowledge_distillation(student, teacher, temperature=temperature)

    def kd_and_labels(student: Any, teacher: Any, labels: Any) -> Any:
        # The weights of mdistiller, which the papers on CIFAR-100 share.
        soft = kd(student, teacher, labels, temperature=config.temperature)
        return 0.1 * losses.cross_entropy(student, labels) + 0.9 * soft

    def dkd(student: Any, teacher: Any, labels: Any) -> Any:
        return distillation.decoupled_knowledge_distillation(
            student, teacher, labels, other_weight=8.0, temperature=config.temperature
        )

    def standardized(student: Any, teacher: Any, labels: Any) -> Any:
        del labels
        pair = (distillation.standardize_logits(x) for x in (student, teacher))
        return distillation.knowledge_distillation(*pair, temperature=2.0)

    def dist(student: Any, teacher: Any, labels: Any) -> Any:
        del labels
        return distillation.dist(student, teacher, temperature=config.temperature)

    items = [
        Arm(name="ce"),
        Arm(name="kd", logit_loss=functools.partial(kd, temperature=config.temperature)),
        # Published values differ by pair of networks: a fair baseline tries temperatures too.
        Arm(name="kd_t1", logit_loss=functools.partial(kd, temperature=1.0)),
        Arm(name="kd_t2", logit_loss=functools.partial(kd, temperature=2.0)),
        Arm(name="dkd", logit_loss=dkd),
        Arm(name="dkd_warm", logit_loss=dkd, warms=True),
        Arm(name="kd_standardized", logit_loss=standardized),
        Arm(name="dist", logit_loss=dist),
        Arm(name="logit_only", logit_loss=logit_loss, only=True),
        Arm(name="single", logit_loss=logit_loss),
        Arm(name="kd_and_logit", logit_loss=logit_loss, task=kd_and_labels),
    ]
    kinds: tuple[Auxiliary, ...] = ("linear", "mlp")
    for auxiliary in kinds:
        made = functools.partial(Arm, logit_loss=logit_loss, auxiliary=auxiliary)
        items += [made(name=f"dual_{auxiliary}")]
        items += [made(name=f"dual_{auxiliary}_aligned", aligned=True)]
    return {arm.name: arm for arm in items}


def outputs(model: Any, inputs: Any, *, train: bool, key: Any = None) -> tuple[Any, Any, Any]:
    """Features, the predicting logits, and the logits that are compared with the teacher's."""
    features = model.features(inputs, train=train)
    logits = model.head(features)
    if isinstance(model.head, distillation.DualHead):
        return features, logits, model.head.auxiliary(features, train=train, key=key)
    return features, logits, logits


def loss_function(
    arm: Arm, graphdef: Any, *, convex: bool = False
) -> Callable[..., tuple[tuple[Any, Any], Any]]:
    """`(params, stats, inputs, labels, teacher, alpha, key, train) -> ((task, logit), stats)`.

    With `convex` their weights are 1 / (1 + alpha) and alpha / (1 + alpha).
    """

    def loss_fn(
        params: Any,
        stats: Any,
        inputs: Any,
        labels: Any,
        teacher: Any,
        alpha: Any,
        key: Any = None,
        *,
        train: bool = True,
    ) -> tuple[tuple[Any, Any], Any]:
        model = nnx.merge(graphdef, params, stats, copy=True)
        _, logits, other = outputs(model, inputs, train=train, key=key)
        if arm.task is not None:
            task = arm.task(logits, teacher, labels).mean()
        else:
            task = losses.cross_entropy(logits, labels).mean()
        logit = jnp.zeros(())
        if arm.logit_loss is not None:
            share = 0.0 if arm.only else 1.0 / (1.0 + alpha) if convex else 1.0
            weight = 1.0 if arm.only else share * alpha
            task, logit = share * task, weight * arm.logit_loss(other, teacher, labels).mean()
        return (task, logit), nnx.state(model, nnx.BatchStat)

    return loss_fn

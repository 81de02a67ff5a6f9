"""The line-up of dynamic fusion: a large model, a healed cut of it, and models tuned from either.

Every model has a folder named after everything it depends on, so that runs share them: checkpoints
while it trains, and its head's inputs on the scored texts, which is all the arms need. Several
processes train a model together; afterwards each holds it whole, and the first one reads with it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from experiments.dynamic_fusion.config import Config
from experiments.dynamic_fusion.data import Questions, Task, Text
from experiments.shared import fit
from experiments.shared.records import remove_directory
from logitjax import distillation, losses, models, processes, storage, training, vq
from logitjax.storage import digest

_LAYERS_ONLY = r"(segments|final_norm)"

#: `(model, batch, *constants)` to the summed loss and the number of positions in it.
Loss = Callable[..., tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Scored:
    """A head's inputs where a label is predicted: `hidden [n, width]`, `labels [n]`."""

    hidden: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model by name, made at its first use."""

    directory: epath.Path
    make: Callable[[], models.Decoder]

    @functools.cached_property
    def model(self) -> models.Decoder:
        return self.make()


class Lineup:
    """All models of a run and their data."""

    def __init__(self, config: Config, root: epath.Path, texts: Mapping[str, Text], task: Task):
        self.config, self.root, self.texts, self.task = config, root, texts, task
        self.mesh = training.make_mesh(config.mesh, partial=True)
        source = digest(config.large, config.dtype, _file_identity(config.large), length=12)
        self.large = Variant(root / f"large-{source}", self._load_large)
        cut = digest(
            source,
            texts["general"].fingerprint,
            config.base or config.small_layers,
            config.train_embeddings,
            config.layout,
            [config.batch_size, config.heal_steps, config.heal_learning_rate],
            length=12,
        )
        self.base = Variant(root / f"base-{cut}", self._load_base)

    def tuned(self, start: str, domain: str, seed: int) -> Variant:
        """`start` (`'base'` for an expert, `'large'` for the ceiling) tuned on a domain."""
        config = self.config
        origin = {"base": self.base, "large": self.large}[start]
        asked = domain == "task"
        data = self.task if asked else self.texts[domain]
        rate = config.learning_rate if start == "base" else config.large_learning_rate
        steps, size = (
            (config.task_steps, config.task_batch)
            if asked
            else (config.tune_steps, config.batch_size)
        )
        name = digest(
            origin.directory.name,
            data.fingerprint,
            steps,
            size,
            rate,
            [config.train_embeddings, config.layout],
            length=12,
        )
        directory = self.root / f"{start}-{domain}-{name}" / f"seed-{seed}"

        def make() -> models.Decoder:
            return self._train(
                directory,
                origin.model,
                task_loss if asked else text_loss,
                lambda step: data.batch(step, seed=seed, size=size),
                steps=steps,
                rate=rate,
                seed=seed,
            )

        return Variant(directory, make)

    def merged(self, weight: float, seed: int) -> Variant:
        """The base with the changes of both experts, times a weight: task arithmetic."""
        experts = [self.tuned("base", domain, seed) for domain in ("domain", "task")]
        name = digest(weight, [str(one.directory.parent.name) for one in experts], length=12)

        def make() -> models.Decoder:
            graphdef, start = nnx.split(self.base.model)
            changed = [nnx.split(expert.model)[1] for expert in experts]
            return nnx.merge(
                graphdef,
                jax.tree.map(lambda x, *new: x + weight * sum(y - x for y in new), start, *changed),
            )

        return Variant(self.root / f"merged-{name}" / f"seed-{seed}", make)

    @functools.cached_property
    def head(self) -> np.ndarray:
        """The large model's head, `[vocab, width]`."""
        return _head_rows(self.large.model)

    def head_of(self, variant: Variant) -> np.ndarray:
        """A model's head: the large model's own array if all share it."""
        if not self.config.base and not self.config.train_embeddings:
            return self.head
        return _array(variant.directory / "head.npy", variant, _head_rows)

    def scored(self, variant: Variant, name: str, split: str) -> Scored:
        """Compute a head's inputs on a split of a text or of the task, once.

        `shown` are the questions of the task after its examples.
        """
        config = self.config
        if name in ("task", "shown"):
            questions = self.task.splits[split]
            examples = self.task.examples if name == "shown" else ()
            key = digest(self.task.fingerprint, *[examples] * bool(examples), length=12)
            directory = variant.directory / f"{name}-{split}-{key}"
            states = functools.partial(
                answer_states, questions=questions, size=config.batch_size, examples=examples
            )
            return Scored(_array(directory / "hidden.npy", variant, states), questions.answers)
        text = self.texts[name]
        tokens = config.validation_tokens if split == "validation" else config.test_tokens
        key = digest(text.fingerprint, tokens, config.batch_size, length=12)
        directory = variant.directory / f"{name}-{split}-{key}"
        if not processes.broadcast_from_first(
            lambda: storage.Manifest(directory, "hidden states").exists()
        ):
            model, rows = variant.model, text.scored(split, config.batch_size)
            options: Any = dict(max_tokens=tokens, source=text.fingerprint)
            processes.run_on_first(
                f"{directory}", lambda: vq.HiddenCache.of(model, rows, directory, **options)
            )
        cache = vq.HiddenCache.open(directory)
        return Scored(np.asarray(cache.hidden), cache.labels)

    def forget(self, variant: Variant) -> None:
        """Drop the checkpoints of a model of which only the head's inputs are still needed."""
        variant.__dict__.pop("model", None)
        remove_directory(variant.directory / "checkpoints")

    def _load_large(self) -> models.Decoder:
        return models.load(self.config.large, dtype=self.config.dtype, layout="listed")[0]

    def _load_base(self) -> models.Decoder:
        config = self.config
        if config.base:
            return models.load(config.base, dtype=config.dtype, layout="listed")[0]
        large = self.large.model
        layers = [i for i in config.small_layers if i < large.config.num_layers]
        teacher, params = models.from_nnx(large)
        return self._train(
            self.base.directory,
            models.keep_layers(large, layers),
            functools.partial(healing_loss, teacher.graphdef),
            lambda step: self.texts["general"].batch(step, seed=0, size=config.batch_size),
            steps=config.heal_steps,
            rate=config.heal_learning_rate,
            seed=0,
            constants=params,
        )

    def _train(
        self,
        directory: epath.Path,
        start: models.Decoder,
        loss: Loss,
        batches: Callable[[int], Any],
        *,
        steps: int,
        rate: float,
        seed: int,
        constants: Any = None,
    ) -> models.Decoder:
        config = self.config
        apply_fn, params = models.from_nnx(models.with_layout(start, config.layout))
        logging.info("%s: %d steps", directory, steps)
        trained = fit.fit(
            make_update(config, apply_fn.graphdef, loss, self.mesh, rate=rate, steps=steps),
            params,
            batches,
            steps=steps,
            directory=directory,
            constants=constants,
            seed=seed,
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
        )
        model = nnx.merge(apply_fn.graphdef, jax.tree.map(_here, trained))
        return models.with_layout(model, "listed")


def make_update(
    config: Config, graphdef: Any, loss: Loss, mesh: Any, *, rate: float, steps: int
) -> fit.Update:
    """The compiled update of a model of the line-up."""

    def loss_fn(params: Any, batch: Any, rng: Any, *constants: Any) -> Any:
        del rng
        return *loss(nnx.merge(graphdef, params), batch, *constants), {}

    return fit.make_update(
        loss_fn,
        training.Schedule(rate, warmup=max(1, steps // 10), total_steps=steps),
        mesh=mesh,
        trainable=None if config.train_embeddings else _LAYERS_ONLY,
    )


def text_loss(model: models.Decoder, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Summed next-token cross-entropy, and the number of tokens in it."""
    labels, where = batch["tokens"][:, 1:], batch["loss_mask"][:, 1:]
    hidden = distillation.hidden_states(model, batch)
    weights = where.astype(jnp.float32)
    loss = losses.linear_cross_entropy(hidden, model.head_of(), labels, weights=weights)
    return loss, weights.sum()


def healing_loss(
    graphdef: Any, model: models.Decoder, batch: Mapping[str, Any], params: Any
) -> tuple[Any, Any]:
    """Summed KL divergence from the whole model, given as its graph and parameters."""
    weights = batch["loss_mask"][:, 1:].astype(jnp.float32)
    whole = jax.lax.stop_gradient(nnx.merge(graphdef, params))
    loss = losses.linear_kl_divergence(
        distillation.hidden_states(model, batch),
        model.head_of(),
        distillation.hidden_states(whole, batch),
        whole.head_of(),
        weights=weights,
    )
    return loss, weights.sum()


def task_loss(model: models.Decoder, batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """Summed cross-entropy of the answers' first tokens."""
    hidden = _at_last(model, batch)
    loss = losses.cross_entropy(model.logits(hidden), batch["answers"])
    return loss.sum(), jnp.float32(loss.size)


def answer_states(
    model: models.Decoder, questions: Questions, size: int, examples: Sequence[int] = ()
) -> np.ndarray:
    """Hidden states that predict the answers, `[n, width]`, after the tokens of examples."""
    model = models.with_layout(model, "listed")
    graphdef, state = nnx.split(model)

    @jax.jit
    def read(state: Any, tokens: Any, cache: Any) -> Any:
        return nnx.merge(graphdef, state).hidden_states(tokens, cache=cache)[1]

    @jax.jit
    def run(state: Any, batch: Mapping[str, Any], cache: Any) -> jax.Array:
        return _at_last(nnx.merge(graphdef, state), batch, cache).astype(jnp.float32)

    cache = None
    if examples:
        # Read once for all questions, whose keys and values follow theirs.
        empty = model.init_cache(1, len(examples) + questions.tokens.shape[1])
        cache = read(state, np.array([examples]), empty)
        cache = jax.tree.map(lambda leaf: jnp.repeat(leaf, size, 0), cache)
    items = []
    for start in range(0, len(questions), size):
        rows = np.arange(start, start + size) % len(questions)
        part = run(state, dataclasses.asdict(questions[rows]), cache)
        items.append(np.asarray(part)[: len(questions) - start])
    return np.concatenate(items)


def _at_last(model: models.Decoder, batch: Mapping[str, Any], cache: Any = None) -> jax.Array:
    hidden, _ = model.hidden_states(batch["tokens"], cache=cache)
    # By a mask: a gather of sharded rows would need the sharding of its result.
    at = jnp.arange(hidden.shape[1]) == batch["last"][:, None]
    return jnp.einsum("bt,bth->bh", at.astype(hidden.dtype), hidden)


def _head_rows(model: models.Decoder) -> np.ndarray:
    head = model.head_of()
    if head.bias is not None or head.soft_cap is not None:
        raise ValueError("large: heads with a bias or a soft cap are not supported here")
    return np.asarray(head.rows, np.float32)


def _here(leaf: jax.Array) -> jax.Array:
    """Move values off the training mesh, for code that does not know it."""
    return jnp.asarray(np.asarray(leaf)) if len(leaf.devices()) > 1 else leaf


def _array(
    path: epath.Path, variant: Variant, make: Callable[[models.Decoder], np.ndarray]
) -> np.ndarray:
    """An array of a model, which process 0 makes and saves if it is not there."""
    if not processes.broadcast_from_first(path.exists):
        # All processes train the model.
        model = variant.model
        processes.run_on_first(
            f"{path}", lambda: storage.write_atomic(path, lambda file: np.save(file, make(model)))
        )
    with path.open("rb") as file:
        return np.load(file)


def _file_identity(spec: str) -> list[Any]:
    path = epath.Path(spec)
    return [path.stat().length] if path.exists() and not path.is_dir() else []

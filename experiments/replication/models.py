"""Teacher and students of the replication experiment: one trunk, four kinds of head."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from experiments.shared.small_text import Text, count_tokens, small_text
from experiments.shared.timing import paired_ratio, paired_seconds
from logitjax import data, leakage, losses, models, training
from logitjax.distillation import sources

KINDS = ("recovered", "copied", "official", "none", "dropped", "scratch")


@dataclasses.dataclass(frozen=True)
class Scene:
    """What students meet.

    Attributes:
      text: over the small vocabulary.
      teacher: its parameters, ``trunk`` and ``head``.
      trunk: the teacher's graph and everything that is not a parameter.
      recovered: what the audit found, numbers only.
      basis: ``[vocab, width]``, scaled so that states of unit size make logits of the right size.
    """

    text: Text
    teacher: Any
    trunk: Any
    recovered: dict[str, Any]
    basis: jax.Array


def trunk_shape(config: Any, vocab: int, layers: int) -> models.DecoderConfig:
    """What teacher and students are, but for their depth."""
    return models.DecoderConfig(
        vocab_size=vocab,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_layers=layers,
        num_heads=max(1, config.width // 64),
        num_kv_heads=max(1, config.width // 64),
        head_dim=min(64, config.width),
        max_length=config.seq_len,
        tie_embeddings=False,
    )


class Trunk:
    """A decoder without a head, as functions of its parameters."""

    def __init__(self, config: Any, vocab: int, layers: int, seed: int):
        shape = trunk_shape(config, vocab, layers)
        model = models.Decoder(shape, rngs=nnx.Rngs(seed), layout="listed", head=nnx.Module())
        self.graphdef, params, self.rest = nnx.split(model, nnx.Param, ...)
        self.params = nnx.to_pure_dict(params)

    def hidden(self, params: Any, tokens: jax.Array) -> jax.Array:
        """``[batch, time, width]`` behind the final norm."""
        return nnx.merge(self.graphdef, params, self.rest).hidden_states(tokens)[0]


def prepare(config: Any, workdir: epath.Path) -> Scene:
    """Text, teacher and recovered head; all kept on disk."""
    text = _text(config, epath.Path(config.cache_dir or workdir / "cache"))
    vocab = len(text.unigram)
    trunk = Trunk(config, vocab, config.teacher_layers, seed=0)
    start = {"trunk": trunk.params, "head": _normal_head(vocab, config.width, 0)}
    path = workdir / "teacher.npz"
    leaves, tree = jax.tree.flatten(start)
    if path.exists():
        with path.open("rb") as file, np.load(file) as held:
            teacher = jax.tree.unflatten(tree, [held[str(i)] for i in range(len(leaves))])
    else:
        logging.info("training the teacher")
        teacher, _ = _fit(
            config,
            text,
            start,
            _cross_entropy(trunk),
            steps=config.teacher_steps,
            rate=config.teacher_learning_rate,
            seed=0,
        )
        _save(path, {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(teacher))})
    teacher = jax.tree.map(jnp.asarray, teacher)
    recovered, basis = _recover(config, text, trunk, teacher, workdir)
    return Scene(text, teacher, trunk, recovered, basis)


def train_student(scene: Scene, arm: str, seed: int, rate: float, config: Any) -> dict[str, Any]:
    """One student, trained and measured."""
    kind, _, depth = arm.rpartition("_")
    layers, text = int(depth), scene.text
    vocab = len(text.unigram)
    trunk = Trunk(config, vocab, layers, seed=seed + 1)
    start: dict[str, Any] = {"trunk": trunk.params}
    fixed: dict[str, Any] = {}
    if kind in ("copied", "official"):
        # The released code copies the embedding too and freezes both.
        fixed = {"head": scene.teacher["head"], "embedding": scene.teacher["trunk"]["embedding"]}
        start["trunk"] = {k: v for k, v in trunk.params.items() if k != "embedding"}
    elif kind == "recovered":
        # What is unknown of the head is one matrix; it is learned where the head is applied.
        fixed = {"basis": scene.basis}
        start["mix"] = jnp.eye(config.width)
    elif kind == "dropped":
        start["trunk"] = _dropped(scene.teacher["trunk"], layers, config.teacher_layers)
        start["head"] = scene.teacher["head"]
    else:
        start["head"] = _normal_head(vocab, config.width, seed + 1)
    if kind == "scratch":
        loss = _cross_entropy(trunk)
    else:
        loss = distillation(config, scene, trunk, official=kind == "official")
    params, curve = _fit(
        config, text, start, loss, steps=config.steps, rate=rate, seed=seed, fixed=fixed
    )
    scored = {
        f"{prefix}{name}": value
        for split, prefix in (("validation", "validation_"), ("test", ""))
        for name, value in nll(text, split, trunk, params, fixed).items()
    }
    states, others = _states(scene, trunk, params, fixed)
    found = leakage.compare_geometry(states, others)
    null = leakage.null_geometry(states, others)
    return scored | {
        "arm": arm,
        "seed": seed,
        "lr": rate,
        "curve": curve,
        "parameters": _size(params) + _size(fixed),
        "trained": _size(params),
        "seconds": _speed(scene, trunk, params, fixed, config),
        **dataclasses.asdict(found),
        **{f"null_{name}": value for name, value in dataclasses.asdict(null).items()},
    }


def teacher_record(scene: Scene) -> dict[str, Any]:
    """The teacher measured as the students are, and behind the best head of what was recovered."""
    scores = nll(scene.text, "test", scene.trunk, scene.teacher, {})
    basis, head = (np.asarray(x, np.float64) for x in (scene.basis, scene.teacher["head"]))
    nearest = jnp.asarray(basis @ np.linalg.lstsq(basis, head)[0], jnp.float32)
    behind = nll(scene.text, "test", scene.trunk, scene.teacher | {"head": nearest}, {})["nll"]
    return {"arm": "teacher", "parameters": _size(scene.teacher), "nll_behind": behind, **scores}


def nll(text: Text, split: str, trunk: Trunk, params: Any, fixed: Any) -> dict[str, float]:
    """Of the next token, pads left out; and unshifted with pads, as the released code logs it."""

    @jax.jit
    def score(params: Any, batch: Any) -> Any:
        hidden = trunk.hidden(_trunk_of(params, fixed), batch["tokens"])
        kernel = _kernel(params, fixed)
        mask = batch["mask"][:, 1:]
        right = losses.linear_cross_entropy(
            hidden[:, :-1], kernel, batch["tokens"][:, 1:], vocab_axis=0
        )
        wrong = losses.linear_cross_entropy(hidden, kernel, batch["tokens"], vocab_axis=0)
        return (right * mask).sum(), mask.sum(), wrong.mean()

    found = [jax.device_get(score(params, batch)) for batch in text.blocks(split)]
    total, count, wrong = (np.asarray(x, np.float64) for x in zip(*found, strict=True))
    return {"nll": float(total.sum() / count.sum()), "unshifted_nll": float(wrong.mean())}


def _text(config: Any, root: epath.Path) -> Text:
    tokenizer = models.load_tokenizer(config.tokenizer)
    if config.data.startswith("tfds:"):
        names = ("train", "validation", "test")
        examples: Any = {
            name: data.load_examples(config.data, split=split)
            for name, split in zip(names, config.splits, strict=True)
        }
    else:
        examples = sources.load_splits(config.data, on_error="raise")
    packed = {
        name: data.pack(
            rows, {"model": tokenizer}, seq_len=config.seq_len, directory=root / "packed" / name
        )
        for name, rows in examples.items()
    }
    counts = count_tokens(packed["train"], tokenizer.vocab_size)
    return small_text(packed, counts, config.vocab)


def _normal_head(vocab: int, width: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed + 500), (vocab, width)) * width**-0.5


def _kernel(params: Any, fixed: Any) -> jax.Array:
    """``[vocab, width]``, whichever way the head is held."""
    if "basis" in fixed:
        return fixed["basis"] @ params["mix"]
    return params["head"] if "head" in params else fixed["head"]


def _trunk_of(params: Any, fixed: Any) -> Any:
    if "embedding" not in fixed:
        return params["trunk"]
    return params["trunk"] | {"embedding": fixed["embedding"]}


def _cross_entropy(trunk: Trunk) -> Callable[..., Any]:
    def loss(params: Any, batch: Any, rng: Any, fixed: Any) -> Any:
        hidden = trunk.hidden(_trunk_of(params, fixed), batch["tokens"])[:, :-1]
        mask = batch["mask"][:, 1:].astype(jnp.float32)
        kernel, labels = _kernel(params, fixed), batch["tokens"][:, 1:]
        total = losses.linear_cross_entropy(
            hidden, kernel, labels, vocab_axis=0, token_weights=mask
        )
        return total, mask.sum(), {}

    return loss


def distillation(config: Any, scene: Scene, trunk: Trunk, *, official: bool) -> Callable[..., Any]:
    def loss(params: Any, batch: Any, rng: Any, fixed: Any) -> Any:
        tokens = batch["tokens"]
        taught = jax.lax.stop_gradient(scene.trunk.hidden(fixed["teacher"]["trunk"], tokens))
        hidden = trunk.hidden(_trunk_of(params, fixed), tokens)
        kernel, head = _kernel(params, fixed), fixed["teacher"]["head"]
        mask = batch["mask"].astype(jnp.float32)
        # Pads and all where official.
        kl = losses.linear_kl_divergence(
            hidden,
            kernel,
            taught,
            head,
            vocab_axis=0,
            teacher_vocab_axis=0,
            temperature=config.temperature,
            token_weights=jnp.ones_like(mask) if official else mask,
        )
        if official:  # "batchmean": a sum over positions over the number of sequences.
            return kl, jnp.float32(len(tokens)), {}
        # The last position has no label, but a teacher.
        ce = losses.linear_cross_entropy(
            hidden[:, :-1], kernel, tokens[:, 1:], vocab_axis=0, token_weights=mask[:, 1:]
        )
        return kl + config.ce_weight * ce, mask.sum(), {}

    return lambda params, batch, rng, fixed: loss(
        params, batch, rng, fixed | {"teacher": scene.teacher}
    )


def _fit(
    config: Any,
    text: Text,
    start: Any,
    loss: Callable[..., Any],
    *,
    steps: int,
    rate: float,
    seed: int,
    fixed: Any = None,
) -> tuple[Any, list[tuple[int, float]]]:
    tx = training.make_optimizer(
        rate, schedule="cosine", warmup=max(1, steps // 20), total_steps=steps, weight_decay=0.01
    )
    mesh = training.make_mesh("data:1", devices=jax.local_devices()[:1])
    state = training.create_train_state(start, tx, mesh=mesh, seed=seed)
    step = training.make_train_step(loss, tx)
    fixed = {} if fixed is None else fixed
    curve = []
    for index in range(steps):
        batch = text.batch(index, seed=seed, size=config.batch_size)
        state, output = step(state, batch, fixed)
        if index % max(1, steps // 40) == 0 or index == steps - 1:
            total, count = output.metrics["loss"]
            curve.append((index, float(total) / float(count)))
            if len(curve) % 5 == 1:
                logging.info("step %d of %d: loss %.4f", index, steps, curve[-1][1])
    return jax.device_get(state.params), curve


def _dropped(trunk: Any, layers: int, of: int) -> Any:
    """The teacher's parameters without some layers, evenly spread, first and last kept."""
    keep = np.unique(np.round(np.linspace(0, of - 1, layers)).astype(int))
    segments = trunk["segments"]
    (name,) = segments
    blocks = segments[name]["layers"]
    kept = {position: blocks[list(blocks)[i]] for position, i in enumerate(keep)}
    return trunk | {"segments": {name: segments[name] | {"layers": kept}}}


def _recover(
    config: Any, text: Text, trunk: Trunk, teacher: Any, workdir: epath.Path
) -> tuple[dict[str, Any], jax.Array]:
    path = workdir / "recovered.npz"
    if path.exists():
        with path.open("rb") as file, np.load(file) as held:
            return json.loads(str(held["record"])), jnp.asarray(held["basis"])

    @jax.jit
    def last(tokens: jax.Array) -> jax.Array:
        return trunk.hidden(teacher["trunk"], tokens)[:, -1] @ teacher["head"].T

    policy = leakage.LogitPolicy(decimals=config.decimals)
    oracle = leakage.LogitOracle(last, policy)
    length = min(24, config.seq_len)
    prompts = np.unique(text.train[:, :length], axis=0)
    order = np.random.default_rng(0).permutation(len(prompts))[: config.prompts]
    rows = np.asarray(oracle.ask(prompts[order]).values)
    found = leakage.estimate_output_subspace(
        rows, noise=leakage.rounding_noise(config.decimals), dimension=config.width
    )
    aligned = leakage.align_head(found.basis, np.asarray(teacher["head"]))
    # Singular values carry the scale: states of unit variance then make logits like the teacher's.
    scale = found.singular_values[: config.width] / len(rows) ** 0.5
    basis = np.asarray(found.basis) * scale
    record = {
        "dimension": found.above_edge,
        "leak": aligned.leak,
        "relative_rms": aligned.relative_rms,
        "queries": oracle.queries,
        "values": oracle.values,
    }
    _save(path, {"basis": basis.astype(np.float32), "record": np.array(json.dumps(record))})
    return record, jnp.asarray(basis, jnp.float32)


def _save(path: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f"{path.name}.part"
    with part.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    part.replace(path)


def _states(scene: Scene, trunk: Trunk, params: Any, fixed: Any) -> tuple[np.ndarray, np.ndarray]:
    """Last hidden states of student and teacher at the same test positions."""
    run = jax.jit(lambda tokens: trunk.hidden(_trunk_of(params, fixed), tokens))
    taught = jax.jit(lambda tokens: scene.trunk.hidden(scene.teacher["trunk"], tokens))
    mine, theirs = [], []
    for batch in scene.text.blocks("test"):
        mine.append(np.asarray(run(batch["tokens"]))[batch["mask"]])
        theirs.append(np.asarray(taught(batch["tokens"]))[batch["mask"]])
    some = np.random.default_rng(0).permutation(sum(map(len, mine)))[:4000]
    return np.concatenate(mine)[some], np.concatenate(theirs)[some]


def _size(tree: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def _speed(scene: Scene, trunk: Trunk, params: Any, fixed: Any, config: Any) -> float:
    """Seconds of a forward pass over the teacher's, taken in turns."""
    tokens = jnp.asarray(scene.text.blocks("test")[0]["tokens"])

    def logits(one: Trunk, params: Any, fixed: Any) -> Callable[[], Any]:
        @jax.jit
        def forward(params: Any, fixed: Any, tokens: jax.Array) -> jax.Array:
            return one.hidden(_trunk_of(params, fixed), tokens) @ _kernel(params, fixed).T

        return functools.partial(forward, params, fixed, tokens)

    seconds = paired_seconds(
        {
            "student": logits(trunk, params, fixed),
            "teacher": logits(scene.trunk, scene.teacher, {}),
        },
        repeats=config.timing_repeats,
    )
    return paired_ratio(seconds["student"], seconds["teacher"])
